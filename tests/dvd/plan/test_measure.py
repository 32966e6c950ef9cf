"""`dvd plan --from URL` against a real gateway in front of workers whose stages take known times."""

import asyncio
import io
import json
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from PIL import Image

from dvd.plan.command import main
from dvd.plan.file import read
from dvd.plan.measure import Encoding, Measurement, fit_decode, fit_encode, fit_prefill, measure, served_load
from dvd.plan.model import Kind, Load
from dvd.plan.probe import Probe, ProbeError, Samples
from protos import vision_pb2
from tests.ports import free_port
from tests.server.fakes.handlers import Handler, error_response, respond_with
from tests.server.fakes.language_worker import FakeLanguageWorker
from tests.server.fakes.stack import Stack, start_stack
from tests.server.fakes.vision_worker import FakeVisionWorker

DECODE, TILE, BATCH, ENCODE, ROUTE, DELIVER = 0.002, 0.004, 0.010, 0.020, 0.003, 0.007
STEP_SECONDS, PREFILL_SECONDS = 0.002, 0.00002


class TimedVisionWorker(FakeVisionWorker):
    """Reports the times of an encoder whose costs are known, for the tiles that the gateway's arithmetic gives."""

    async def Encode(self, request: vision_pb2.EncodeRequest, context: Any) -> vision_pb2.EncodeReply:  # noqa: N802
        reply = await super().Encode(request, context)
        with Image.open(io.BytesIO(request.images[0].data)) as opened:
            columns, rows = (side // 448 for side in opened.size)
        tiles = columns * rows + (columns * rows > 1)
        for image in reply.images:
            image.columns, image.rows = columns, rows
            del image.compressed[:]
            image.compressed.extend([False] * tiles)
        reply.timings.CopyFrom(
            vision_pb2.Timings(
                decode=DECODE * tiles, tile=TILE * tiles, encode=BATCH + ENCODE * tiles, route=ROUTE * tiles, deliver=DELIVER
            )
        )
        return reply


async def answer_at_a_pace(request: web.Request) -> web.StreamResponse:
    """Streams `max_tokens` tokens after a prefill of one token for each word."""
    body = await request.json()
    prompt = len(body["messages"][0]["content"][-1]["text"].split()) + 10
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await asyncio.sleep(prompt * PREFILL_SECONDS)
    await response.prepare(request)
    for _ in range(body["max_tokens"]):
        await asyncio.sleep(STEP_SECONDS)
        await response.write(b'data: {"choices":[{"index":0,"delta":{"content":"word"},"finish_reason":null}]}\n\n')
    usage = {"prompt_tokens": prompt, "completion_tokens": body["max_tokens"], "total_tokens": prompt + body["max_tokens"]}
    await response.write(f'data: {{"choices":[],"usage":{json.dumps(usage)}}}\n\ndata: [DONE]\n\n'.encode())
    return response


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    language = FakeLanguageWorker(tmp_path, 0)
    language.engine.respond = answer_at_a_pace
    async with start_stack(tmp_path, [TimedVisionWorker(f"unix:{tmp_path}/vision")], [language]) as running:
        yield running


def ignore(_text: str) -> None:
    pass


async def run_measurement(stack: Stack, report: Callable[[str], None] = ignore) -> Measurement:
    return await asyncio.to_thread(measure, Probe(stack.url), report)


async def test_the_costs_of_a_server(stack: Stack) -> None:
    measurement = await run_measurement(stack)
    vision, language = measurement.costs.vision, measurement.costs.language
    assert vision.prepare == pytest.approx(DECODE + TILE)
    assert vision.tile == pytest.approx(ENCODE + ROUTE)
    assert vision.batch == pytest.approx(BATCH)
    assert language.step + language.decode >= STEP_SECONDS * 0.9  # a step takes at least that long
    assert language.prefill > 0
    assert (measurement.foreign_requests, measurement.is_load_measured, measurement.load) == (0, False, Load())
    text = measurement.as_file(stack.url)
    assert read(text, {"load": {}, "limits": {}}).load == Load()
    assert "set load.kinds too" in text


async def test_the_number_of_requests_is_bounded_and_no_image_is_sent_twice(stack: Stack) -> None:
    await run_measurement(stack)
    assert len(stack.engine.requests) < 50
    assert len(set(stack.vision.images)) == len(stack.vision.images) >= 7


async def test_requests_of_others_are_noticed(stack: Stack) -> None:
    async def send_others() -> None:
        for _ in range(3):
            assert (await stack.chat({"type": "text", "text": "hello"}, max_tokens=1)).status == 200

    loop = asyncio.get_running_loop()

    def report(text: str) -> None:
        if text == "prompts of three lengths":
            asyncio.run_coroutine_threadsafe(send_others(), loop).result()

    measurement = await run_measurement(stack, report)
    assert measurement.foreign_requests == 3
    assert "3 other requests were served meanwhile" in measurement.as_file(stack.url)


async def test_the_command_prints_a_file_that_it_can_read(
    stack: Stack, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await asyncio.to_thread(main, ["--from", stack.url]) == 0
    output = capsys.readouterr()
    assert "dvd plan: images of two sizes\n" in output.err
    (tmp_path / "plan.yaml").write_text(output.out)
    assert main([str(tmp_path / "plan.yaml")]) == 0


@pytest.mark.parametrize(
    ("respond", "message"),
    [
        (
            error_response(400, "max_tokens is too large"),
            r"/v1/chat/completions answered with status 400: max_tokens is too large",
        ),
        (respond_with(b"data: {}\n\n", Content_Type="text/event-stream"), "the answer is not that of a gateway"),
    ],
)
async def test_a_failing_request_ends_the_measurement(stack: Stack, respond: Handler, message: str) -> None:
    stack.engine.respond = respond
    with pytest.raises(ProbeError, match=message) as caught:
        await run_measurement(stack)
    assert "\n" not in str(caught.value)


async def test_a_server_that_wants_a_key_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with start_stack(tmp_path, api_key="secret") as stack:
        with pytest.raises(ProbeError, match="/v1/models answered with status 401"):
            await asyncio.to_thread(Probe(stack.url).model)
        monkeypatch.setenv("DVD_API_KEY", "secret")
        assert (await asyncio.to_thread(Probe(stack.url).model))["id"] == "internvl"


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://a", "http://", "a b"])
def test_an_invalid_url_is_an_error(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--from", url]) == 1
    assert re.fullmatch(r"dvd plan: '.*': expected http://HOST:PORT of a gateway\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    "url",
    [
        "http://user:hunter2@127.0.0.1:9", "http://user:hunter2@127.0.0.1", "https://hunter2@gateway", "http://:hunter2@gateway",
        "http://gateway/?token=hunter2", "http://gateway#hunter2@", "http://user:hunter2@", "user:hunter2@gateway:8000",
        "ftp://user:hunter2@gateway", "http://user:hunter2@[::1", "http://user:hunter2＠gateway",
    ],
)  # fmt: skip
def test_no_error_repeats_a_password(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--from", url]) == 1
    message = capsys.readouterr().err
    assert message.startswith("dvd plan: '")
    assert "hunter2" not in message
    assert message.count("\n") == 1


def test_a_server_that_does_not_answer_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert main(["--from", url]) == 1
    assert capsys.readouterr().err.startswith(f"dvd plan: {url} does not answer: ")


def test_decode_costs_from_two_loads() -> None:
    assert fit_decode(0.010 + 0.001, 0.010 + 8 * 0.001, 8) == pytest.approx((0.010, 0.001))
    assert fit_decode(0.010, 0.009, 8) == (0.010, 0.0), "noise makes no negative cost"
    assert fit_decode(0.001, 0.800, 8) == (0.0, 0.001)


def test_prefill_costs_from_three_lengths() -> None:
    def seconds(tokens: int, attention: float = 1e-7) -> tuple[int, float]:
        return tokens, 0.02 + 0.005 + tokens * (0.0001 + attention * tokens / 2)

    assert fit_prefill([seconds(n) for n in (20, 500, 1000)], 0.005) == pytest.approx((0.02, 0.0001, 1e-7))
    request, prefill, attention = fit_prefill([seconds(n, 0.0) for n in (20, 500, 1000)], 0.005)
    assert (request, prefill) == pytest.approx((0.02, 0.0001))
    assert attention == pytest.approx(0, abs=1e-12)
    assert fit_prefill([(20, 0.02), (500, 0.01), (1000, 0.01)], 0.005)[1] == 1e-9, "noise makes no negative cost"


def test_tower_costs_from_two_sizes() -> None:
    def encoding(tiles: int, seconds: float) -> Encoding:
        return Encoding(tiles, 256, 0.1, seconds, 0.1)

    assert fit_encode(encoding(1, 0.03), encoding(7, 0.15)) == pytest.approx((0.01, 0.02))
    assert fit_encode(encoding(1, 0.03), encoding(1, 0.03)) == pytest.approx((0.0, 0.03))
    batch, tile = fit_encode(encoding(1, 0.5), encoding(7, 0.0))
    assert batch >= 0
    assert tile > 0


ENGINE: Samples = [("vllm:prompt_tokens_total", {}, 100 * 800.0), ("vllm:generation_tokens_total", {}, 100 * 90.0)]


def gateway(images: float) -> Samples:
    return [
        ("dvd_requests_total", {"route": "/v1/chat/completions", "code": "200"}, 100.0),
        ("dvd_requests_total", {"route": "/v1/chat/completions", "code": "400"}, 7.0),
        ("dvd_requests_total", {"route": "/metrics", "code": "200"}, 1000.0),
        ("dvd_images_total", {}, images),
        ("dvd_image_tiles_sum", {}, 350.0),
        ("dvd_image_tiles_count", {}, 50.0),
        ("dvd_visual_tokens_total", {}, 100 * 700.0),
        ("dvd_cache_events_total", {"tier": "sink", "event": "hits"}, 25.0),
        ("dvd_cache_events_total", {"tier": "sink", "event": "misses"}, 75.0),
        ("dvd_cache_events_total", {"tier": "memory", "event": "hits"}, 999.0),
        ("dvd_tiles_total", {"resolution": "full"}, 300.0),
        ("dvd_tiles_total", {"resolution": "compressed"}, 100.0),
    ]


def test_the_load_that_a_server_has_served() -> None:
    expected = Kind(images=2, tiles=7, text=100, output=90, repeated=0.25)
    assert served_load(gateway(200.0), ENGINE) == Load(kinds=[expected], compressed=0.25)


def test_a_mix_with_requests_without_images() -> None:
    load = served_load(gateway(25.0), ENGINE)
    assert load is not None
    assert [(kind.weight, kind.images) for kind in load.kinds] == [(0.25, 1), (0.75, 0)]
    load = served_load(gateway(0.0), ENGINE)
    assert load is not None
    assert [kind.images for kind in load.kinds] == [0]


def test_too_few_requests_tell_nothing() -> None:
    assert served_load(gateway(1.0)[1:], ENGINE) is None
    assert served_load(gateway(1.0), []) is None
