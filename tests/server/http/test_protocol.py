"""Bounds of HTTP/1.1, over real sockets. The application responds with the size of the body."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn

from server.http.connections import Connections
from server.http.protocol import MAX_HEAD_BYTES, uvicorn_config
from server.metrics import Metrics

GET = b"GET / HTTP/1.1\r\nHost: a\r\n"


async def respond_with_body_size(scope: Any, receive: Any, send: Any) -> None:
    size, more = 0, True
    if scope["path"] == "/slow":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"started", "more_body": True})
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    if scope["path"] != "/slow":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"8")]})
        await send({"type": "http.response.body", "body": b"%08d" % size})


@asynccontextmanager
async def start_server(
    app: Callable[..., Any] = respond_with_body_size,
    connections: Connections | None = None,
    **options: Any,
) -> AsyncIterator[int]:
    listening = socket.create_server(("127.0.0.1", 0))
    connections = connections or Connections(100, 20.0, Metrics())
    server = uvicorn.Server(uvicorn_config(app, 1, connections, lifespan="off", **options))
    running = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        await running


async def exchange(*chunks: bytes, half_close: bool = False, app: Callable[..., Any] = respond_with_body_size) -> bytes:
    """Send chunks, and return all that the server sends until it closes the connection.

    Args:
        *chunks: Sent one after the other until the server closes the connection.
        half_close: Whether to close the sending side after the last chunk.
        app: The application.
    """
    async with start_server(app) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        reading = asyncio.create_task(reader.read())
        for chunk in chunks:
            if reading.done():
                break
            writer.write(chunk)
            await asyncio.sleep(0.02)
        if half_close:
            writer.write_eof()
        try:
            return await asyncio.wait_for(reading, 10)
        finally:
            writer.close()


def parse_error(response: bytes) -> dict[str, Any]:
    head, _, body = response.partition(b"\r\n\r\n")
    assert b"Content-Length: %d\r\n" % len(body) in head
    error: dict[str, Any] = json.loads(body)["error"]
    return {"status": int(head.split()[1]), **error}


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(lambda size: b"X-Long: " + b"x" * size + b"\r\n", id="one header"),
        pytest.param(lambda size: b"".join(b"X-%07d: abcde\r\n" % i for i in range(size // 18)), id="many headers"),
    ],
)
async def test_the_head_limit_is_enforced_with_431(head: Callable[[int], bytes]) -> None:
    assert (await exchange(GET + head(MAX_HEAD_BYTES - 200) + b"Connection: close\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    error = parse_error(await exchange(GET + head(MAX_HEAD_BYTES + 200) + b"\r\n"))
    assert (error["status"], error["code"]) == (431, "head_too_large")
    assert str(MAX_HEAD_BYTES) in error["message"]


async def test_the_head_limit_includes_the_path() -> None:
    assert parse_error(await exchange(b"GET /" + b"x" * MAX_HEAD_BYTES + b" HTTP/1.1\r\nHost: a\r\n\r\n"))["status"] == 431


@pytest.mark.parametrize("chunk", [b"x" * 9_000, b"X-A: b\r\n" * 1_000])
async def test_an_endless_head_is_rejected(chunk: bytes) -> None:
    error = parse_error(await exchange(GET, *([b"X-Long: "] if chunk[0] == ord("x") else []), *[chunk] * 10))
    assert error["code"] == "head_too_large"


@pytest.mark.parametrize(
    "data",
    [b"\x16\x03\x01\x02\x00\x01", b"PROXY TCP4 1.2.3.4\r\n", b"hello\r\n\r\n", b"GET / HTTP/1.1\r\nNo colon\r\n\r\n"],
)
async def test_invalid_http_is_answered_with_an_error_object(data: bytes) -> None:
    error = parse_error(await exchange(data))
    assert (error["status"], error["type"], error["code"]) == (400, "invalid_request_error", "invalid_request")
    assert "TLS" in error["message"]


async def test_bodies_do_not_count_as_head() -> None:
    body = b"x" * 5 * MAX_HEAD_BYTES
    post = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body)
    response = await exchange(post + body + GET + b"Connection: close\r\n\r\n")
    assert response.count(b"HTTP/1.1 200 ") == 2
    assert b"%08d" % len(body) in response


CHUNKED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n"


async def test_trailers_are_ignored() -> None:
    trailers = b"a: b\r\nX-Long: " + b"x" * 1000 + b"\r\n"
    response = await exchange(CHUNKED + b"0\r\n", trailers, b"\r\n" + GET, b"Connection: close\r\n\r\n")
    assert response.count(b"HTTP/1.1 200 ") == 2
    assert b"00000005" in response


@pytest.mark.parametrize(
    ("start", "chunk"),
    [
        pytest.param(b"0\r\n", b"a: b\r\n" * 500, id="many trailers"),
        pytest.param(b"0\r\na: ", b"x" * 3000, id="one trailer"),
        pytest.param(b"5;", b"x" * 3000, id="a chunk extension"),
    ],
)
async def test_endless_trailers_and_extensions_end_the_connection(start: bytes, chunk: bytes) -> None:
    chunks = [chunk] * (4 * MAX_HEAD_BYTES // len(chunk))
    assert b" 200 " not in await exchange(CHUNKED, start, *chunks)


@pytest.mark.parametrize("reads", [False, True])
async def test_a_caller_that_does_not_read_is_disconnected(reads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller that reads gets the whole response."""
    # one that reads must be in time on a busy machine too
    monkeypatch.setattr("server.http.protocol.STALL_TIMEOUT_SECONDS", 20.0 if reads else 0.3)
    ended, size = asyncio.Event(), 4 << 20

    async def send_64_mib(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % (16 * size))]})
        try:
            for i in range(16):
                await send({"type": "http.response.body", "body": b"x" * size, "more_body": i < 15})
        finally:
            ended.set()

    async with start_server(send_64_mib) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 12)
        writer.write(GET + b"\r\n")
        if reads:
            await reader.readuntil(b"\r\n\r\n")
            assert len(await reader.readexactly(16 * size)) == 16 * size
        else:
            await asyncio.wait_for(ended.wait(), 10)
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await reader.readexactly(17 * size)
        writer.close()


async def test_each_head_of_a_connection_is_counted_by_itself() -> None:
    head = GET + b"X-Long: " + b"x" * (MAX_HEAD_BYTES - 200) + b"\r\n"
    assert (await exchange(head + b"\r\n", head + b"Connection: close\r\n\r\n")).count(b"HTTP/1.1 200 ") == 2


async def test_no_error_is_written_into_a_response_that_has_started() -> None:
    chunked = b"POST /slow HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    response = await exchange(chunked, b"not a size\r\n")
    assert b"started" in response
    assert response.count(b"HTTP/1.1") == 1


H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAA\r\n"
WEBSOCKET = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
UPGRADES = pytest.mark.parametrize("upgrade", [H2C, WEBSOCKET], ids=["h2c", "websocket"])


@UPGRADES
@pytest.mark.parametrize("split", [False, True], ids=["at once", "head first"])
async def test_a_request_that_offers_an_upgrade_is_answered_with_its_body(upgrade: bytes, split: bool) -> None:
    body = b"x" * 70_000
    head = b"POST / HTTP/1.1\r\n" + upgrade + b"Host: a\r\nContent-Length: %d\r\n\r\n" % len(body)
    last = GET + b"Connection: close\r\n\r\n"
    response = await exchange(*([head, body[:9], body[9:], last] if split else [head + body + last]))
    assert response.count(b"HTTP/1.1 200 ") == 2
    assert b"%08d" % len(body) in response
    assert b"101 " not in response


@UPGRADES
async def test_an_upgrade_is_ignored_with_chunks_without_a_body_and_several_times(upgrade: bytes) -> None:
    chunked = CHUNKED.replace(b"Host: a\r\n", b"Host: a\r\n" + upgrade)
    response = await exchange(chunked + b"0\r\n\r\n" + (GET + upgrade + b"\r\n") * 3 + GET + b"Connection: close\r\n\r\n")
    assert response.count(b"HTTP/1.1 200 ") == 5
    assert response.count(b"00000005") == 1
    assert (await exchange(GET + upgrade + b"\r\n", half_close=True)).startswith(b"HTTP/1.1 200 ")


async def test_an_upgrade_keeps_the_other_connection_options() -> None:
    head = b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close, Upgrade\r\nUpgrade: h2c\r\nContent-Length: 3\r\n\r\n"
    response = await exchange(head, b"abc")
    assert response.startswith(b"HTTP/1.1 200 ")
    assert b"connection: close" in response
    assert b"00000003" in response


async def test_the_head_limit_holds_for_a_request_that_offers_an_upgrade() -> None:
    head = GET + H2C + b"X-Long: " + b"x" * (MAX_HEAD_BYTES - 400) + b"\r\n"
    assert (await exchange(head + b"Connection: close\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    assert parse_error(await exchange(head + b"X: " + b"x" * 600 + b"\r\n\r\n"))["status"] == 431


@pytest.mark.parametrize("target", [b"example.org:443", b"/"])
async def test_connect_opens_no_tunnel(target: bytes) -> None:
    response = await exchange(b"CONNECT " + target + b" HTTP/1.1\r\nHost: a\r\n\r\n" + GET + b"\r\n", half_close=True)
    assert response.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 200 "))
    assert response.count(b"HTTP/1.1 200 ") <= 1


async def stream_three_parts(_scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    for part in (b"data: 1\n\n", b"data: 2\n\n", b""):
        await send({"type": "http.response.body", "body": part, "more_body": bool(part)})


@pytest.mark.parametrize("headers", [b"", b"Connection: keep-alive\r\n", b"Host: a\r\n"])
async def test_a_stream_for_an_http_1_0_client_ends_with_the_connection(headers: bytes) -> None:
    response = await exchange(b"GET / HTTP/1.0\r\n" + headers + b"\r\n", app=stream_three_parts)
    head, _, body = response.partition(b"\r\n\r\n")
    assert body == b"data: 1\n\ndata: 2\n\n"
    assert b"transfer-encoding" not in head.lower()
    assert b"connection: close" in head.lower()


async def test_other_responses_for_an_http_1_0_client_keep_their_length() -> None:
    response = await exchange(b"POST / HTTP/1.0\r\nContent-Length: 3\r\n\r\nabc")
    assert response.endswith(b"\r\n\r\n00000003")
    assert b"content-length: 8\r\n" in response
    assert b"transfer-encoding" not in response


async def test_a_stream_for_an_http_1_1_client_is_sent_in_chunks() -> None:
    response = await exchange(GET + b"Connection: close\r\n\r\n", app=stream_three_parts)
    assert b"transfer-encoding: chunked" in response
    assert response.endswith(b"\r\n0\r\n\r\n")


async def test_an_idle_connection_is_closed_after_its_timeout() -> None:
    async with start_server(timeout_keep_alive=1) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET + b"\r\n")
        assert (await asyncio.wait_for(reader.read(), 10)).startswith(b"HTTP/1.1 200 ")
        writer.close()
