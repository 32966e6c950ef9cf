"""The gateway over a port, its workers played by `peers`: what callers get, and what is left when they have gone."""

import asyncio
import base64
import contextlib
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from common import errors
from common.embedding_ref import parse_embedding_url
from protos import vision_pb2 as pb
from server.vllm_response import ENGINE_ERROR_MESSAGE
from tests.server.peers import (
    COMPLETION,
    EVENTS,
    METRICS,
    MODEL,
    Answer,
    Stack,
    chat,
    cut,
    described,
    failing,
    files,
    half_a_body,
    hang,
    image_part,
    in_turn,
    inline,
    picture,
    sends,
    serve,
    streamed,
    text_part,
    tokens_of,
    until,
    usual,
)
from tests.videos import made, read

A, B, C = (picture(i) for i in range(3))


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    """One worker of each kind, open to private addresses."""
    async with serve(tmp_path, allow_private_images=True) as made:
        yield made


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """The same for tests that leave nothing behind: one start for all of them."""
    folder = tmp_path_factory.mktemp("shared")
    limits = {"max_body_bytes": 1 << 20, "max_image_bytes": 100_000, "max_image_pixels": 10_000, "max_images": 4}
    async with serve(folder, **limits) as made:
        yield made


async def good(stack: Stack) -> None:
    """A request with an image is served, and no permit is out."""
    answer = await stack.chat(image_part(A), text_part("what is it?"))
    assert (answer.status, answer.body) == (200, COMPLETION)
    await stack.settled()


def sent(stack: Stack, message: int = 0) -> Any:
    """The content of a message as the engine got it."""
    return stack.engine.last()["messages"][message]["content"]


def answering(body: bytes) -> Any:
    """An engine that says this, whatever it is asked."""

    async def respond(_request: web.Request) -> web.Response:
        return web.Response(body=body, content_type="application/json")

    return respond


def placeholder(image: bytes, part: dict[str, Any]) -> dict[str, Any]:
    return {"type": "image_embeds", "image_embeds": {"image_num_tokens": [tokens_of(image)]}, "uuid": part["uuid"]}


# What is served


async def test_a_text_goes_to_the_engine_and_its_answer_comes_back_byte_for_byte(stack: Stack) -> None:
    body = b'{ "messages" : [{"role":"user","content":"\\u00e9 \xc3\xa9"}],"model":"internvl" , "x": 1.50}\n'
    answer = await stack.post(body)
    assert (answer.status, answer.body) == (200, COMPLETION)
    assert answer.headers["Content-Type"] == "application/json"
    assert stack.engine.received[-1].raw == body
    assert stack.engine.received[-1].path == "/v1/chat/completions"
    assert stack.vision.calls == []
    assert "X-DvD-Images" not in answer.headers


async def test_a_stream_comes_back_byte_for_byte(stack: Stack) -> None:
    for content in (["hello"], [image_part(A)]):
        answer = await stack.chat(*content, stream=True)
        assert (answer.status, answer.body) == (200, b"".join(EVENTS))
        assert answer.headers["Content-Type"].startswith("text/event-stream")
    await stack.settled()


async def test_events_come_when_the_engine_sends_them(stack: Stack) -> None:
    more = asyncio.Event()

    async def later(_request: Any) -> Any:
        await more.wait()

    stack.engine.respond = streamed(EVENTS[0], EVENTS[1], then=later)
    reader, writer = await stack.begin(chat("a", stream=True))
    async with asyncio.timeout(20):
        assert EVENTS[0].strip() in await reader.readuntil(EVENTS[0].strip())
        assert EVENTS[1].strip() in await reader.readuntil(EVENTS[1].strip())
    assert await stack.metric("dvd_requests_in_flight") == 1
    more.set()
    await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), 20)
    writer.close()
    await stack.settled()


async def test_an_image_goes_to_the_vision_worker_and_its_key_to_the_engine(stack: Stack) -> None:
    answer = await stack.chat(image_part(A), text_part("what is it?"), temperature=0.5, unknown={"a": [1, None]})
    assert (answer.status, answer.body) == (200, COMPLETION)
    (call,) = stack.vision.calls
    (image,) = call.images
    assert image.data == A
    assert (call.deliver_to, call.fingerprint, call.dtype) == (stack.sink.address, "f" * 64, 3)
    assert stack.sink.rows == {image.key: tokens_of(A)}
    part, text = sent(stack)
    assert part == placeholder(A, {"uuid": image.key})
    assert text == text_part("what is it?")
    body = stack.engine.last()
    assert (body["temperature"], body["unknown"], body["model"]) == (0.5, {"a": [1, None]}, MODEL)
    assert b"base64" not in stack.engine.received[-1].raw
    assert (
        answer.headers["X-DvD-Images"]
        == f"images=1; tiles=2; compressed=1; tokens={tokens_of(A)}; reused=0; shared=0; encoded=1"
    )


@pytest.mark.parametrize("scope", ["image", "request"])
async def test_images_in_several_turns_keep_their_places(tmp_path: Path, scope: str) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [image_part(A), text_part("one"), image_part(B)]},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": [text_part("two"), image_part(C), image_part(A)]},
    ]
    async with serve(tmp_path, router_scope=scope) as stack:
        answer = await stack.post({"model": MODEL, "messages": messages, "seed": 5})
        assert answer.status == 200
        kinds = {image.key: image.data for call in stack.vision.calls for image in call.images}
        first, second = sent(stack, 1), sent(stack, 3)
        assert [kinds[part["uuid"]] for part in (first[0], first[2], second[1], second[2])] == [A, B, C, A]
        assert first == [placeholder(A, first[0]), text_part("one"), placeholder(B, first[2])]
        assert second == [text_part("two"), placeholder(C, second[1]), placeholder(A, second[2])]
        assert [sent(stack, 0), sent(stack, 2)] == ["be brief", "yes"]
        if scope == "image":
            assert sorted(stack.vision.images) == sorted([A, B, C]), "an equal image is encoded once"
            assert first[0]["uuid"] == second[2]["uuid"]
        else:
            assert stack.vision.images == [A, B, C, A], "one call: all are routed as a group"
        again = await stack.post({"model": MODEL, "messages": messages})
        assert again.headers["X-DvD-Images"].endswith("reused=4; shared=0; encoded=0")


async def test_an_image_has_an_embedding_and_a_report_for_each_setting_of_the_router(stack: Stack) -> None:
    said = [None, {"mode": "off"}, {"mode": "all"}, {"relative_threshold": 0.25}]
    for reused in (0, 1):
        for vir, compressed in zip(said, (1, 0, 2, 1), strict=True):
            answer = await stack.chat(image_part(A), vir=vir)
            report = f"images=1; tiles=2; compressed={compressed}; tokens={tokens_of(A)}; reused={reused}; shared=0"
            report += f"; encoded={1 - reused}"
            assert (answer.status, answer.headers["X-DvD-Images"]) == (200, report)
            assert "vir" not in stack.engine.last()
    modes = [(call.router.mode, call.router.HasField("relative_threshold")) for call in stack.vision.calls]
    assert modes == [(pb.Router.AUTO, False), (pb.Router.OFF, False), (pb.Router.ALL, False), (pb.Router.AUTO, True)]
    assert len({call.images[0].key for call in stack.vision.calls}) == len(said)
    assert (await stack.chat("a", vir={"mode": "off"})).status == 200
    assert "vir" not in stack.engine.last()


@pytest.mark.parametrize(
    ("options", "router"),
    [
        ({"vir": "off"}, pb.Router(mode=pb.Router.OFF)),
        ({"vir": "all"}, pb.Router(mode=pb.Router.ALL)),
        ({"vir_absolute_threshold": 0.25}, pb.Router(absolute_threshold=0.25)),
        ({"vir_relative_threshold": 0, "vir_absolute_threshold": 1}, pb.Router(relative_threshold=0, absolute_threshold=1)),
    ],
    ids=["off", "all", "one threshold", "both thresholds"],
)
async def test_the_operators_router_is_the_default(tmp_path: Path, options: dict[str, Any], router: pb.Router) -> None:
    async with serve(tmp_path, **options) as stack:
        for vir in ({}, {"mode": "auto", "relative_threshold": 0.5, "absolute_threshold": 0.75}):
            assert (await stack.chat(image_part(A), vir=vir)).status == 200
        asked = pb.Router(relative_threshold=0.5, absolute_threshold=0.75)
        assert [call.router for call in stack.vision.calls] == [router, asked]


async def test_why_the_vision_worker_does_not_compress_reaches_the_caller(stack: Stack) -> None:
    stack.vision.error = errors.InvalidRequest("this checkpoint has no router and cannot compress")
    answer = await stack.chat(image_part(A), vir={"mode": "all"})
    assert (answer.status, answer.error["code"]) == (400, "invalid_request")
    assert answer.error["message"] == "this checkpoint has no router and cannot compress"
    stack.vision.error = None
    await good(stack)


# The dial


def with_words(image: bytes, **words: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": inline(image), **words}}


async def test_each_image_of_a_request_has_a_setting_of_its_own(stack: Stack) -> None:
    said: list[dict[str, Any]] = [
        {}, {"detail": "low"}, {"max_dynamic_patch": 6}, {"vir": {"mode": "all"}}, {"detail": "high", "vir": {"mode": "off"}},
    ]  # fmt: skip
    answer = await stack.chat(*(with_words(A, **words) for words in said), vir={"mode": "off"})
    assert answer.status == 200
    calls = {call.images[0].key: (call.tiling.max_tiles, call.router.mode) for call in stack.vision.calls}
    off, compressing = pb.Router.OFF, pb.Router.ALL
    parts = sent(stack)
    assert [calls[part["uuid"]] for part in parts] == [(12, off), (1, off), (6, off), (12, compressing), (12, off)]
    assert parts[0] == parts[4], "the same in other words is the same embedding"
    assert all(set(part) == {"type", "image_embeds", "uuid"} for part in parts)
    assert answer.headers["X-DvD-Images"].endswith("reused=0; shared=0; encoded=5")
    assert len(stack.vision.calls) == 4


@pytest.mark.parametrize(("bound", "original", "usual"), [(None, 12, 12), (40, 40, 12), (3, 3, 3)])
async def test_the_operator_bounds_tiles(tmp_path: Path, bound: int | None, original: int, usual: int) -> None:
    async with serve(tmp_path, max_tiles=bound) as stack:
        for detail, most in (("original", original), ("high", usual), ("auto", usual), ("low", 1)):
            assert (await stack.chat(with_words(picture(most), detail=detail))).status == 200
            assert stack.vision.calls[-1].tiling == pb.Tiling(min_tiles=1, max_tiles=most), detail
        answer = await stack.chat(text_part("a"), with_words(B, max_dynamic_patch=original + 1)) if original < 40 else None
        if answer is not None:
            assert (answer.status, answer.error["param"]) == (400, "messages[0].content[1].image_url.max_dynamic_patch")
            assert f"is above {original}" in answer.error["message"]
        await good(stack)


async def test_callers_may_be_kept_from_the_router(tmp_path: Path) -> None:
    async with serve(tmp_path, allow_vir=False, vir="all") as stack:
        for body in (chat("a", vir={"mode": "off"}), chat(with_words(A, vir={}))):
            answer = await stack.post(body)
            assert (answer.status, answer.error["code"]) == (400, "invalid_request")
        await good(stack)
        assert stack.vision.calls[-1].router.mode == pb.Router.ALL


async def test_a_group_has_one_setting(tmp_path: Path) -> None:
    async with serve(tmp_path, router_scope="request") as stack:
        same = await stack.chat(with_words(A, detail="high"), with_words(B, max_dynamic_patch=12))
        assert same.status == 200
        for words in ({"detail": "low"}, {"vir": {"mode": "off"}}):
            answer = await stack.chat(image_part(A), text_part("and"), with_words(B, **words))
            assert (answer.status, answer.error["param"]) == (400, "messages[0].content[2].image_url")
            assert "as one group" in answer.error["message"]
        await good(stack)


async def test_the_answer_says_which_cache_had_an_image(stack: Stack) -> None:
    await stack.chat(image_part(A))
    stack.vision.cached = True
    await stack.chat(image_part(B))
    stack.vision.cached = False
    stack.sink.rows.pop(stack.vision.calls[-1].images[0].key)
    tiles = await stack.metric("dvd_tiles_total")
    stack.vision.cached = True
    answer = await stack.chat(image_part(A), image_part(B), image_part(B))
    assert answer.headers["X-DvD-Images"].endswith("reused=1; shared=2; encoded=0")
    assert await stack.metric("dvd_tiles_total") == tiles, "what comes from a cache has not been encoded"


# What images cost


async def test_the_costs_of_images_are_arithmetic(tmp_path: Path) -> None:
    async with serve(tmp_path, max_tiles=40) as stack:
        wide = picture(1, (1300, 800))
        images = [{"url": inline(wide), **words} for words in ({}, {"detail": "low"}, {"max_dynamic_patch": 2})]
        answer = await stack.post({"images": [*images, {"url": inline(A), "vir": {"mode": "all"}}]}, path="/v1/images/tokens")
        assert answer.status == 200, answer.body
        assert [image["tiles"] for image in answer.json["images"]] == [
            {"columns": 3, "rows": 2, "thumbnail": True, "total": 7},
            {"columns": 1, "rows": 1, "thumbnail": False, "total": 1},
            {"columns": 2, "rows": 1, "thumbnail": True, "total": 3},
            {"columns": 1, "rows": 1, "thumbnail": False, "total": 1},
        ]
        first, last = answer.json["images"][0], answer.json["images"][3]
        assert (first["width"], first["height"], first["mode"], last["mode"]) == (1300, 800, "auto", "all")
        assert first["tokens"] == {"off": 7 * 256, "all": 7 * 64, "auto": [7 * 64, 7 * 256]}
        assert answer.json["total"] == {
            "tiles": 12,
            "tokens": {"off": 12 * 256, "all": 12 * 64, "auto": [12 * 64, 12 * 256]},
        }
        assert (stack.vision.calls, stack.engine.received, stack.sink.rows) == ([], [], {})
        assert "X-DvD-Images" not in answer.headers
        await stack.settled()


async def test_without_a_router_nothing_can_be_compressed(stack: Stack) -> None:
    plain = described(compressed_tokens_per_tile=0, thumbnail=False, tile_size=64, min_tiles=2)
    stack.vision.checkpoint, stack.sink.checkpoint = plain, plain

    async def known() -> bool:
        answer = await stack.post(chat(image_part(picture(2, (200, 100)))), path="/v1/images/tokens")
        return bool(answer.status == 200 and answer.json["images"][0]["tokens"]["all"] is None)

    await until(known, "the gateway knows of the other checkpoint")
    answer = await stack.post(chat(image_part(picture(2, (200, 100)))), path="/v1/images/tokens")
    (image,) = answer.json["images"]
    assert image["tiles"] == {"columns": 4, "rows": 2, "thumbnail": False, "total": 8}
    assert image["tokens"] == {"off": 2048, "all": None, "auto": [2048, 2048]}
    assert answer.json["total"]["tokens"] == {"off": 2048, "all": None, "auto": [2048, 2048]}


@pytest.mark.parametrize("scope", ["image", "request"])
async def test_the_routers_decision_costs_no_second_encode(tmp_path: Path, scope: str) -> None:
    async with serve(tmp_path, router_scope=scope) as stack:
        body = {**chat(image_part(A), image_part(B)), "route": True}
        for _ in range(2):
            answer = await stack.post(body, path="/v1/images/tokens")
            assert answer.status == 200, answer.body
            routed = [image["routed"] for image in answer.json["images"]]
            assert routed == [{"tokens": tokens_of(image), "compressed": [False, True]} for image in (A, B)]
            assert answer.json["total"]["routed"] == {"tokens": tokens_of(A) + tokens_of(B), "compressed": 2}
        assert all(call.dry_run and not call.deliver_to for call in stack.vision.calls)
        assert sorted(stack.vision.images) == sorted([A, B]), "what is known is not asked again"
        assert (stack.engine.received, stack.sink.rows) == ([], {})
        keys = {image.key for call in stack.vision.calls for image in call.images}
        del body["route"]
        assert (await stack.post(body)).status == 200
        assert {part["uuid"] for part in sent(stack)} == keys, "the request that follows finds it under the same key"


async def test_the_costs_of_no_image_are_none(shared: Stack) -> None:
    answer = await shared.post({**chat("a"), "route": True}, path="/v1/images/tokens")
    assert (answer.status, answer.json["images"]) == (200, [])
    assert answer.json["total"]["tiles"] == 0


async def test_what_cannot_be_measured_is_refused(shared: Stack) -> None:
    for body, param in (
        ({"images": [{"url": "file:///etc/passwd"}]}, None),
        ({"images": [{"url": inline(b"text")}]}, None),
        ({"images": [{"url": inline(A), "max_dynamic_patch": 13}]}, "images[0].max_dynamic_patch"),
        ({"images": [{"url": inline(A)}], "model": "other"}, "model"),
        ({"images": []}, "images"),
    ):
        answer = await shared.post(body, path="/v1/images/tokens")
        assert answer.status in (400, 404)
        assert answer.error["param"] == param
    await good(shared)


async def test_images_by_url(stack: Stack) -> None:
    async with files(a=sends(A), b=sends(B, Content_Type="text/plain")) as url:
        answer = await stack.chat(image_part(f"{url}/a"), image_part(f"{url}/b"), image_part(f"{url}/a"))
        assert answer.status == 200
    assert sorted(stack.vision.images) == sorted([A, B])
    assert url.encode() not in stack.engine.received[-1].raw


async def test_a_video_is_its_frames(stack: Stack) -> None:
    clip = made("mp4", "mpeg4", 100)
    async with files(v=sends(clip)) as url:
        for link in (f"{url}/v", inline(clip, "video/mp4")):
            video = {"type": "video_url", "video_url": {"url": link, "num_frames": 4}}
            answer = await stack.chat(image_part(A), video, text_part("what happens?"))
            assert answer.status == 200
            assert answer.headers["X-DvD-Images"].startswith("images=5; ")
            told = [part.get("text") or part["type"] for part in sent(stack)]
            frames = [text for i in range(1, 5) for text in (f"Frame{i}: ", "image_embeds")]
            assert told == ["image_embeds", *frames, "what happens?"]
            assert b"base64" not in stack.engine.received[-1].raw
    assert {call.tiling.max_tiles for call in stack.vision.calls if call.images[0].data != A} == {1}
    frames_sent = [data for data in stack.vision.images if data != A]
    assert sorted(map(read, frames_sent)) == [12, 37, 62, 86], "the second time none is encoded again"
    assert sent(stack)[-2]["uuid"] in stack.sink.rows


async def test_videos_that_are_none(shared: Stack) -> None:
    async def refused(link: str, code: str, **words: Any) -> None:
        answer = await shared.chat({"type": "video_url", "video_url": {"url": link, **words}}, text_part("?"))
        assert (answer.status, answer.error["code"]) == (400, code)

    await refused(inline(A), "invalid_video")
    await refused(inline(made("mp4", "mpeg4", 3, size=(128, 96)), "video/mp4"), "image_too_large")
    await refused("https://127.0.0.1/a.mp4", "invalid_request")
    await refused("file:///etc/passwd", "invalid_request")
    await refused(inline(made("mp4", "mpeg4", 3)), "too_many_images", num_frames=5)
    await good(shared)


async def test_a_url_whose_image_changes_is_looked_at_again(stack: Stack) -> None:
    async with files(a=in_turn(sends(A), sends(B))) as url:
        for _ in range(2):
            assert (await stack.chat(image_part(f"{url}/a"))).status == 200
    assert stack.vision.images == [A, B]


async def test_plain_completions_take_text(stack: Stack) -> None:
    answer = await stack.post(body := b'{"model":"internvl", "prompt": "once"}', path="/v1/completions")
    assert (answer.status, answer.body) == (200, COMPLETION)
    assert (stack.engine.received[-1].path, stack.engine.received[-1].raw) == ("/v1/completions", body)
    assert (await stack.post({"model": MODEL, "prompt": "a", "vir": {}}, path="/v1/completions")).status == 200
    assert stack.engine.last() == {"model": MODEL, "prompt": "a"}
    refused = await stack.post({"model": MODEL, "prompt_embeds": "AAAA"}, path="/v1/completions")
    assert (refused.status, refused.error["param"]) == (400, "prompt_embeds")


# The other routes


def handed(image: bytes, url: str) -> None:
    """What an engine is given where it takes no embedding."""
    found = parse_embedding_url(url)
    assert found is not None
    assert found.tokens == tokens_of(image)


async def test_responses_take_images(stack: Stack) -> None:
    said = b'{"id":"resp_1","usage":{"input_tokens":9,"input_tokens_details":{"cached_tokens":0},"output_tokens":1}}'
    stack.engine.respond = answering(said)
    part = {"type": "input_image", "image_url": inline(A), "detail": "low"}
    given = [{"role": "user", "content": [part, {"type": "input_text", "text": "what is it?"}]}]
    answer = await stack.post({"model": MODEL, "input": given, "vir": {"mode": "off"}}, path="/v1/responses")
    assert (answer.status, stack.engine.received[-1].path) == (200, "/v1/responses")
    counted = b'{"cached_tokens":0,"image_tokens":%d}' % tokens_of(A)
    assert answer.body == said.replace(b'{"cached_tokens":0}', counted)
    assert answer.headers["X-DvD-Images"].startswith("images=1; ")
    assert (stack.vision.calls[-1].tiling.max_tiles, stack.vision.calls[-1].router.mode) == (1, pb.Router.OFF)
    body = stack.engine.last()
    handed(A, body["input"][0]["content"][0]["image_url"])
    assert "vir" not in body
    assert (await stack.post({"model": MODEL, "input": "a"}, path="/v1/responses")).body == said


async def test_messages_take_images(stack: Stack) -> None:
    said = b'{"id":"msg_1","type":"message","usage":{"input_tokens":9,"output_tokens":1}}'
    stack.engine.respond = answering(said)
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(A).decode()}
    messages = [{"role": "user", "content": [{"type": "image", "source": source}, text_part("what is it?")]}]
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        answer = await stack.post({"model": MODEL, "max_tokens": 5, "messages": messages}, path=path)
        assert (answer.status, answer.body) == (200, said), "there is no place for visual tokens in this usage"
        assert stack.engine.received[-1].path == path
        handed(A, sent(stack)[0]["source"]["url"])
    assert stack.vision.images == [A]
    text = json.dumps({"model": MODEL, "max_tokens": 5, "messages": [{"role": "user", "content": "a"}]}).encode()
    assert (await stack.post(text, path="/v1/messages")).status == 200
    assert stack.engine.received[-1].raw == text


async def test_messages_have_anthropics_errors_and_keys(tmp_path: Path) -> None:
    body = {"model": MODEL, "max_tokens": 5, "messages": [{"role": "user", "content": "a"}]}
    async with serve(tmp_path, api_key="secret") as stack:
        answer = await stack.post(body, path="/v1/messages")
        assert (answer.status, answer.json["type"], answer.json["error"]["type"]) == (401, "error", "authentication_error")
        key = {"x-api-key": "secret"}
        assert (await stack.post(body, key, path="/v1/messages")).status == 200
        answer = await stack.post({**body, "messages": 5, "model": "other"}, key, path="/v1/messages")
        assert (answer.status, answer.json["type"], answer.json["error"]["type"]) == (404, "error", "not_found_error")
        stack.engine.respond = failing(400, "max_tokens must be positive")
        answer = await stack.post(body, key, path="/v1/messages")
        assert (answer.status, answer.json["error"]["message"]) == (400, "max_tokens must be positive")
        assert (answer.json["type"], answer.json["error"]["type"]) == ("error", "invalid_request_error")


async def test_a_caller_is_the_same_by_either_header(stack: Stack) -> None:
    for headers in ({"Authorization": "Bearer me"}, {"x-api-key": "me"}, {"x-api-key": "you"}):
        await stack.chat(image_part(A), headers=headers)
    assert len(stack.vision.calls) == 2


async def test_text_is_counted_and_uncounted(stack: Stack) -> None:
    answer = await stack.post(chat(image_part(A), text_part("a")), path="/tokenize")
    assert (answer.status, stack.engine.received[-1].path) == (200, "/tokenize")
    assert sent(stack)[0] == placeholder(A, sent(stack)[0])
    for path, body in (("/tokenize", {"model": MODEL, "prompt": "a"}), ("/detokenize", {"model": MODEL, "tokens": [1]})):
        raw = json.dumps(body).encode()
        assert (await stack.post(raw, path=path)).status == 200
        assert (stack.engine.received[-1].path, stack.engine.received[-1].raw) == (path, raw)


async def test_usage_says_which_tokens_are_visual_in_answers_and_in_streams(stack: Stack) -> None:
    said = b'{"usage":{"prompt_tokens":9,"prompt_tokens_details":{"cached_tokens":4}},"x": 1.50}'
    made = said.replace(b'"cached_tokens":4', b'"cached_tokens":4,"image_tokens":%d' % (2 * tokens_of(A)))
    stack.engine.respond = answering(said)
    assert (await stack.chat(image_part(A), image_part(A))).body == made
    assert (await stack.chat("a")).body == said
    stack.engine.respond = streamed(EVENTS[0], EVENTS[1], b"data: " + said + b"\n\n", EVENTS[-1])
    answer = await stack.chat(image_part(A), image_part(A), stream=True)
    assert answer.body == EVENTS[0] + EVENTS[1] + b"data: " + made + b"\n\n" + EVENTS[-1]
    answer = await stack.chat("a", stream=True)
    assert answer.body == EVENTS[0] + EVENTS[1] + b"data: " + said + b"\n\n" + EVENTS[-1]


async def test_a_silent_stream_is_kept_alive_once_it_has_begun(tmp_path: Path) -> None:
    async with serve(tmp_path, stream_keep_alive=0.01) as stack:
        more = asyncio.Event()

        async def later(_request: Any) -> Any:
            await more.wait()

        stack.engine.respond = in_turn(streamed(EVENTS[0], then=later), failing(400))
        reader, writer = await stack.begin(chat("a", stream=True))
        async with asyncio.timeout(20):
            assert b"data" in await reader.readuntil(b": keep-alive\n\n")
        more.set()
        await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), 20)
        writer.close()
        await stack.settled()
        assert (await stack.chat("a", stream=True)).status == 400, "till then a status is still to be given"


async def test_other_doors(stack: Stack) -> None:
    models = (await stack.get("/v1/models")).json
    assert models == {"object": "list", "data": [{"id": MODEL, "root": MODEL}]}, "no folder of the engine's machine"
    version = (await stack.get("/version")).json
    assert version["engine"] == "0.0.1"
    assert version["version"]
    assert (await stack.get("/health/live")).json == {"status": "live"}
    assert (await stack.get("/health/ready")).json == {"status": "ready", "reasons": []}
    assert (await stack.get("/health")).status == 200


async def test_what_is_counted(stack: Stack) -> None:
    for body in (chat("a"), chat(image_part(A), image_part(B)), chat(image_part(A), stream=True), chat(image_part("x"))):
        await stack.post(body)
    await stack.get("/nowhere")
    counted = {
        "dvd_images_total": 3,
        "dvd_encodes_total": 2,
        'dvd_cache_events_total{event="hits",tier="sink"}': 1,
        'dvd_cache_events_total{event="misses",tier="sink"}': 2,
        "dvd_visual_tokens_total": 2 * tokens_of(A) + tokens_of(B),
        'dvd_tiles_total{resolution="full"}': 2,
        'dvd_tiles_total{resolution="compressed"}': 2,
        'dvd_requests_total{code="200",route="/v1/chat/completions"}': 3,
        'dvd_requests_total{code="400",route="/v1/chat/completions"}': 1,
        'dvd_requests_total{code="404",route="other"}': 1,
        f'dvd_worker_up{{address="{stack.vision.address}",kind="vision"}}': 1,
        f'dvd_worker_up{{address="{stack.sink.address}",kind="language"}}': 1,
        'dvd_stage_seconds_count{stage="receive"}': 4,
        'dvd_stage_seconds_count{stage="fetch"}': 3,
        'dvd_stage_seconds_count{stage="lookup"}': 2,
        'dvd_stage_seconds_count{stage="vision"}': 1,
        'dvd_stage_seconds_count{stage="engine"}': 3,
        'dvd_stage_seconds_count{stage="stream"}': 1,
        "dvd_time_to_engine_seconds_count": 3,
        "dvd_time_to_first_token_seconds_count": 1,
        "dvd_inter_token_seconds_count": 0,
        'dvd_request_seconds_count{route="/v1/chat/completions"}': 3,
        "dvd_image_tiles_count": 2,
        "dvd_image_tiles_sum": 4,
        "dvd_visual_tokens_saved_total": 3 * 192,
        'dvd_errors_total{code="invalid_request"}': 2,
    }
    await stack.settled()
    text = (await stack.get("/metrics")).body.decode().splitlines()
    found = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text if not line.startswith("#")}
    assert {name: found.get(name) for name in counted} == counted


async def test_what_vllm_says_of_itself(stack: Stack) -> None:
    whole = await stack.get("/metrics/engine/0")
    assert (whole.status, whole.body.decode()) == (200, METRICS)
    assert whole.headers["Content-Type"].startswith("text/plain")
    for name, value in (("requests_waiting", 8), ("requests_running", 5), ("kv_cache_usage", 0.5)):
        await stack.counts(f"dvd_engine_{name}", value)
    stack.engine.metrics = "vllm:num_requests_waiting 3\n"  # of another version: no half of it is shown
    await until(_gone(stack, "dvd_engine_requests_waiting{"), "nothing is shown of what is not known")
    await good(stack)
    await stack.languages[0].stop()
    assert (await stack.get("/metrics/engine/0")).status == 503


def _gone(stack: Stack, line: str) -> Callable[[], Awaitable[bool]]:
    async def gone() -> bool:
        return line not in (await stack.get("/metrics")).body.decode()

    return gone


@pytest.mark.parametrize("index", ["1", "-1", "x", "9" * 30, "%C2%B2", "0000000001", "0" * 5000])
async def test_a_language_worker_that_is_none_has_no_metrics(shared: Stack, index: str) -> None:
    refused = await shared.get(f"/metrics/engine/{index}")
    assert (refused.status, refused.error["code"]) == (400, "invalid_request")
    assert "numbered from 0 to 0" in refused.error["message"]


@pytest.mark.parametrize(
    ("body", "stages"),
    [
        (chat("a"), ["receive", "engine", "total"]),
        (chat("a", stream=True), ["receive", "engine", "total"]),
        (b"{", ["receive", "total"]),
        (chat(image_part("data:,")), ["receive", "fetch", "total"]),
    ],
    ids=["text", "stream", "no JSON", "no image"],
)
async def test_every_answer_says_where_its_time_went(shared: Stack, body: Any, stages: list[str]) -> None:
    said = (await shared.post(body)).headers["Server-Timing"]
    assert re.fullmatch(r"[a-z]+;dur=\d+\.\d(, [a-z]+;dur=\d+\.\d)*", said)
    assert [stage.partition(";")[0] for stage in said.split(", ")] == stages
    assert "total;dur=" in (await shared.get("/health/live")).headers["Server-Timing"]


async def test_what_ends_in_an_error_is_counted_by_its_code(stack: Stack) -> None:
    stack.engine.respond = in_turn(failing(500), failing(400), streamed(EVENTS[0], EVENTS[1], then=cut), hang)
    for body in (chat("a"), chat("a"), chat("a", stream=True), b"{"):
        await stack.post(body)
    _, writer = await stack.begin(chat("a"))
    await until(lambda: len(stack.engine.received) == 4, "the engine has it")
    writer.close()
    await stack.settled()
    for code, count in (("engine_error", 1), ("invalid_request", 2), ("unavailable", 1), ("client_gone", 1)):
        await stack.counts(f'dvd_errors_total{{code="{code}"', count)
    assert await stack.metric("dvd_errors_total") == 5
    assert await stack.metric("dvd_request_seconds_count") == 0, "none of them is a good answer"
    assert await stack.metric("dvd_stage_requests") == 0


async def test_each_request_is_a_line_in_the_log(stack: Stack, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "dvd.access")
    await stack.chat(image_part(A), image_part(B))
    await stack.chat(image_part(A), image_part(C))
    await stack.chat(image_part("data:,"))
    await stack.get("/nowhere/a-secret")
    await stack.get("/health/live")
    lines = [record.__dict__["fields"] for record in caplog.records if record.name == "dvd.access"]
    told = [{name: line.get(name) for name in ("route", "status", "images", "cache", "error")} for line in lines]
    route = "/v1/chat/completions"
    expected = [
        (route, 200, 2, "miss", None), (route, 200, 2, "part", None), (route, 400, None, None, "invalid_image"),
        ("other", 404, None, None, "invalid_request"), ("/health/live", 200, None, None, None),
    ]  # fmt: skip
    assert [tuple(line.values()) for line in told] == expected
    assert lines[0]["tokens"] == tokens_of(A) + tokens_of(B)
    levels = [record.levelname for record in caplog.records if record.name == "dvd.access"]
    assert levels == ["INFO"] * 4 + ["DEBUG"], "probes are no news"


# What is refused


def part(url: str) -> dict[str, Any]:
    return chat(image_part(url), "hello")


REFUSED: dict[str, tuple[Any, str]] = {
    "empty body": (b"", "invalid_request"),
    "no JSON": (b"hello", "invalid_request"),
    "array": (b"[]", "invalid_request"),
    "null": (b"null", "invalid_request"),
    "not UTF-8": (b'{"model": "\xff"}', "invalid_request"),
    "lone surrogate": (rb'{"model": "internvl", "messages": [{"role": "user", "content": "\ud800"}]}', "invalid_request"),
    "lone surrogate beside an image": (
        json.dumps(chat(image_part(A), "é"), ensure_ascii=False).replace("é", "é\\ud800").encode(), "invalid_request"
    ),
    "NaN": (json.dumps(chat("a", temperature=float("nan"))).encode(), "invalid_request"),
    "1e400": (json.dumps(chat("a")).encode()[:-1] + b', "seed": 1e400}', "invalid_request"),
    "deep": (b'{"a":' * 100_000, "invalid_request"),
    "deep model": (b'{"model": ' + b"[" * 900 + b"]" * 900 + b"}", "invalid_request"),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(100), "invalid_request"),
    "no messages": ({"model": MODEL}, "invalid_request"),
    "empty messages": ({"model": MODEL, "messages": []}, "invalid_request"),
    "part without type": (chat({"text": "a"}, "b"), "invalid_request"),
    "type is a list": (chat({"type": []}, "b"), "invalid_request"),
    "sound": (chat({"type": "audio_url", "audio_url": {"url": "https://example.org"}}, "b"), "invalid_request"),
    "key of another's image": (
        chat({"type": "image_embeds", "image_embeds": {"image_num_tokens": [1]}, "uuid": "a" * 64}, "b"), "invalid_request"
    ),
    "placeholder": (chat(image_part(A), text_part("<IMG_CONTEXT>")), "invalid_request"),
    "model is a number": ({**chat("a"), "model": 5}, "invalid_request"),
    "template": ({**chat("a"), "chat_template": "{{ 7 }}"}, "invalid_request"),
    "code": ({**chat("a"), "mm_processor_kwargs": {"code_revision": "main"}}, "invalid_request"),
    "router": (chat(image_part(A), vir={"mode": "on"}), "invalid_request"),
    "router for a text": (chat("a", vir="off"), "invalid_request"),
    "image as a string": (chat({"type": "image_url", "image_url": "https://example.org/a"}, "b"), "invalid_request"),
    "URL null": (chat({"type": "image_url", "image_url": {"url": None}}, "b"), "invalid_request"),
    "file": (part("file:///etc/passwd"), "invalid_request"),
    "http": (part("http://example.org/a.png"), "invalid_request"),
    "loopback": (part("https://127.0.0.1/a.png"), "invalid_request"),
    "decimal": (part("https://2130706433/a.png"), "invalid_request"),
    "metadata": (part("https://169.254.169.254/latest/meta-data"), "invalid_request"),
    "mapped": (part("https://[::ffff:127.0.0.1]/a.png"), "invalid_request"),
    "localhost": (part("https://localhost:1/a.png"), "invalid_request"),
    "data without base64": (part("data:image/png,AAAA"), "invalid_image"),
    "data empty": (part("data:image/png;base64,"), "invalid_image"),
    "data garbage": (part("data:image/png;base64,!!!!"), "invalid_image"),
    "no image": (part(inline(b"hello")), "invalid_image"),
    "only magic": (part(inline(b"\x89PNG\r\n\x1a\n")), "invalid_image"),
    "too many bytes": (part(inline(A + bytes(100_000))), "image_too_large"),
    "too many pixels": (part(inline(picture(0, (101, 100)))), "image_too_large"),
    "5 images": (chat(*[image_part(A)] * 5), "too_many_images"),
    "999 images": (chat(*[image_part(A)] * 999), "too_many_images"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "code"), REFUSED.values(), ids=REFUSED)
async def test_a_bad_request_is_refused_and_the_next_good_one_served(shared: Stack, body: Any, code: str) -> None:
    before = len(shared.engine.received)
    answer = await shared.post(body)
    assert answer.status == 400
    assert answer.error["code"] == code
    assert answer.error["type"] == "invalid_request_error"
    assert len(answer.body) < 1000
    assert len(shared.engine.received) == before
    await good(shared)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [(1 << 20) + 1, 3 << 19])
async def test_a_body_over_the_limit_is_refused(shared: Stack, size: int, chunked: bool) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b" " * (size // 2)
        yield b" " * (size - size // 2)

    answer = await shared.request("POST", "/v1/chat/completions", data=pieces() if chunked else b" " * size)
    assert (answer.status, answer.error["code"]) == (413, "body_too_large")
    await good(shared)


async def test_a_body_without_end_is_not_read_for_ever(shared: Stack) -> None:
    reader, writer = await shared.raw("POST /v1/chat/completions HTTP/1.1\nHost: a\nTransfer-Encoding: chunked\n\n")
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(20):
            while not reader.at_eof() and not writer.is_closing():
                writer.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
                await writer.drain()
                if reader._buffer:  # type: ignore[attr-defined]  # it may answer and go on listening
                    assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")
                    break
    writer.transport.abort()
    await good(shared)


async def test_a_body_just_within_the_limit_is_served(shared: Stack) -> None:
    body = json.dumps(chat("a")).encode()
    assert (await shared.post(body + b" " * ((1 << 20) - len(body)))).status == 200


@pytest.mark.parametrize("kind", ["text/plain", "", "multipart/form-data; boundary=x", "application/json; charset=latin-1"])
async def test_the_type_of_the_body_is_not_asked_for(shared: Stack, kind: str) -> None:
    assert (await shared.post(chat("a"), {"Content-Type": kind})).status == 200


@pytest.mark.parametrize("model", ["", "../internvl", "internvl ", "Internvl", "x" * 100_000, "a\u0000b", "é"])
async def test_an_unknown_model_is_refused_before_any_work(stack: Stack, model: str) -> None:
    for content in (["hello"], [image_part(A)]):
        answer = await stack.post({**chat(*content), "model": model})
        assert answer.status == 404
        assert (answer.error["code"], answer.error["param"]) == ("model_not_found", "model")
        assert len(answer.body) < 3000
    assert stack.vision.calls == []
    assert stack.engine.received == []


async def test_a_model_that_the_engine_has_just_learnt_is_found(stack: Stack) -> None:
    stack.engine.models = {"data": [{"id": MODEL}, {"id": "adapter"}]}
    assert (await stack.post({**chat("a"), "model": "adapter"})).status == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404), ("GET", "/v1", 404), ("POST", "//v1/chat/completions", 404), ("POST", "/v1/chat/completions/", 404),
        ("POST", "/V1/chat/completions", 404), ("POST", "/v1/embeddings", 404), ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404), ("POST", "/v1/load_lora_adapter", 404), ("GET", "/" + "x" * 5000, 404),
        ("GET", "/v1/chat/completions", 405), ("PUT", "/v1/chat/completions", 405), ("DELETE", "/v1/models", 405),
        ("OPTIONS", "/v1/chat/completions", 405), ("POST", "/metrics", 405), ("PATCH", "/health/live", 405),
    ],
)  # fmt: skip
async def test_other_paths_and_methods(shared: Stack, method: str, path: str, status: int) -> None:
    answer = await shared.request(method, path, headers={"Origin": "https://evil.example"})
    assert answer.status == status
    assert answer.error["type"] == "invalid_request_error"
    assert len(answer.body) < 1000
    assert answer.headers["X-Request-Id"]
    assert "Access-Control-Allow-Origin" not in answer.headers


async def reply(reader: asyncio.StreamReader) -> bytes:
    """All that comes before the gateway closes."""
    async with asyncio.timeout(20):
        return await reader.read()


@pytest.mark.parametrize("path", ["/v1/%2e%2e/metrics", "/v1/../metrics", "/metrics%00", "/%ff", "/v1/models%2f"])
async def test_paths_that_are_another_way_to_write_one(shared: Stack, path: str) -> None:
    reader, writer = await shared.raw(f"GET {path} HTTP/1.1\nHost: a\nConnection: close\n\n")
    assert (await reply(reader)).startswith(b"HTTP/1.1 404 ")
    writer.close()


HEADERS = {
    "two lengths": "Host: a\nContent-Length: 5\nContent-Length: 6\n",
    "negative length": "Host: a\nContent-Length: -5\n",
    "length is no number": "Host: a\nContent-Length: five\n",
    "length and chunks": "Host: a\nContent-Length: 5\nTransfer-Encoding: gzip, chunked\n",
    "unknown transfer": "Host: a\nTransfer-Encoding: gzip\n",
    "two hosts": "Host: a\nHost: b\n",
    "no host": "",
    "space before colon": "Host : a\n",
    "endless header": "Host: a\nX: " + "x" * 200_000 + "\n",
    "folded": "Host: a\nX-Request-Id: a\n b\n",
}


@pytest.mark.parametrize("headers", HEADERS.values(), ids=HEADERS)
async def test_a_bad_head_ends_the_connection_and_nothing_else(shared: Stack, headers: str) -> None:
    before = len(shared.engine.received)
    reader, writer = await shared.raw(f"POST /v1/chat/completions HTTP/1.1\n{headers}Connection: close\n\n", b"{}")
    try:
        first = (await reply(reader)).split(b"\r\n")[0]
        assert first == b"" or first.split()[1].startswith(b"4") or first.split()[1] == b"501"
    except ConnectionResetError:
        pass
    writer.close()
    assert len(shared.engine.received) == before
    await good(shared)


@pytest.mark.parametrize("host", ["a/v1/load_lora_adapter?x=", "a/?x=", "a#", "", "a b", "[", "a@b/metrics?", "a/../../sleep?"])
async def test_the_host_does_not_decide_which_path_the_engine_is_asked_for(shared: Stack, host: str) -> None:
    before = len(shared.engine.received)
    body = json.dumps(chat("a")).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\nHost: {host}\nContent-Length: {len(body)}\nConnection: close\n\n"
    reader, writer = await shared.raw(head, body)
    first = (await reply(reader)).split(b"\r\n")[0]
    writer.close()
    assert first.split()[1] in (b"200", b"400")
    assert {received.path for received in shared.engine.received[before:]} <= {"/v1/chat/completions"}
    await good(shared)


async def test_two_requests_in_one_go_are_both_answered_in_order(shared: Stack) -> None:
    body = json.dumps(chat("a")).encode()
    one = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nX-Request-Id: one\r\nContent-Length: {len(body)}\r\n\r\n"
    two = "GET /health/live HTTP/1.1\r\nHost: a\r\nX-Request-Id: two\r\nConnection: close\r\n\r\n"
    reader, writer = await shared.raw("", one.encode() + body + two.encode())
    said = await reply(reader)
    writer.close()
    assert said.count(b"HTTP/1.1 200 ") == 2
    assert said.index(b"x-request-id: one") < said.index(b"x-request-id: two")


# Who asks


@pytest.mark.parametrize("name", ["abc", "A.b_c-9", "x" * 128])
async def test_the_id_of_a_request_goes_with_it(shared: Stack, name: str) -> None:
    answer = await shared.chat("a", headers={"X-Request-Id": name})
    assert answer.headers["X-Request-Id"] == name
    assert shared.engine.received[-1].headers["X-Request-Id"] == name


@pytest.mark.parametrize("name", ["", "x" * 129, "x" * 60_000, "a b", "a\tb", "a;b", "é", "../a", "a/b", "\xff", "<script>"])
async def test_an_id_that_is_none_is_replaced(shared: Stack, name: str) -> None:
    reader, writer = await shared.raw(f"GET /health/live HTTP/1.1\nHost: a\nX-Request-Id: {name}\nConnection: close\n\n")
    said = await reply(reader)
    writer.close()
    assert said.startswith(b"HTTP/1.1 200 ")
    (given,) = [line.split(b": ")[1] for line in said.split(b"\r\n") if line.lower().startswith(b"x-request-id: ")]
    assert len(given) == 32
    assert given.isalnum()


async def test_an_id_may_come_twice(shared: Stack) -> None:
    answers = await asyncio.gather(*(shared.chat("a", headers={"X-Request-Id": "same"}) for _ in range(5)))
    assert {(answer.status, answer.headers["X-Request-Id"]) for answer in answers} == {(200, "same")}


async def test_a_key_is_needed_where_there_is_one(tmp_path: Path) -> None:
    async with serve(tmp_path, api_key="sesame-1") as stack:
        wrong = ["", "sesame-1", "Bearer", "Bearer ", "Bearer sesame-2", "Bearer sesame-", "Bearer sesame-11", "Basic sesame-1"]
        wrong += ["Bearer SESAME-1", "Bearer sesame-1, sesame-1", "Bearer s\xe9same-1", "Bearer sesame-1 x"]
        for said in wrong:
            for method, path in (("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("GET", "/v1/models")):
                answer = await stack.request(method, path, data=b"{", headers={"Authorization": said})
                assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
                assert answer.error["type"] == "authentication_error"
                assert "sesame-1" not in answer.error["message"]
        assert (await stack.post(chat("a"))).status == 401
        for said in ("Bearer sesame-1", "bearer sesame-1", "BEARER  sesame-1 "):
            assert (await stack.chat("a", headers={"Authorization": said})).status == 200
        assert "Authorization" not in stack.engine.received[-1].headers
        for path in ("/health/live", "/health/ready", "/version", "/metrics"):
            assert (await stack.get(path)).status == 200


async def test_callers_share_no_embedding(stack: Stack) -> None:
    for said in ("Bearer a", "Bearer b", "Bearer a", None):
        headers = {"Authorization": said} if said else {}
        assert (await stack.chat(image_part(A), headers=headers)).status == 200
    keys = [received.json["messages"][0]["content"][0]["uuid"] for received in stack.engine.received]
    assert keys[0] == keys[2]
    assert len(set(keys)) == len(stack.vision.calls) == 3


# Limits of number and of time


async def test_a_request_too_many_is_refused_at_once(tmp_path: Path) -> None:
    async with serve(tmp_path, max_in_flight=2) as stack:
        stack.engine.respond = hang
        held = [await stack.begin(chat("a")) for _ in range(2)]
        await until(lambda: len(stack.engine.received) == 2, "both are with the engine")
        answer = await stack.chat("a")
        assert (answer.status, answer.error["code"]) == (429, "overloaded")
        assert answer.error["type"] == "rate_limit_error"
        assert int(answer.headers["Retry-After"]) >= 1
        assert (await stack.get("/health/ready")).status == 200, "other doors stay open"
        for _, writer in held:
            writer.close()
        await stack.settled()
        stack.engine.respond = usual
        await good(stack)


@pytest.mark.parametrize("said", ["0", "-1", "abc", "", "1e3", "inf", "nan", "0.0", "1,5", "9" * 20, "0x1", " 1 2"])
async def test_a_timeout_that_is_none_is_refused(shared: Stack, said: str) -> None:
    answer = await shared.chat("a", headers={"X-Request-Timeout": said})
    assert (answer.status, answer.error["code"]) == (400, "invalid_request")


async def timed_out(stack: Stack, answer: Answer) -> None:
    assert (answer.status, answer.error["code"]) == (504, "deadline_exceeded")
    assert answer.headers["X-Should-Retry"] == "false", "another try would take as long"
    await stack.settled()


async def test_time_is_up_in_the_vision_worker(stack: Stack) -> None:
    stack.vision.free.clear()
    await timed_out(stack, await stack.chat(image_part(A), headers={"X-Request-Timeout": "1"}))
    await until(lambda: stack.vision.cancelled == len(stack.vision.calls) == 1, "the encode is cancelled")
    assert stack.engine.received == []
    stack.vision.free.set()
    await good(stack)


@pytest.mark.parametrize("stream", [False, True])
async def test_time_is_up_in_the_engine(stack: Stack, stream: bool) -> None:
    stack.engine.respond = hang
    await timed_out(stack, await stack.chat("a", stream=stream, headers={"X-Request-Timeout": "1"}))
    await until(lambda: stack.engine.left == 1, "the engine's request is cancelled")
    stack.engine.respond = usual
    await good(stack)


async def test_time_is_up_in_the_middle_of_an_answer(stack: Stack) -> None:
    stack.engine.respond = half_then_hang
    await timed_out(stack, await stack.chat("a", headers={"X-Request-Timeout": "1"}))
    await until(lambda: stack.engine.left == 1, "the engine's request is cancelled")


async def half_then_hang(request: Any) -> Any:
    answer = web.StreamResponse(headers={"Content-Type": "application/json"})
    await answer.prepare(request)
    await answer.write(b'{"id": ')
    return await hang(request)


async def test_time_is_up_in_the_middle_of_a_stream(stack: Stack) -> None:
    stack.engine.respond = streamed(*EVENTS[:2], then=hang)
    answer = await stack.chat("a", stream=True, headers={"X-Request-Timeout": "2"})
    assert answer.status == 200
    *events, error, done, end = answer.body.split(b"\n\n")
    assert [event + b"\n\n" for event in events] == EVENTS[:2]
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "deadline_exceeded"
    assert (done, end) == (b"data: [DONE]", b"")
    await until(lambda: stack.engine.left == 1, "the engine's request is cancelled")
    await stack.settled()


async def test_time_is_up_while_an_image_is_fetched(stack: Stack) -> None:
    async with files(a=hang) as url:
        await timed_out(stack, await stack.chat(image_part(f"{url}/a"), headers={"X-Request-Timeout": "0.3"}))


async def test_time_is_up_before_the_body_is_whole(stack: Stack) -> None:
    head = "POST /v1/chat/completions HTTP/1.1\nHost: a\nX-Request-Timeout: 0.3\nContent-Length: 1000\n\n"
    reader, writer = await stack.raw(head, b"{")
    async with asyncio.timeout(20):
        assert (await reader.readline()).startswith(b"HTTP/1.1 504 ")
    writer.close()
    await stack.settled()


async def test_a_caller_may_not_have_more_time_than_the_server_gives(tmp_path: Path) -> None:
    async with serve(tmp_path, request_timeout=0.5) as stack:
        stack.engine.respond = hang
        await timed_out(stack, await stack.chat("a", headers={"X-Request-Timeout": "900"}))
        await timed_out(stack, await stack.chat("a"))


# Callers who leave

Leave = Callable[[asyncio.StreamWriter], Awaitable[None]]


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()


async def _reset(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


@pytest.fixture(params=[_close, _reset], ids=["close", "reset"])
def leave(request: pytest.FixtureRequest) -> Leave:
    return request.param  # type: ignore[no-any-return]


async def test_leaving_before_the_body_is_whole(stack: Stack, leave: Leave) -> None:
    _, writer = await stack.raw("POST /v1/chat/completions HTTP/1.1\nHost: a\nContent-Length: 1000\n\n", b"{")
    await stack.counts("dvd_requests_in_flight", 1)
    await leave(writer)
    await stack.settled()
    await good(stack)


async def test_leaving_in_fetch(stack: Stack, leave: Leave) -> None:
    asked, left = asyncio.Event(), asyncio.Event()

    async def slow(request: Any) -> Any:
        asked.set()
        try:
            return await hang(request)
        except asyncio.CancelledError:
            left.set()
            raise

    async with files(a=slow) as url:
        _, writer = await stack.begin(chat(image_part(f"{url}/a")))
        await asyncio.wait_for(asked.wait(), 20)
        await leave(writer)
        await asyncio.wait_for(left.wait(), 20)
        await stack.settled()
    await good(stack)


async def test_leaving_in_encode(stack: Stack, leave: Leave) -> None:
    stack.vision.free.clear()
    _, writer = await stack.begin(chat(image_part(A)))
    await until(lambda: stack.vision.calls, "it encodes")
    await leave(writer)
    await until(lambda: stack.vision.cancelled == 1, "the encode is cancelled")
    await stack.settled()
    stack.vision.free.set()
    await good(stack)


@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_before_the_answer(stack: Stack, leave: Leave, stream: bool) -> None:
    stack.engine.respond = hang
    _, writer = await stack.begin(chat(image_part(A), stream=stream))
    await until(lambda: stack.engine.received, "the engine computes")
    await leave(writer)
    await until(lambda: stack.engine.left == 1, "the engine's request is cancelled")
    await stack.settled()
    stack.engine.respond = usual
    await good(stack)


async def test_leaving_in_the_middle_of_a_stream(stack: Stack, leave: Leave) -> None:
    stack.engine.respond = streamed(*EVENTS[:2], then=hang)
    reader, writer = await stack.begin(chat(image_part(A), stream=True))
    await asyncio.wait_for(reader.readuntil(EVENTS[0].strip()), 20)
    await leave(writer)
    await until(lambda: stack.engine.left == 1, "the engine's request is cancelled")
    await stack.settled()
    stack.engine.respond = usual
    await good(stack)


async def test_two_hundred_leave_and_nothing_is_left(tmp_path: Path) -> None:
    async with serve(tmp_path, max_in_flight=20) as stack:
        for i in range(10):
            stack.vision.free.clear()
            stack.engine.respond = hang
            held = [await stack.begin(chat(image_part(picture(i))) if j % 2 else chat("a", stream=True)) for j in range(20)]
            await until(lambda n=i: len(stack.vision.calls) > n, "they are served")
            for _, writer in held:
                writer.close()
            await stack.settled()
        await until(lambda: stack.vision.cancelled == len(stack.vision.calls), "no encode goes on")
        stack.vision.free.set()
        stack.engine.respond = usual
        await good(stack)


# Equal images


async def test_a_hundred_equal_images_at_once_are_encoded_once(stack: Stack) -> None:
    stack.vision.free.clear()
    asking = [asyncio.create_task(stack.chat(image_part(A), text_part(str(i)))) for i in range(100)]
    await stack.counts("dvd_encodes_joined_total", 99)
    stack.vision.free.set()
    assert {answer.status for answer in await asyncio.gather(*asking)} == {200}
    assert len(stack.vision.calls) == 1
    assert len(stack.engine.received) == 100
    for _ in range(3):
        assert (await stack.chat(image_part(A))).headers["X-DvD-Images"].endswith("reused=1; shared=0; encoded=0")
    assert len(stack.vision.calls) == 1, "nor ever again"


@pytest.mark.parametrize("who", [0, 1, 2])
async def test_one_who_leaves_does_not_take_the_encode_from_the_others(stack: Stack, who: int) -> None:
    stack.vision.free.clear()
    held = []
    for i in range(3):
        held.append(await stack.begin(chat(image_part(A)), "Connection: close\n"))
        await until(lambda: stack.vision.calls, "the first one encodes")
        await stack.counts("dvd_encodes_joined_total", i)
    held[who][1].close()
    await stack.counts("dvd_requests_in_flight", 2)
    assert stack.vision.cancelled == 0
    stack.vision.free.set()
    for i, (reader, writer) in enumerate(held):
        if i != who:
            assert (await reply(reader)).startswith(b"HTTP/1.1 200 ")
            writer.close()
    assert len(stack.vision.calls) == 1


async def test_a_shorter_deadline_is_its_owners_own(stack: Stack) -> None:
    stack.vision.free.clear()
    short = asyncio.create_task(stack.chat(image_part(A), headers={"X-Request-Timeout": "1.5"}))
    await until(lambda: stack.vision.calls, "it encodes")
    other = asyncio.create_task(stack.chat(image_part(A)))
    answer = await short
    assert answer.status == 504
    stack.vision.free.set()
    assert (await other).status == 200


# Embeddings that are lost


async def test_a_lost_embedding_is_encoded_again_once(stack: Stack) -> None:
    for stream, failure in ((False, failing(500)), (True, failing(500)), (True, streamed(EVENT_OF_ERROR, b"data: [DONE]\n\n"))):
        stack.sink.rows.clear()
        before = len(stack.vision.calls)

        async def lose(request: Any, fail: Any = failure) -> Any:
            stack.sink.rows.clear()
            return await fail(request)

        stack.engine.respond = in_turn(lose, usual)
        answer = await stack.chat(image_part(A), stream=stream)
        assert (answer.status, answer.body) == (200, b"".join(EVENTS) if stream else COMPLETION)
        assert len(stack.vision.calls) == before + 2
    await stack.settled()


EVENT_OF_ERROR = b'data: {"error": {"message": "/root/model.py failed", "type": "X", "param": null, "code": 500}}\n\n'


async def test_an_embedding_lost_twice_is_an_error(stack: Stack) -> None:
    async def lose(request: Any) -> Any:
        stack.sink.rows.clear()
        return await failing(500)(request)

    stack.engine.respond = lose
    answer = await stack.chat(image_part(A))
    assert (answer.status, answer.error["code"]) == (500, "engine_error")
    assert len(stack.engine.received) == 2
    await stack.settled()


# WorkerPools that fail


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("respond", "status", "code"),
    [
        (failing(500), 500, "engine_error"),
        (failing(503), 503, "engine_error"),
        (sends(b"Internal Server Error in /root/model.py", 500), 500, "engine_error"),
        (streamed(EVENT_OF_ERROR, b"data: [DONE]\n\n"), 500, "engine_error"),
        (streamed(EVENTS[0] + EVENT_OF_ERROR), 500, "engine_error"),
    ],
    ids=["500", "503", "no JSON", "first event", "second event"],
)
async def test_an_engine_that_fails_says_nothing_of_its_inside(
    stack: Stack, respond: Any, status: int, code: str, stream: bool
) -> None:
    stack.engine.respond = respond
    for content in (["a"], [image_part(A)]):
        answer = await stack.chat(*content, stream=stream)
        assert (answer.status, answer.error["code"], answer.error["type"]) == (status, code, "server_error")
        assert answer.error["message"] == ENGINE_ERROR_MESSAGE
    assert len(stack.engine.received) == 2, "what would fail again is not tried again"
    assert len(stack.vision.calls) == 1
    stack.engine.respond = usual
    await good(stack)


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "invalid_request", "invalid_request_error"),
        (401, "invalid_api_key", "authentication_error"),
        (404, "model_not_found", "invalid_request_error"),
        (422, "invalid_request", "invalid_request_error"),
        (429, "overloaded", "rate_limit_error"),
    ],
)
async def test_what_the_engine_refuses_comes_back_in_openais_shape(stack: Stack, status: int, code: str, kind: str) -> None:
    stack.engine.respond = failing(status, "temperature must be at least 0, got -1", param="temperature")
    answer = await stack.chat(image_part(A), temperature=-1)
    assert answer.status == status
    assert answer.error == {
        "message": "temperature must be at least 0, got -1", "type": kind, "param": "temperature", "code": code
    }  # fmt: skip
    assert len(stack.engine.received) == 1


async def test_a_prompt_too_long_has_a_code_of_its_own(stack: Stack) -> None:
    stack.engine.respond = failing(400, "This model's maximum context length is 4096 tokens.")
    assert (await stack.chat("a")).error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("ending", [cut, hang])
async def test_a_stream_that_breaks_ends_with_an_error(stack: Stack, ending: Any) -> None:
    stack.engine.respond = streamed(*EVENTS[:2], b'data: {"n": ', then=ending)
    reader, writer = await stack.begin(chat(image_part(A), stream=True), "Connection: close\n")
    await asyncio.wait_for(reader.readuntil(EVENTS[1].strip()), 20)
    if ending is hang:
        await stack.engine.stop()
    said = await reply(reader)
    writer.close()
    error = said[said.index(b'data: {"error"') :]
    assert json.loads(error.split(b"\n\n")[0].removeprefix(b"data: "))["error"]["code"] == "unavailable"
    assert b"data: [DONE]\n\n" in error
    assert said.rstrip().endswith(b"0"), "whole, as HTTP sees it"
    await stack.settled()


async def test_an_error_late_in_a_stream_is_passed_in_openais_shape(stack: Stack) -> None:
    stack.engine.respond = streamed(EVENTS[0] + EVENTS[1], EVENT_OF_ERROR, b"data: [DONE]\n\n")
    answer = await stack.chat("a", stream=True)
    assert answer.body.startswith(EVENTS[0] + EVENTS[1])
    assert answer.body.endswith(b"\n\ndata: [DONE]\n\n")
    assert b"engine_error" in answer.body
    assert b"/root" not in answer.body


@pytest.mark.parametrize("respond", [cut, half_a_body, streamed(then=cut)], ids=["no head", "half a body", "no event"])
async def test_an_engine_that_breaks_off_before_its_answer(stack: Stack, respond: Any) -> None:
    stack.engine.respond = respond
    answer = await stack.chat(image_part(A), stream=True)
    assert (answer.status, answer.error["code"]) == (503, "unavailable")
    assert int(answer.headers["Retry-After"]) >= 1
    stack.engine.respond = usual
    assert (await stack.get("/health/ready")).status == 200
    await good(stack)


async def test_an_error_that_breaks_off_is_still_an_error(stack: Stack) -> None:
    async def broken(request: Any) -> Any:
        answer = web.StreamResponse(status=500, headers={"Content-Length": "1000"})
        await answer.prepare(request)
        await answer.write(b"{")
        return await cut(request)

    stack.engine.respond = broken
    answer = await stack.chat("a")
    assert (answer.status, answer.error["code"]) == (503, "unavailable")


@pytest.mark.parametrize("error", errors.all_errors(), ids=lambda error: error.__name__)
async def test_what_the_vision_worker_raises_reaches_the_caller(shared: Stack, error: type[errors.DvdError]) -> None:
    shared.vision.error = error("image 3 cannot be read")
    try:
        answer = await shared.chat(image_part(picture(200)))
    finally:
        shared.vision.error = None
    assert answer.status == error.status
    assert answer.error["code"] == error.code
    assert ("Retry-After" in answer.headers) == (error.status in (429, 503))
    assert (await shared.get("/health/ready")).status == 200
    await good(shared)


async def test_a_bug_in_the_vision_worker_shows_nothing(stack: Stack) -> None:
    stack.vision.error = KeyError("/root/secret")
    answer = await stack.chat(image_part(A))
    assert answer.status == 500
    assert b"secret" not in answer.body
    assert b"unix:" not in answer.body
    stack.vision.error = None
    await good(stack)


async def test_one_bad_image_ends_the_work_on_the_others(stack: Stack) -> None:
    stack.vision.free.clear()
    answer = await stack.chat(image_part(A), image_part("data:image/png;base64,AAAA"))
    assert answer.error["code"] == "invalid_image"
    await stack.settled()
    assert stack.vision.calls == []


async def test_without_a_vision_worker_images_wait_and_text_is_served(stack: Stack) -> None:
    await stack.vision.stop()
    for _ in range(2):
        answer = await stack.chat(image_part(A))
        assert (answer.status, answer.error["code"]) == (503, "unavailable")
        assert int(answer.headers["Retry-After"]) >= 1
        assert (await stack.chat("a")).status == 200
    ready = await stack.get("/health/ready")
    assert ready.status == 503
    assert ready.json == {"status": "not ready", "reasons": ["no vision worker answers"]}
    await stack.vision.start()
    await stack.ready()
    await good(stack)


async def test_an_embedding_that_is_there_needs_no_vision_worker(stack: Stack) -> None:
    await good(stack)
    await stack.vision.stop()
    assert (await stack.chat(image_part(A))).status == 200


async def test_without_a_language_worker_nothing_is_served(stack: Stack) -> None:
    await stack.languages[0].stop()
    for content in (["a"], [image_part(A)]):
        answer = await stack.chat(*content)
        assert (answer.status, answer.error["code"]) == (503, "unavailable")
        assert int(answer.headers["Retry-After"]) >= 1
        assert b"unix:" not in answer.body
    assert (await stack.get("/v1/models")).status == 503
    assert (await stack.get("/health/live")).status == 200
    assert (await stack.get("/health/ready")).json["reasons"] == ["no language worker answers"]
    assert (await stack.get("/version")).json["engine"] is None
    await stack.languages[0].start()
    await stack.ready()
    await good(stack)


async def test_the_other_vision_worker_takes_over(tmp_path: Path) -> None:
    async with serve(tmp_path, vision=2) as stack:
        for i in range(20):
            assert (await stack.chat(image_part(picture(i)))).status == 200
        first, second = stack.visions
        assert first.calls
        assert second.calls
        await first.stop()
        before = len(first.calls)
        for i in range(20, 40):
            assert (await stack.chat(image_part(picture(i)))).status == 200
        assert len(first.calls) == before
        await second.stop()
        answer = await stack.chat(image_part(picture(40)))
        assert answer.status == 503
        assert answer.headers["Retry-After"]
        await first.start()
        await stack.ready()
        assert (await stack.chat(image_part(picture(40)))).status == 200


@pytest.mark.parametrize("which", ["worker", "engine", "sink"])
async def test_the_other_language_worker_takes_over(tmp_path: Path, which: str) -> None:
    async with serve(tmp_path, language=2) as stack:
        for i in range(20):
            assert (await stack.chat(image_part(picture(i)))).status == 200
        first, second = stack.languages
        assert first.engine.received
        assert second.engine.received
        assert {call.deliver_to for call in stack.vision.calls} == {first.sink.address, second.sink.address}
        peer: Any = {"worker": first, "engine": first.engine, "sink": first.sink}[which]
        await peer.stop()
        for i in range(20):
            assert (await stack.chat(image_part(picture(i)))).status == 200
            assert (await stack.chat("a")).status == 200
        assert set(second.sink.rows) == {part["uuid"] for r in second.engine.received for part in embeds(r.json)}
        await stack.settled()


def embeds(body: Any) -> list[Any]:
    content = body["messages"][0]["content"]
    return [part for part in content if part["type"] == "image_embeds"] if isinstance(content, list) else []


@pytest.mark.parametrize("respond", [cut, half_a_body, streamed(then=cut)], ids=["no head", "half a body", "no event"])
async def test_an_engine_that_breaks_off_is_replaced_by_the_other(tmp_path: Path, respond: Any) -> None:
    async with serve(tmp_path, language=2) as stack:
        stack.languages[0].engine.respond = respond
        for i in range(10):
            assert (await stack.chat(image_part(picture(i)))).status == 200
            await stack.ready()
        assert stack.languages[0].engine.received


async def test_a_model_that_one_worker_has_is_asked_of_that_one(tmp_path: Path) -> None:
    async with serve(tmp_path, language=2) as stack:
        stack.languages[1].engine.models = {"data": [{"id": MODEL}, {"id": "adapter"}]}
        for i in range(10):
            assert (await stack.post({**chat(image_part(picture(i))), "model": "adapter"})).status == 200
            assert (await stack.post({**chat("a"), "model": "adapter"})).status == 200
        assert stack.languages[0].engine.received == []


async def test_workers_of_different_checkpoints_do_not_work_together(stack: Stack) -> None:
    stack.vision.checkpoint = described(fingerprint="e" * 64)
    ready = await stack.get("/health/ready")
    assert ready.status == 503
    (reason,) = ready.json["reasons"]
    assert "e" * 64 in reason
    assert "f" * 64 in reason
    assert f"(vision worker {stack.vision.address})" in reason
    assert f"(language worker {stack.sink.address})" in reason
    answer = await stack.chat(image_part(A))
    assert (answer.status, answer.error["code"]) == (503, "checkpoint_mismatch")
    assert "e" * 64 in answer.error["message"]
    assert "f" * 64 in answer.error["message"]
    assert b"unix:" not in answer.body
    assert (await stack.chat("a")).status == 200
    assert stack.vision.calls == []
    stack.vision.checkpoint = described()
    await stack.ready()
    await good(stack)


async def test_a_language_model_of_an_unknown_dtype_is_not_the_callers_fault(stack: Stack) -> None:
    stack.sink.dtype = 9
    ready = await stack.get("/health/ready")
    (reason,) = ready.json["reasons"]
    assert (ready.status, "dtype number 9" in reason, stack.sink.address in reason) == (503, True, True)
    answer = await stack.chat(image_part(A))
    assert (answer.status, answer.error["code"]) == (503, "checkpoint_mismatch")
    assert (await stack.chat("a")).status == 200
    stack.sink.dtype = 3
    await stack.ready()
    await good(stack)


@pytest.mark.parametrize(
    ("which", "reason"), [("vision", "no vision worker answers"), ("sink", "no language worker answers"),
                          ("engine", "no language worker answers")]
)  # fmt: skip
async def test_a_worker_that_hangs_is_not_ready(stack: Stack, which: str, reason: str) -> None:
    peer: Any = getattr(stack, which)
    peer.answers.clear()
    ready = await stack.get("/health/ready")
    assert (ready.status, ready.json["reasons"]) == (503, [reason])
    peer.answers.set()
    await stack.ready()
    await good(stack)


async def test_an_answer_that_is_no_json_passes(stack: Stack) -> None:
    stack.engine.respond = sends(b"\xff\x00 not JSON", Content_Type="application/json")
    answer = await stack.chat("a")
    assert (answer.status, answer.body) == (200, b"\xff\x00 not JSON")


async def test_a_large_image_travels_whole(stack: Stack) -> None:
    data = A + bytes(8 << 20)
    assert (await stack.chat(image_part(data))).status == 200
    assert stack.vision.images == [data]


async def test_a_large_answer_travels_whole(stack: Stack) -> None:
    body = b'{"logprobs": "' + base64.b64encode(bytes(3 << 20)) + b'"}'
    stack.engine.respond = sends(body, Content_Type="application/json")
    assert (await stack.chat("a")).body == body
    event = b"data: " + body + b"\n\n"
    stack.engine.respond = streamed(event, event)
    assert (await stack.chat("a", stream=True)).body == event * 2
