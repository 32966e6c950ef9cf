"""More images than the vision workers can encode, callers beside each other, and workers that fail or do not belong."""

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.server.fakes.file_server import file_server
from tests.server.fakes.handlers import event_stream, respond_with
from tests.server.fakes.language_worker import FakeLanguageWorker
from tests.server.fakes.requests import chat, image_file, image_part
from tests.server.fakes.stack import Response, Stack, start_stack
from tests.server.fakes.vision_worker import FakeVisionWorker, checkpoint_description
from tests.server.fakes.vllm import EVENTS
from tests.server.fakes.waiting import wait_until
from tests.server.gateway.helpers import A

SPEED = {"batch_tiles": 1, "tiles_per_second": 20.0}
"""A vision worker that encodes a tile in 50 ms."""


@pytest.fixture
def vision(tmp_path: Path) -> FakeVisionWorker:
    worker = FakeVisionWorker(f"unix:{tmp_path}/vision")
    worker.description = dict(SPEED)
    worker.delay = 0.05
    return worker


async def send_images(stack: Stack, numbers: range, **headers: str) -> list[Response]:
    """Sends a request for each number, all at once, and returns the responses."""
    requests = (stack.chat(image_part(image_file(number)), headers=dict(headers)) for number in numbers)
    return list(await asyncio.gather(*requests))


def statuses(responses: list[Response]) -> Counter[int]:
    return Counter(response.status for response in responses)


async def test_a_burst_is_served_up_to_the_bound_and_the_rest_is_refused_with_a_time(
    tmp_path: Path, vision: FakeVisionWorker
) -> None:
    async with start_stack(tmp_path, [vision], max_queue_seconds=2.0) as stack:
        responses = await send_images(stack, range(90))
        served = statuses(responses)[200]
        assert statuses(responses) == {200: served, 429: 90 - served}
        assert 5 <= served <= 60, "about 40 tiles are 2 s of work, fewer if the machine is busy"
        refused = [response for response in responses if response.status == 429]
        assert all(response.error["code"] == "overloaded" for response in refused)
        assert all(int(response.headers["Retry-After"]) >= 1 for response in refused)
        assert len(vision.calls) == served, "no work is done for what is refused"
        assert await stack.metric('dvd_requests_refused_total{resource="vision"}') == 90 - served
        assert await stack.metric("dvd_queue_tiles") == 0
        assert (await stack.chat(image_part(A))).status == 200


async def test_text_is_served_while_images_wait(tmp_path: Path, vision: FakeVisionWorker) -> None:
    async with start_stack(tmp_path, [vision], max_queue_seconds=60.0, max_in_flight=10) as stack:
        vision.may_encode.clear()
        images = asyncio.create_task(send_images(stack, range(15)))
        await wait_until(lambda: vision.calls, "an image is sent")
        await stack.wait_for_metric("dvd_requests_refused_total", 6)
        texts = [await stack.chat("hello") for _ in range(20)]
        assert statuses(texts) == {200: 20}
        vision.may_encode.set()
        assert statuses(await images) == {200: 9, 429: 6}, "one permit is kept for other callers"


async def test_the_deadline_reaches_the_vision_worker(stack: Stack) -> None:
    await stack.chat(image_part(A), headers={"X-Request-Timeout": "7"})
    assert 0 < stack.vision.deadlines[-1] <= 7


async def test_a_caller_with_much_to_do_does_not_delay_another(tmp_path: Path, vision: FakeVisionWorker) -> None:
    async with start_stack(tmp_path, [vision], max_queue_seconds=60.0, trusted_proxies=["127.0.0.1"]) as stack:
        many = asyncio.create_task(send_images(stack, range(60), **{"X-Forwarded-For": "203.0.113.1"}))
        await wait_until(lambda: len(vision.calls) > 2, "images are being encoded")
        before = len(vision.calls)
        (one,) = await send_images(stack, range(100, 101), **{"X-Forwarded-For": "203.0.113.2"})
        assert one.status == 200
        callers = [call.caller for call in vision.calls]
        other = next(i for i, caller in enumerate(callers) if caller != callers[0])
        assert other - before <= 25, "it does not wait for the other caller's 60"
        assert statuses(await many) == {200: 60}


async def test_a_worker_that_fails_fast_does_not_draw_the_requests(tmp_path: Path) -> None:
    async with start_stack(tmp_path, vision=3) as stack:
        broken, *working = stack.vision_workers
        broken.error = RuntimeError("a bug")
        for worker in working:
            worker.delay = 0.01
        for start in range(0, 120, 12):
            assert statuses(await send_images(stack, range(start, start + 12))) == {200: 12}
        assert len(broken.calls) < 30
        assert await stack.metric('dvd_retries_total{outcome="done"}') == len(broken.calls)
        broken.error = None

        async def serves_again() -> bool:
            calls = len(broken.calls)
            await send_images(stack, range(1000, 1010))
            for worker in stack.vision_workers:
                worker.calls.clear()
            stack.sink.rows.clear()
            return calls > 3

        await wait_until(serves_again, "the worker gets its share again")


async def test_an_image_on_which_every_worker_fails_ejects_none(tmp_path: Path) -> None:
    async with start_stack(tmp_path, vision=2) as stack:
        for worker in stack.vision_workers:
            worker.error = RuntimeError("a bug")
        assert statuses(await send_images(stack, range(10))) == {500: 10}
        for worker in stack.vision_workers:
            worker.error = None
            worker.calls.clear()
        assert statuses(await send_images(stack, range(100, 120))) == {200: 20}
        assert all(worker.calls for worker in stack.vision_workers)


@pytest.mark.parametrize("field", ["draining", "stalled"])
async def test_a_worker_that_drains_or_makes_no_progress_gets_no_calls(tmp_path: Path, field: str) -> None:
    async with start_stack(tmp_path, vision=2) as stack:
        first = stack.vision
        first.description = {field: True if field == "draining" else "the device computes nothing"}
        await asyncio.sleep(0.5)  # several probes
        first.calls.clear()
        assert statuses(await send_images(stack, range(20))) == {200: 20}
        assert not first.calls
        first.description = {}

        async def is_used() -> bool:
            stack.sink.rows.clear()
            await send_images(stack, range(20))
            return bool(first.calls)

        await wait_until(is_used, "the worker gets calls again")


async def test_a_worker_with_another_checkpoint_is_left_out(tmp_path: Path) -> None:
    async with start_stack(tmp_path, vision=2) as stack:
        foreign, own = stack.vision_workers
        foreign.checkpoint = checkpoint_description(fingerprint="0" * 64)
        await asyncio.sleep(0.5)
        foreign.calls.clear()
        assert statuses(await send_images(stack, range(20))) == {200: 20}
        assert not foreign.calls
        assert len(own.calls) >= 20
        ready = await stack.get("/health/ready")
        assert ready.status == 200
        assert "fingerprint" in ready.json["warnings"][0]


async def test_two_checkpoints_are_served_in_pairs(tmp_path: Path) -> None:
    async with start_stack(tmp_path, vision=2, language=2) as stack:
        other = checkpoint_description(fingerprint="0" * 64)
        stack.vision_workers[1].checkpoint = stack.language_workers[1].sink.checkpoint = other
        await asyncio.sleep(0.5)
        for worker in stack.vision_workers:
            worker.calls.clear()
        assert statuses(await send_images(stack, range(30))) == {200: 30}
        for vision, language in zip(stack.vision_workers, stack.language_workers, strict=True):
            assert vision.calls
            assert {call.deliver_to for call in vision.calls} == {language.sink.address}


async def test_bodies_share_a_memory(tmp_path: Path) -> None:
    async with start_stack(tmp_path, max_bodies_bytes=200_000) as stack:
        stack.vision.may_encode.clear()
        first = asyncio.create_task(stack.chat(image_part(A), "x" * 150_000))
        await wait_until(lambda: stack.vision.calls, "the first is in flight")
        second = await stack.chat("y" * 100_000)
        assert (second.status, second.error["code"]) == (429, "overloaded")
        assert "200000 bytes" in second.error["message"]
        assert (await stack.chat("short")).status == 200
        stack.vision.may_encode.set()
        assert (await first).status == 200
        assert (await stack.chat("y" * 100_000)).status == 200


async def test_fetched_files_share_the_memory_of_bodies(tmp_path: Path) -> None:
    handlers = {name: respond_with(image_file(i, (10, 10)) + bytes(150_000)) for i, name in enumerate("ab")}
    async with (
        file_server(**handlers) as url,
        start_stack(tmp_path, max_bodies_bytes=200_000, allow_private_images=True) as stack,
    ):
        parts = [{"type": "image_url", "image_url": {"url": f"{url}/{name}"}} for name in handlers]
        stack.vision.may_encode.clear()
        first = asyncio.create_task(stack.chat(parts[0]))
        await wait_until(lambda: stack.vision.calls, "the first is in flight")
        second = await stack.chat(parts[1])
        assert (second.status, second.error["code"]) == (429, "overloaded")
        stack.vision.may_encode.set()
        assert (await first).status == 200
        assert (await stack.chat(parts[1])).status == 200
        await stack.wait_for_metric("dvd_request_body_bytes", 0)


async def test_a_stream_holds_no_memory_for_its_images(tmp_path: Path) -> None:
    end_stream = asyncio.Event()

    async def wait_for_end(_request: Any) -> Any:
        await end_stream.wait()

    async with start_stack(tmp_path, max_bodies_bytes=200_000) as stack:
        stack.engine.respond = event_stream(EVENTS[0], EVENTS[1], then=wait_for_end)
        reader, writer = await stack.start_chat(chat(image_part(A), "x" * 150_000, stream=True))
        await asyncio.wait_for(reader.readuntil(b"data: "), 60)
        assert await stack.metric("dvd_requests_in_flight") == 1
        await stack.wait_for_metric("dvd_request_body_bytes", 0)
        end_stream.set()
        writer.close()


async def test_a_degraded_request_has_a_header_and_a_key_of_its_own(tmp_path: Path, vision: FakeVisionWorker) -> None:
    language = FakeLanguageWorker(tmp_path, 0)
    vision.checkpoint = language.sink.checkpoint = checkpoint_description(relative_threshold=0.75)
    options: dict[str, Any] = {"max_queue_seconds": 60.0, "degrade_after": 0.5}
    async with start_stack(tmp_path, [vision], [language], **options) as stack:
        before = await stack.chat(image_part(A))
        assert "X-DvD-Degraded" not in before.headers
        crowd = asyncio.create_task(send_images(stack, range(100, 160)))
        await wait_until(lambda: len(vision.calls) > 15, "there is a queue")
        degraded = await stack.chat(image_part(A))
        assert degraded.headers["X-DvD-Degraded"].startswith("level=")
        assert "encoded=1" in degraded.headers["X-DvD-Images"], "not the embedding of the first request"
        assert await stack.metric("dvd_degradation_level") >= 1
        await crowd


async def test_a_slow_encode_is_also_sent_to_another_worker(tmp_path: Path) -> None:
    async with start_stack(tmp_path, vision=2, hedge_share=0.5) as stack:
        await send_images(stack, range(40))
        slow, fast = stack.vision_workers
        slow.may_encode.clear()
        assert statuses(await send_images(stack, range(100, 106))) == {200: 6}
        assert slow.cancelled
        assert await stack.metric("dvd_encodes_hedged_total") >= 1
        slow.may_encode.set()
        assert fast.calls
