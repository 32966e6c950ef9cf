"""The limit of concurrent requests, and deadlines in every stage of a request."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.server.fakes.file_server import file_server
from tests.server.fakes.handlers import event_stream, hang
from tests.server.fakes.requests import chat, image_part
from tests.server.fakes.stack import Response, Stack, start_stack
from tests.server.fakes.vllm import EVENTS, default_response
from tests.server.fakes.waiting import wait_until
from tests.server.gateway.helpers import A, assert_serves_images


async def test_a_request_over_the_limit_is_rejected_with_429(tmp_path: Path) -> None:
    async with start_stack(tmp_path, max_in_flight=2) as stack:
        stack.engine.respond = hang
        hanging = [await stack.start_chat(chat("a")) for _ in range(2)]
        await wait_until(lambda: len(stack.engine.requests) == 2, "the engine has both requests")
        response = await stack.chat("a")
        assert (response.status, response.error["code"]) == (429, "overloaded")
        assert response.error["type"] == "rate_limit_error"
        assert int(response.headers["Retry-After"]) >= 1
        assert (await stack.get("/health/ready")).status == 200, "other paths are not limited"
        for _, writer in hanging:
            writer.close()
        await stack.wait_until_idle()
        stack.engine.respond = default_response
        await assert_serves_images(stack)


@pytest.mark.parametrize("timeout", ["0", "-1", "abc", "", "1e3", "inf", "nan", "0.0", "1,5", "9" * 20, "0x1", " 1 2"])
async def test_an_invalid_timeout_is_rejected(shared_stack: Stack, timeout: str) -> None:
    response = await shared_stack.chat("a", headers={"X-Request-Timeout": timeout})
    assert (response.status, response.error["code"]) == (400, "invalid_request")


async def assert_deadline_exceeded(stack: Stack, response: Response) -> None:
    """Asserts that this is the error for a deadline, and waits until no request is in flight."""
    assert (response.status, response.error["code"]) == (504, "deadline_exceeded")
    assert response.headers["X-Should-Retry"] == "false", "a retry would take as long"
    await stack.wait_until_idle()


async def test_deadline_in_the_vision_worker(stack: Stack) -> None:
    stack.vision.may_encode.clear()
    await assert_deadline_exceeded(stack, await stack.chat(image_part(A), headers={"X-Request-Timeout": "1"}))
    await wait_until(lambda: stack.vision.cancelled == len(stack.vision.calls) == 1, "the encode is cancelled")
    assert stack.engine.requests == []
    stack.vision.may_encode.set()
    await assert_serves_images(stack)


@pytest.mark.parametrize("stream", [False, True])
async def test_deadline_in_the_engine(stack: Stack, stream: bool) -> None:
    stack.engine.respond = hang
    await assert_deadline_exceeded(stack, await stack.chat("a", stream=stream, headers={"X-Request-Timeout": "1"}))
    await wait_until(lambda: stack.engine.disconnects == 1, "the engine's request is cancelled")
    stack.engine.respond = default_response
    await assert_serves_images(stack)


async def partial_body_then_hang(request: Any) -> Any:
    """Sends a part of a body and no more."""
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    await response.write(b'{"id": ')
    return await hang(request)


async def test_deadline_in_the_middle_of_a_response(stack: Stack) -> None:
    stack.engine.respond = partial_body_then_hang
    await assert_deadline_exceeded(stack, await stack.chat("a", headers={"X-Request-Timeout": "1"}))
    await wait_until(lambda: stack.engine.disconnects == 1, "the engine's request is cancelled")


async def test_deadline_in_the_middle_of_a_stream(stack: Stack) -> None:
    stack.engine.respond = event_stream(*EVENTS[:2], then=hang)
    response = await stack.chat("a", stream=True, headers={"X-Request-Timeout": "2"})
    assert response.status == 200
    *events, error, done, end = response.body.split(b"\n\n")
    assert [event + b"\n\n" for event in events] == EVENTS[:2]
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "deadline_exceeded"
    assert (done, end) == (b"data: [DONE]", b"")
    await wait_until(lambda: stack.engine.disconnects == 1, "the engine's request is cancelled")
    await stack.wait_until_idle()


async def test_deadline_while_an_image_is_fetched(stack: Stack) -> None:
    async with file_server(a=hang) as url:
        await assert_deadline_exceeded(stack, await stack.chat(image_part(f"{url}/a"), headers={"X-Request-Timeout": "0.3"}))


async def test_deadline_before_the_body_is_complete(stack: Stack) -> None:
    head = "POST /v1/chat/completions HTTP/1.1\nHost: a\nX-Request-Timeout: 0.3\nContent-Length: 1000\n\n"
    reader, writer = await stack.send_raw(head, b"{")
    async with asyncio.timeout(20):
        assert (await reader.readline()).startswith(b"HTTP/1.1 504 ")
    writer.close()
    await stack.wait_until_idle()


async def test_a_client_cannot_exceed_the_servers_timeout(tmp_path: Path) -> None:
    async with start_stack(tmp_path, request_timeout=0.5) as stack:
        stack.engine.respond = hang
        await assert_deadline_exceeded(stack, await stack.chat("a", headers={"X-Request-Timeout": "900"}))
        await assert_deadline_exceeded(stack, await stack.chat("a"))


async def test_a_deadline_does_not_end_an_encode_that_another_request_shares(stack: Stack) -> None:
    stack.vision.may_encode.clear()
    short = asyncio.create_task(stack.chat(image_part(A), headers={"X-Request-Timeout": "1.5"}))
    await wait_until(lambda: stack.vision.calls, "the image is being encoded")
    other = asyncio.create_task(stack.chat(image_part(A)))
    response = await short
    assert response.status == 504
    stack.vision.may_encode.set()
    assert (await other).status == 200
