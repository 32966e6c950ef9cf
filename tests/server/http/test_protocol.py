"""Over real sockets, before an application that says how much it read."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn

from server.http.protocol import MAX_HEAD_BYTES, uvicorn_config

GET = b"GET / HTTP/1.1\r\nHost: a\r\n"


async def application(scope: Any, receive: Any, send: Any) -> None:
    size, more = 0, True
    if scope["path"] == "/slow":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    if scope["path"] != "/slow":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"8")]})
        await send({"type": "http.response.body", "body": b"%08d" % size})


@asynccontextmanager
async def serving(app: Callable[..., Any] = application) -> AsyncIterator[int]:
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn_config(app, 1, lifespan="off"))
    running = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        await running


async def said(*sent: bytes, ends: bool = True) -> bytes:
    """All that is answered until the server hangs up, or has answered what was sent."""
    async with serving() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        reading = asyncio.create_task(reader.read())
        for some in sent:
            if reading.done():
                break
            writer.write(some)
            await asyncio.sleep(0.02)
        if not ends:
            writer.write_eof()
        try:
            return await asyncio.wait_for(reading, 10)
        finally:
            writer.close()


def error(answer: bytes) -> dict[str, Any]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"Content-Length: %d\r\n" % len(body) in head
    found: dict[str, Any] = json.loads(body)["error"]
    return {"status": int(head.split()[1]), **found}


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(lambda size: b"X-Long: " + b"x" * size + b"\r\n", id="one header"),
        pytest.param(lambda size: b"".join(b"X-%07d: abcde\r\n" % i for i in range(size // 18)), id="many headers"),
    ],
)
async def test_a_head_may_be_so_large_and_no_larger(head: Callable[[int], bytes]) -> None:
    assert (await said(GET + head(MAX_HEAD_BYTES - 200) + b"Connection: close\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    refused = error(await said(GET + head(MAX_HEAD_BYTES + 200) + b"\r\n"))
    assert (refused["status"], refused["code"]) == (431, "head_too_large")
    assert str(MAX_HEAD_BYTES) in refused["message"]


async def test_so_is_a_path() -> None:
    assert error(await said(b"GET /" + b"x" * MAX_HEAD_BYTES + b" HTTP/1.1\r\nHost: a\r\n\r\n"))["status"] == 431


@pytest.mark.parametrize("some", [b"x" * 9_000, b"X-A: b\r\n" * 1_000])
async def test_a_head_that_never_ends_is_refused_before_it_ends(some: bytes) -> None:
    refused = error(await said(GET, *([b"X-Long: "] if some[0] == ord("x") else []), *[some] * 10))
    assert refused["code"] == "head_too_large"


@pytest.mark.parametrize(
    "sent",
    [b"\x16\x03\x01\x02\x00\x01", b"PROXY TCP4 1.2.3.4\r\n", b"hello\r\n\r\n", b"GET / HTTP/1.1\r\nNo colon\r\n\r\n"],
)
async def test_what_is_no_http_is_answered_in_the_shape_of_all_errors(sent: bytes) -> None:
    refused = error(await said(sent))
    assert (refused["status"], refused["type"], refused["code"]) == (400, "invalid_request_error", "invalid_request")
    assert "TLS" in refused["message"]


async def test_a_large_body_does_not_count_nor_does_what_follows_it() -> None:
    body = b"x" * 5 * MAX_HEAD_BYTES
    post = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body)
    answer = await said(post + body + GET + b"Connection: close\r\n\r\n")
    assert answer.count(b"HTTP/1.1 200 ") == 2
    assert b"%08d" % len(body) in answer


CHUNKED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n"


async def test_trailers_are_read_over() -> None:
    trailers = b"a: b\r\nX-Long: " + b"x" * 1000 + b"\r\n"
    answer = await said(CHUNKED + b"0\r\n", trailers, b"\r\n" + GET, b"Connection: close\r\n\r\n")
    assert answer.count(b"HTTP/1.1 200 ") == 2
    assert b"00000005" in answer


@pytest.mark.parametrize(
    ("begins", "some"),
    [
        pytest.param(b"0\r\n", b"a: b\r\n" * 500, id="many trailers"),
        pytest.param(b"0\r\na: ", b"x" * 3000, id="one trailer"),
        pytest.param(b"5;", b"x" * 3000, id="an extension"),
    ],
)
async def test_what_follows_a_body_and_never_ends_is_cut(begins: bytes, some: bytes) -> None:
    sent = [some] * (4 * MAX_HEAD_BYTES // len(some))
    assert b" 200 " not in await said(CHUNKED, begins, *sent)


@pytest.mark.parametrize("way", ["abort", "end"])
async def test_a_caller_that_reads_nothing_is_hung_up_on(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether its answer would ever end or not; one that reads gets all of it."""
    monkeypatch.setattr("server.http.protocol.STALL_TIMEOUT_SECONDS", 0.3)
    ended, size = asyncio.Event(), 4 << 20

    async def endless(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % (16 * size))]})
        try:
            for i in range(16):
                await send({"type": "http.response.body", "body": b"x" * size, "more_body": i < 15})
        finally:
            ended.set()

    async with serving(endless) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 12)
        writer.write(GET + b"\r\n")
        if way == "end":
            await reader.readuntil(b"\r\n\r\n")
            assert len(await reader.readexactly(16 * size)) == 16 * size
        else:
            await asyncio.wait_for(ended.wait(), 10)
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await reader.readexactly(17 * size)
        writer.close()


async def test_the_next_head_counts_from_nothing() -> None:
    head = GET + b"X-Long: " + b"x" * (MAX_HEAD_BYTES - 200) + b"\r\n"
    assert (await said(head + b"\r\n", head + b"Connection: close\r\n\r\n")).count(b"HTTP/1.1 200 ") == 2


async def test_an_answer_that_has_begun_is_cut_not_mixed_with_an_error() -> None:
    chunked = b"POST /slow HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = await said(chunked, b"no size\r\n")
    assert b"begun" in answer
    assert answer.count(b"HTTP/1.1") == 1


async def test_a_request_to_speak_websocket_is_an_ordinary_one() -> None:
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    assert (await said(GET + upgrade, ends=False)).startswith(b"HTTP/1.1 200 ")
