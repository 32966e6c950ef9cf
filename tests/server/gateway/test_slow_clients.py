"""Callers that send slowly: they hold no permit, their connections end, and everybody else is served meanwhile."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from server.http import body
from tests.server.fakes.requests import chat, image_part
from tests.server.fakes.stack import Stack, start_stack
from tests.server.gateway.helpers import A, assert_serves_images, read_to_end

HEAD = "POST /v1/chat/completions HTTP/1.1\nHost: a\nContent-Length: 1000000\n\n"
Clients = list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]


async def open_many(stack: Stack, count: int, head: str, data: bytes) -> Clients:
    """Open connections that send this and no more."""
    clients: Clients = []
    for start in range(0, count, 50):  # no more at once than the queue of the socket takes
        clients += await asyncio.gather(*(stack.send_raw(head, data) for _ in range(min(50, count - start))))
    return clients


def close_all(clients: Clients) -> None:
    for _, writer in clients:
        writer.transport.abort()


async def assert_all_at_base(stack: Stack) -> None:
    """Assert that nothing is held, but the connection that asks."""
    await stack.wait_for_metric("dvd_requests_in_flight", 0)
    await stack.wait_for_metric("dvd_request_body_bytes", 0)
    await stack.wait_for_metric("dvd_connections", 1)
    await assert_serves_images(stack)


async def test_530_bodies_that_stop_take_no_permits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "GRACE_SECONDS", 8.0)
    async with start_stack(tmp_path, max_in_flight=16) as stack:
        clients = await open_many(stack, 530, HEAD, b"{")
        await stack.wait_for_metric("dvd_request_body_bytes", 530)
        assert await stack.metric("dvd_requests_in_flight") == 0
        assert (await stack.chat("others are served")).status == 200
        await assert_serves_images(stack)
        responses = await asyncio.gather(*(read_to_end(reader) for reader, _ in clients))
        assert all(response.startswith(b"HTTP/1.1 408 ") for response in responses)
        error = json.loads(responses[0].partition(b"\r\n\r\n")[2])["error"]
        assert error["code"] == "request_too_slow"
        assert "1024 bytes per second" in error["message"]
        assert await stack.metric('dvd_errors_total{code="request_too_slow"}') == 530
        close_all(clients)
        await assert_all_at_base(stack)


async def test_bodies_that_stop_share_a_memory(tmp_path: Path) -> None:
    async with start_stack(tmp_path, max_bodies_bytes=1 << 20) as stack:
        clients = await open_many(stack, 15, HEAD, b" " * 65_000)
        await stack.wait_for_metric("dvd_request_body_bytes", 15 * 65_000)
        refused = await stack.chat("x" * 200_000)
        assert (refused.status, refused.error["code"]) == (429, "overloaded")
        assert await stack.metric('dvd_requests_refused_total{resource="bodies"}') == 1
        assert (await stack.chat("a small one is served")).status == 200
        close_all(clients)
        await assert_all_at_base(stack)


@pytest.mark.parametrize(
    "head", ["", "POST /v1/chat/completions HTTP/1.1\nHost: a\n", HEAD], ids=["nothing", "heads", "bodies"]
)
async def test_more_connections_than_there_may_be_do_not_keep_others_out(tmp_path: Path, head: str) -> None:
    async with start_stack(tmp_path, max_connections=40) as stack:
        clients = await open_many(stack, 120, head, b"")
        for _ in range(5):
            assert (await stack.chat(image_part(A), "others are served")).status == 200
        assert await stack.metric("dvd_connections") <= 40
        close_all(clients)
        await assert_all_at_base(stack)


async def test_a_head_that_stops_is_answered_and_counted(tmp_path: Path) -> None:
    async with start_stack(tmp_path, head_timeout=0.5) as stack:
        clients = await open_many(stack, 30, "POST /v1/chat/completions HTTP/1.1\nHost: a\n", b"")
        assert (await stack.chat("others are served")).status == 200
        for response in await asyncio.gather(*(read_to_end(reader) for reader, _ in clients)):
            assert response.startswith(b"HTTP/1.1 408 ")
            assert b"\r\nX-Request-Id: " in response
        assert await stack.metric('dvd_requests_total{code="408",route="other"}') == 30
        close_all(clients)
        await assert_all_at_base(stack)


async def test_a_slow_body_is_served_if_it_is_fast_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "GRACE_SECONDS", 2.0)
    async with start_stack(tmp_path, min_body_rate=100) as stack:
        raw = json.dumps(chat("a" * 2000)).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\nHost: a\nConnection: close\nContent-Length: {len(raw)}\n\n"
        reader, writer = await stack.send_raw(head)
        for start in range(0, len(raw), 80):
            writer.write(raw[start : start + 80])
            await asyncio.sleep(0.1)
        assert (await read_to_end(reader)).startswith(b"HTTP/1.1 200 ")
        writer.close()


async def test_an_api_key_is_checked_before_the_body_arrives(tmp_path: Path) -> None:
    options: dict[str, Any] = {"api_key": "key"}
    async with start_stack(tmp_path, **options) as stack:
        reader, writer = await stack.send_raw(HEAD, b"{")
        async with asyncio.timeout(20):
            assert (await reader.readline()).startswith(b"HTTP/1.1 401 ")
        writer.close()
        await stack.wait_for_metric("dvd_request_body_bytes", 0)
