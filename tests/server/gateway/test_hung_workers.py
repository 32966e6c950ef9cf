"""A worker whose process hangs keeps its connections open: its requests move to another worker, or end with 503."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from server.workers import probes
from tests.server.fakes.requests import chat, image_file, image_part
from tests.server.fakes.stack import Stack, start_stack
from tests.server.fakes.waiting import wait_until
from tests.server.gateway.helpers import A, assert_serves_images


@pytest.fixture(autouse=True)
def _quick_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "PROBE_TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(probes, "POLL_INTERVAL_SECONDS", 0.1)


async def never(_request: web.Request) -> web.StreamResponse:
    """Does not respond."""
    await asyncio.Event().wait()
    raise AssertionError


async def test_images_at_a_hung_vision_worker_move_to_the_other(tmp_path: Path) -> None:
    async with start_stack(tmp_path, vision=2) as stack:
        hung, other = stack.vision_workers
        hung.may_encode.clear()
        requests = [asyncio.create_task(stack.chat(image_part(image_file(i)))) for i in range(12)]
        await wait_until(lambda: hung.calls and len(hung.calls) + len(other.calls) == 12, "all images are at a worker")
        hung.responsive.clear()
        assert {(await request).status for request in requests} == {200}
        assert await stack.metric("dvd_requests_in_flight") == 0


async def test_requests_with_the_same_image_are_moved_together(tmp_path: Path) -> None:
    async with start_stack(tmp_path, vision=2) as stack:
        for worker in stack.vision_workers:
            worker.may_encode.clear()
        first = asyncio.create_task(stack.chat(image_part(A)))
        await wait_until(lambda: any(worker.calls for worker in stack.vision_workers), "the image is at a worker")
        (hung,) = (worker for worker in stack.vision_workers if worker.calls)
        (other,) = (worker for worker in stack.vision_workers if worker is not hung)
        other.may_encode.set()
        second = asyncio.create_task(stack.chat(image_part(A)))
        hung.responsive.clear()
        assert [(await request).status for request in (first, second)] == [200, 200]
        assert (len(hung.calls), len(other.calls)) == (1, 1)


@pytest.mark.parametrize("part", ["sink", "engine"])
async def test_requests_at_a_hung_language_worker_move_to_the_other(tmp_path: Path, part: str) -> None:
    async with start_stack(tmp_path, language=2) as stack:
        hung, other = stack.language_workers
        hung.engine.respond = never
        requests = [asyncio.create_task(stack.chat("a")) for _ in range(12)]
        await wait_until(lambda: hung.engine.requests and len(hung.engine.requests) + len(other.engine.requests) == 12, "all")
        hanging: Any = getattr(hung, part)
        hanging.responsive.clear()
        assert {(await request).status for request in requests} == {200}


async def test_images_for_a_language_worker_that_hangs_move_to_the_other(tmp_path: Path) -> None:
    """The vision worker still waits for the sink, which does not answer."""
    async with start_stack(tmp_path, language=2) as stack:
        stack.vision.may_encode.clear()
        request = asyncio.create_task(stack.chat(image_part(A)))
        await wait_until(lambda: stack.vision.calls, "the image is at the vision worker")
        address = stack.vision.calls[0].deliver_to
        (hung,) = (worker for worker in stack.language_workers if worker.sink.address == address)
        hung.sink.responsive.clear()
        await wait_until(lambda: len(stack.vision.calls) == 2, "the image is encoded for the other one")
        assert stack.vision.calls[1].deliver_to != address
        stack.vision.may_encode.set()
        assert (await request).status == 200
        hung.sink.responsive.set()


@pytest.mark.parametrize("part", ["vision", "engine"])
async def test_without_another_worker_requests_end_with_503(stack: Stack, part: str) -> None:
    hanging: Any = getattr(stack, part)
    stack.engine.respond, respond = never, stack.engine.respond
    stack.vision.may_encode.clear()
    request = asyncio.create_task(stack.chat(image_part(A)) if part == "vision" else stack.chat("a"))
    await wait_until(lambda: stack.vision.calls or stack.engine.requests, "the request is at the worker")
    hanging.responsive.clear()
    response = await request
    assert (response.status, response.error["code"]) == (503, "unavailable")
    assert int(response.headers["Retry-After"]) >= 1
    hanging.responsive.set()
    stack.vision.may_encode.set()
    stack.engine.respond = respond
    await stack.wait_until_ready()
    await assert_serves_images(stack)


async def test_a_busy_worker_that_answers_probes_keeps_its_requests(stack: Stack) -> None:
    stack.vision.may_encode.clear()
    request = asyncio.create_task(stack.chat(image_part(A)))
    await wait_until(lambda: stack.vision.calls, "the image is at the worker")
    for _ in range(20):
        assert (await stack.get("/health/ready")).status == 200
        await asyncio.sleep(0.05)
    stack.vision.may_encode.set()
    assert (await request).status == 200
    assert len(stack.vision.calls) == 1


async def test_a_stream_that_has_started_at_a_hung_worker_is_not_given_up(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its caller has the first tokens, so that no other worker can continue; the request's deadline ends it."""
    may_end = asyncio.Event()

    async def slow(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b'data: {"n": 0}\n\n')
        await may_end.wait()
        await response.write(b"data: [DONE]\n\n")
        return response

    stack.engine.respond = slow
    reader, writer = await stack.start_chat(chat("a", stream=True))
    await reader.readuntil(b'"n": 0')
    stack.engine.responsive.clear()
    await stack.wait_until_not_ready()
    await asyncio.sleep(1.5)  # several probes more
    stack.engine.responsive.set()
    may_end.set()
    await reader.readuntil(b"data: [DONE]")
    writer.close()
