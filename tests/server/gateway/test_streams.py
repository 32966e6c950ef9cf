"""Streamed responses: events pass as they come, and a stream that breaks ends with an error event."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.server.fakes.handlers import abort_connection, error_response, event_stream, hang, in_turn
from tests.server.fakes.requests import chat, image_part
from tests.server.fakes.stack import Stack, start_stack
from tests.server.fakes.vllm import EVENTS
from tests.server.gateway.helpers import ERROR_EVENT, A, read_to_end


async def test_a_stream_passes_byte_for_byte(stack: Stack) -> None:
    for content in (["hello"], [image_part(A)]):
        response = await stack.chat(*content, stream=True)
        assert (response.status, response.body) == (200, b"".join(EVENTS))
        assert response.headers["Content-Type"].startswith("text/event-stream")
        assert (response.headers["Cache-Control"], response.headers["X-Accel-Buffering"]) == ("no-cache", "no")
    await stack.wait_until_idle()


async def test_a_stream_for_an_http_1_0_client_ends_with_the_connection(stack: Stack) -> None:
    body = json.dumps(chat("a", stream=True)).encode()
    reader, writer = await stack.send_raw(f"POST /v1/chat/completions HTTP/1.0\nContent-Length: {len(body)}\n\n", body)
    head, _, events = (await read_to_end(reader)).partition(b"\r\n\r\n")
    writer.close()
    assert events == b"".join(EVENTS)
    assert b"transfer-encoding" not in head
    assert b"connection: close" in head


async def test_events_are_forwarded_as_soon_as_the_engine_sends_them(stack: Stack) -> None:
    end_stream = asyncio.Event()

    async def wait_for_end(_request: Any) -> Any:
        await end_stream.wait()

    stack.engine.respond = event_stream(EVENTS[0], EVENTS[1], then=wait_for_end)
    reader, writer = await stack.start_chat(chat("a", stream=True))
    async with asyncio.timeout(20):
        assert EVENTS[0].strip() in await reader.readuntil(EVENTS[0].strip())
        assert EVENTS[1].strip() in await reader.readuntil(EVENTS[1].strip())
    assert await stack.metric("dvd_requests_in_flight") == 1
    end_stream.set()
    await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), 20)
    writer.close()
    await stack.wait_until_idle()


async def test_a_silent_stream_receives_keep_alive_comments_once_it_has_begun(tmp_path: Path) -> None:
    async with start_stack(tmp_path, stream_keep_alive=0.01) as stack:
        end_stream = asyncio.Event()

        async def wait_for_end(_request: Any) -> Any:
            await end_stream.wait()

        stack.engine.respond = in_turn(event_stream(EVENTS[0], then=wait_for_end), error_response(400))
        reader, writer = await stack.start_chat(chat("a", stream=True))
        async with asyncio.timeout(20):
            assert b"data" in await reader.readuntil(b": keep-alive\n\n")
        end_stream.set()
        await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), 20)
        writer.close()
        await stack.wait_until_idle()
        assert (await stack.chat("a", stream=True)).status == 400, "an error before the first event still has its status"


@pytest.mark.parametrize("ending", [abort_connection, hang])
async def test_a_broken_stream_ends_with_an_error_event(stack: Stack, ending: Any) -> None:
    stack.engine.respond = event_stream(*EVENTS[:2], b'data: {"n": ', then=ending)
    reader, writer = await stack.start_chat(chat(image_part(A), stream=True), "Connection: close\n")
    await asyncio.wait_for(reader.readuntil(EVENTS[1].strip()), 20)
    if ending is hang:
        await stack.engine.stop()
    response = await read_to_end(reader)
    writer.close()
    error = response[response.index(b'data: {"error"') :]
    assert json.loads(error.split(b"\n\n")[0].removeprefix(b"data: "))["error"]["code"] == "unavailable"
    assert b"data: [DONE]\n\n" in error
    assert response.rstrip().endswith(b"0"), "the chunked body is complete"
    await stack.wait_until_idle()


async def test_a_late_error_event_is_converted_to_openais_format(stack: Stack) -> None:
    stack.engine.respond = event_stream(EVENTS[0] + EVENTS[1], ERROR_EVENT, b"data: [DONE]\n\n")
    response = await stack.chat("a", stream=True)
    assert response.body.startswith(EVENTS[0] + EVENTS[1])
    assert response.body.endswith(b"\n\ndata: [DONE]\n\n")
    assert b"engine_error" in response.body
    assert b"/root" not in response.body
