"""Streams that own resources, and work that ends when its caller disconnects."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from server.http.streaming import StreamWithResources, cancel_on_disconnect
from server.shutdown import Shutdown
from tests.server.http.helpers import body_messages, make_request, receive_messages

SCOPE: dict[str, Any] = {
    "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "method": "GET", "headers": [],
    "state": {"shutdown": Shutdown()},
}  # fmt: skip


async def wait_for_ever() -> dict[str, Any]:
    await asyncio.Event().wait()
    raise AssertionError


async def two_events() -> AsyncIterator[bytes]:
    yield b"a"
    yield b"b"


@pytest.mark.parametrize("fails_at", [None, "http.response.start", "http.response.body"])
async def test_a_stream_releases_its_resources_after_its_last_message(fails_at: str | None) -> None:
    log: list[str] = []

    async def send(message: Any) -> None:
        log.append(message["type"])
        if message["type"] == fails_at:
            raise ConnectionResetError

    response = StreamWithResources(two_events())
    response.resources = AsyncExitStack()
    response.resources.callback(log.append, "released")
    if fails_at is None:
        await response(SCOPE, wait_for_ever, send)
    else:
        with pytest.raises((OSError, ClientDisconnect)):
            await response(SCOPE, wait_for_ever, send)
    assert log[0] == "http.response.start"
    assert log.index("released") == len(log) - 1


async def test_the_result_or_error_of_the_work_is_passed_on() -> None:
    async def succeed() -> int:
        return 5

    async def fail() -> int:
        raise ValueError("failed")

    assert await cancel_on_disconnect(make_request(wait_for_ever), succeed()) == 5
    with pytest.raises(ValueError, match="failed"):
        await cancel_on_disconnect(make_request(wait_for_ever), fail())


async def test_the_work_is_cancelled_when_the_caller_disconnects() -> None:
    cancelled = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    receive = receive_messages(*body_messages([b""]), {"type": "http.disconnect"})
    with pytest.raises(ClientDisconnect):
        await cancel_on_disconnect(make_request(receive), work())
    assert cancelled.is_set()
