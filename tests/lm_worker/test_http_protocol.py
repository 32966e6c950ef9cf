"""Strangers at vLLM's port who send no head: over real sockets, in front of an application that answers everything."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn

from lm_worker import http_protocol
from lm_worker.authentication import RequireToken
from lm_worker.http_protocol import BoundedProtocol
from tests.lm_worker.test_authentication import CLUSTER, answer
from tests.lm_worker.uvicorn_server import running
from tests.server.fakes.waiting import wait_until

Client = tuple[asyncio.StreamReader, asyncio.StreamWriter]
GET = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"


@contextlib.asynccontextmanager
async def serve(keep_alive: int = 600, app: Any = answer) -> AsyncIterator[int]:
    """Serve as vLLM does, web sockets included."""
    config = uvicorn.Config(
        RequireToken(app), port=0, log_config=None, lifespan="off", http=BoundedProtocol, timeout_keep_alive=keep_alive
    )
    async with running(config) as port:
        yield port


async def connect(port: int, data: bytes = b"") -> Client:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    return reader, writer


async def assert_serves(port: int) -> None:
    reader, writer = await connect(port, GET)
    async with asyncio.timeout(60):
        assert (await reader.readline()).startswith(b"HTTP/1.1 204 ")
    writer.close()


async def drip(client: Client, data: bytes) -> None:
    """Send this again and again until the server has closed the connection."""
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(60):
            reading = asyncio.create_task(client[0].read())
            while not reading.done():
                client[1].write(data)
                await asyncio.sleep(0.05)
            await reading
    client[1].close()


@pytest.mark.parametrize(
    ("start", "rest"),
    [
        (b"", b""),
        (b"GET /health HTTP/1.1\r\nX: ", b"x"),
        (GET, b"\r\n"),
        (GET + b"GET /", b"x"),
        (b"POST /health HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n", b"x"),
    ],
    ids=["nothing", "a slow head", "line feeds after a request", "a slow second head", "a body after its response"],
)
async def test_a_head_that_does_not_arrive_ends_its_connection(
    monkeypatch: pytest.MonkeyPatch, start: bytes, rest: bytes
) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 1.0)
    async with serve() as port:
        await assert_serves(port)
        strangers = [asyncio.create_task(drip(await connect(port, start), rest)) for _ in range(5)]
        await assert_serves(port)
        await asyncio.gather(*strangers)
        await assert_serves(port)
    assert not BoundedProtocol._waiting


@pytest.mark.parametrize("data", [b"", b"GET /", GET], ids=["nothing", "half a head", "idle after a request"])
async def test_more_connections_than_there_may_be_do_not_keep_others_out(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(http_protocol, "MAX_WAITING", 20)
    async with serve() as port:
        strangers = [await connect(port, data) for _ in range(60)]
        for _ in range(5):
            await assert_serves(port)
            await wait_until(lambda: len(BoundedProtocol._waiting) <= 20, "the oldest ones are closed")
        for _, writer in strangers:
            writer.close()
    assert not BoundedProtocol._waiting


async def test_requests_that_are_served_are_not_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gateways may have more of them than there may be strangers, and each needs a connection."""
    monkeypatch.setattr(http_protocol, "MAX_WAITING", 5)
    waiting = asyncio.Event()

    async def answer_later(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/later":
            await waiting.wait()
        await answer(scope, receive, send)

    async with serve(app=answer_later) as port:
        running = [await connect(port, GET.replace(b"/health", b"/later")) for _ in range(20)]
        strangers = [await connect(port) for _ in range(10)]
        await assert_serves(port)
        waiting.set()
        for reader, writer in running:
            async with asyncio.timeout(60):
                assert (await reader.readline()).startswith(b"HTTP/1.1 204 ")
            writer.close()
        for _, writer in strangers:
            writer.close()


async def test_web_sockets_of_strangers_are_not_counted_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "MAX_WAITING", 5)
    monkeypatch.setattr(RequireToken, "credentials", CLUSTER)
    upgrade = (
        b"GET /v1/realtime HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    async with serve() as port:
        for _ in range(20):
            reader, writer = await connect(port, upgrade)
            async with asyncio.timeout(60):
                assert (await reader.readline()).startswith(b"HTTP/1.1 403 ")
            writer.close()
        await wait_until(lambda: not BoundedProtocol._waiting, "none of them is counted")
        await assert_serves(port)


async def test_a_connection_that_is_kept_between_requests_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.3)
    async with serve() as port:
        reader, writer = await connect(port)
        for _ in range(3):
            writer.write(GET)
            async with asyncio.timeout(60):
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204 ")
            await asyncio.sleep(0.6)
        writer.close()
