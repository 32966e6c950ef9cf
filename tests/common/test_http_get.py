"""The HTTP client of `dvd health` and `dvd up`."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from common import errors
from common.http_get import http_get
from tests.ports import free_port


@asynccontextmanager
async def server(address: str, reply: bytes) -> AsyncIterator[list[bytes]]:
    """A server that sends `reply` to every connection. Yields the request heads that it received."""
    heads: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(reply)
        writer.close()

    if address.startswith("unix:"):
        listening: asyncio.Server = await asyncio.start_unix_server(answer, address.removeprefix("unix:"))
    else:
        host, _, port = address.rpartition(":")
        listening = await asyncio.start_server(answer, host, int(port))
    async with listening:
        yield heads


@pytest.mark.parametrize("transport", ["tcp", "unix"])
async def test_status_and_body_are_returned(tmp_path: Path, transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # must not be used
    address = f"unix:{tmp_path}/s" if transport == "unix" else f"127.0.0.1:{free_port()}"
    async with server(address, b"HTTP/1.1 503 Busy\r\nContent-Length: 2\r\n\r\nno") as heads:
        assert await http_get(address, "/health?a=1", 20) == (503, b"no")
    assert heads[0].startswith(b"GET /health?a=1 HTTP/1.1\r\n")


@pytest.mark.parametrize("reply", [b"", b"SSH-2.0-OpenSSH\r\n"])
async def test_a_reply_that_is_not_http_is_unavailable(reply: bytes) -> None:
    address = f"127.0.0.1:{free_port()}"
    async with server(address, reply):
        with pytest.raises(errors.Unavailable):
            await http_get(address, "/health", 20)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "unix:/nowhere/socket", f"{'a' * 70}.b:1", "127.0.0.1:99999"])
async def test_an_address_that_cannot_be_reached_is_unavailable(address: str) -> None:
    with pytest.raises(errors.Unavailable):
        await http_get(address, "/health", 20)


async def test_a_server_that_does_not_answer_in_time_is_unavailable(tmp_path: Path) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_unix_server(silent, tmp_path / "s"):
        with pytest.raises(errors.Unavailable, match="timed out"):
            await http_get(f"unix:{tmp_path}/s", "/health", 0.1)
