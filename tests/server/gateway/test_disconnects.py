"""Clients that disconnect: the work for them is cancelled in every stage of a request."""

import asyncio
import functools
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.server.fakes.file_server import file_server
from tests.server.fakes.handlers import event_stream, hang
from tests.server.fakes.requests import chat, image_file, image_part
from tests.server.fakes.stack import Stack, start_stack
from tests.server.fakes.vllm import EVENTS, default_response
from tests.server.fakes.waiting import wait_until
from tests.server.gateway.helpers import A, assert_serves_images, read_to_end

Disconnect = Callable[[asyncio.StreamWriter], Awaitable[None]]


def _has_more_calls(stack: Stack, count: int) -> bool:
    return len(stack.vision.calls) > count


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()


async def _reset(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


@pytest.fixture(params=[_close, _reset], ids=["close", "reset"])
def disconnect(request: pytest.FixtureRequest) -> Disconnect:
    """How the client closes its connection: with a FIN or with a RST."""
    return request.param  # type: ignore[no-any-return]


async def test_disconnect_before_the_body_is_complete(stack: Stack, disconnect: Disconnect) -> None:
    _, writer = await stack.send_raw("POST /v1/chat/completions HTTP/1.1\nHost: a\nContent-Length: 1000\n\n", b"{")
    await stack.wait_for_metric("dvd_request_body_bytes", 1)
    assert await stack.metric("dvd_requests_in_flight") == 0, "a body that is incomplete takes no permit"
    await disconnect(writer)
    await stack.wait_for_metric("dvd_request_body_bytes", 0)
    await assert_serves_images(stack)


async def test_disconnect_while_an_image_is_fetched(stack: Stack, disconnect: Disconnect) -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def slow(request: Any) -> Any:
        started.set()
        try:
            return await hang(request)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async with file_server(a=slow) as url:
        _, writer = await stack.start_chat(chat(image_part(f"{url}/a")))
        await asyncio.wait_for(started.wait(), 20)
        await disconnect(writer)
        await asyncio.wait_for(cancelled.wait(), 20)
        await stack.wait_until_idle()
    await assert_serves_images(stack)


async def test_disconnect_while_an_image_is_encoded(stack: Stack, disconnect: Disconnect) -> None:
    stack.vision.may_encode.clear()
    _, writer = await stack.start_chat(chat(image_part(A)))
    await wait_until(lambda: stack.vision.calls, "the image is being encoded")
    await disconnect(writer)
    await wait_until(lambda: stack.vision.cancelled == 1, "the encode is cancelled")
    await stack.wait_until_idle()
    stack.vision.may_encode.set()
    await assert_serves_images(stack)


@pytest.mark.parametrize("stream", [False, True])
async def test_disconnect_before_the_response(stack: Stack, disconnect: Disconnect, stream: bool) -> None:
    stack.engine.respond = hang
    _, writer = await stack.start_chat(chat(image_part(A), stream=stream))
    await wait_until(lambda: stack.engine.requests, "the engine has the request")
    await disconnect(writer)
    await wait_until(lambda: stack.engine.disconnects == 1, "the engine's request is cancelled")
    await stack.wait_until_idle()
    stack.engine.respond = default_response
    await assert_serves_images(stack)


async def test_disconnect_in_the_middle_of_a_stream(stack: Stack, disconnect: Disconnect) -> None:
    stack.engine.respond = event_stream(*EVENTS[:2], then=hang)
    reader, writer = await stack.start_chat(chat(image_part(A), stream=True))
    await asyncio.wait_for(reader.readuntil(EVENTS[0].strip()), 20)
    await disconnect(writer)
    await wait_until(lambda: stack.engine.disconnects == 1, "the engine's request is cancelled")
    await stack.wait_until_idle()
    stack.engine.respond = default_response
    await assert_serves_images(stack)


async def test_two_hundred_disconnects_leave_nothing_in_flight(tmp_path: Path) -> None:
    async with start_stack(tmp_path, max_in_flight=20) as stack:
        for i in range(10):
            stack.vision.may_encode.clear()
            stack.engine.respond = hang
            connections = [
                await stack.start_chat(chat(image_part(image_file(i))) if j % 2 else chat("a", stream=True)) for j in range(20)
            ]
            await wait_until(functools.partial(_has_more_calls, stack, i), "the requests are being served")
            for _, writer in connections:
                writer.close()
            await stack.wait_until_idle()
        await wait_until(lambda: stack.vision.cancelled == len(stack.vision.calls), "all encodes are cancelled")
        stack.vision.may_encode.set()
        stack.engine.respond = default_response
        await assert_serves_images(stack)


@pytest.mark.parametrize("index", [0, 1, 2])
async def test_a_disconnect_does_not_cancel_an_encode_that_others_share(stack: Stack, index: int) -> None:
    stack.vision.may_encode.clear()
    connections = []
    for i in range(3):
        connections.append(await stack.start_chat(chat(image_part(A)), "Connection: close\n"))
        await wait_until(lambda: stack.vision.calls, "the first request is being encoded")
        await stack.wait_for_metric("dvd_encodes_joined_total", i)
    connections[index][1].close()
    await stack.wait_for_metric("dvd_requests_in_flight", 2)
    assert stack.vision.cancelled == 0
    stack.vision.may_encode.set()
    for i, (reader, writer) in enumerate(connections):
        if i != index:
            assert (await read_to_end(reader)).startswith(b"HTTP/1.1 200 ")
            writer.close()
    assert len(stack.vision.calls) == 1
