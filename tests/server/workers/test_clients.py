"""Addresses at which the gateway reaches a language worker's vLLM."""

import asyncio
import logging
import socket
from pathlib import Path

import pytest

from common import errors
from server.workers.clients import LanguageClient
from tests.ports import free_port
from tests.server.fakes.language_worker import FakeLanguageWorker


def _has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


IPV6 = pytest.mark.skipif(not _has_ipv6(), reason="no IPv6 on this machine")


@pytest.mark.parametrize(
    ("sink", "engine", "reported"),
    [
        ("127.0.0.1", "127.0.0.1", "0.0.0.0"), ("127.0.0.1", "127.0.0.1", "[::]"), ("127.0.0.1", "127.0.0.1", ""),
        ("127.0.0.2", "127.0.0.2", "0.0.0.0"), ("localhost", "127.0.0.1", "0.0.0.0"), ("127.0.0.2", "127.0.0.1", "127.0.0.1"),
        ("unix", "127.0.0.1", "0.0.0.0"), ("127.0.0.1", "127.0.0.1", "localhost"),
        pytest.param("[::1]", "[::1]", "[::]", marks=IPV6), pytest.param("[::1]", "[::1]", "0.0.0.0", marks=IPV6),
    ],
)  # fmt: skip
async def test_an_unspecified_address_of_vllm_is_reached_at_the_sinks_host(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, sink: str, engine: str, reported: str
) -> None:
    port = free_port()
    address = f"unix:{tmp_path}/sink" if sink == "unix" else f"{sink}:{free_port()}"
    language = FakeLanguageWorker(tmp_path, 0, address, f"{engine}:{port}")
    language.sink.http = f"{reported}:{port}"
    await language.start()
    client = LanguageClient(address)
    try:
        await client.describe(20)
        assert (await client.get("/v1/models", 20))["data"]
        assert not caplog.records
    finally:
        await client.close()
        await language.stop()


async def test_a_loopback_address_of_a_remote_vllm_is_logged_as_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    client = LanguageClient("10.0.0.7:50052")
    caplog.set_level(logging.WARNING)
    for reported in ("127.0.0.1:8001", "localhost:8001", "[::1]:8001"):
        await client._connect(reported)
        assert "10.0.0.7:50052" in caplog.text
        assert f"at {reported}, which is not reachable" in caplog.text
        assert "--http=0.0.0.0:8001" in caplog.text
        caplog.clear()
    for reported in ("10.0.0.7:8001", "0.0.0.0:8001", "vllm:8001", "unix:/vllm"):
        await client._connect(reported)
        assert not caplog.records
    await client.close()


async def test_a_kept_connection_that_breaks_is_replaced(tmp_path: Path) -> None:
    """vLLM closes a connection after an internal error, and the next request may be on its way already."""
    served: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(0)
        for body in (b'"first"', b'"second"'):
            head = await reader.readuntil(b"\r\n\r\n")
            if len(served) == 1 and body == b'"second"':
                break
            assert b"POST /a" in head
            await reader.readexactly(5)
            served[-1] += 1
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        writer.close()

    server = await asyncio.start_unix_server(serve, f"{tmp_path}/vllm")
    client = LanguageClient(f"unix:{tmp_path}/sink")
    await client._connect(f"unix:{tmp_path}/vllm")
    for body in (b'"first"', b'"first"', b'"second"'):
        async with client.request("POST", "/a", b"hello", timeout=20) as response:
            assert await response.read() == body
    assert served == [1, 2]
    server.close()
    await server.wait_closed()
    with pytest.raises(errors.WorkerUnavailable):
        async with client.request("POST", "/a", b"hello", timeout=20):
            pass
    await client.close()
