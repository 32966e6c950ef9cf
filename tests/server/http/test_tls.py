"""Strangers at a TLS port who do not finish a handshake, over real sockets and on both event loops that the gateway runs on."""

import asyncio
import contextlib
import os
import resource
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop

from server.config import GatewayOptions
from server.http.server import GracefulServer
from server.metrics import Metrics
from server.processes import create_server
from tests.certificates import Authority
from tests.server.fakes.waiting import wait_until

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}
GET = b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n"


class Gateway:
    """A gateway that serves HTTPS in this process."""

    def __init__(self, server: GracefulServer, metrics: Metrics, address: tuple[str, int], context: ssl.SSLContext) -> None:
        self.server, self._metrics, self.address, self._context = server, metrics, address, context

    def sample(self, name: str, **labels: str) -> float:
        return self._metrics.registry.get_sample_value(name, labels) or 0

    async def assert_serves(self) -> None:
        """Assert that a good request on a new connection is answered."""
        reader, writer = await asyncio.open_connection(*self.address, ssl=self._context)
        writer.write(GET)
        async with asyncio.timeout(60):
            assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
        await close(writer)

    async def connect_silently(self, count: int, data: bytes = b"") -> list[asyncio.StreamWriter]:
        """Open connections that send this, which is no whole handshake."""
        writers = []
        for _ in range(count):
            _, writer = await asyncio.open_connection(*self.address)
            writer.write(data)
            writers.append(writer)
        return writers


async def close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def client_hello() -> bytes:
    """Return the first half of a handshake."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="a")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


@contextlib.asynccontextmanager
async def start_gateway(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> AsyncIterator[Gateway]:
    metrics, authority = Metrics(), Authority(folder)
    monkeypatch.setattr("server.processes.Metrics", lambda: metrics)
    tls = authority.issue("gateway")
    addresses: dict[str, Any] = {"vision_workers": ["127.0.0.1:9"], "language_workers": ["127.0.0.1:9"]}
    paths: dict[str, Any] = {"tls_cert": tls.cert, "tls_key": tls.key, "tls_ca": tls.ca}
    server = create_server(GatewayOptions(**addresses, **paths, shutdown_delay=0.0, **options))
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    await wait_until(lambda: server.started or serving.done(), "the gateway listens")
    try:
        yield Gateway(server, metrics, address, ssl.create_default_context(cafile=str(authority.file)))
    finally:
        server.end_now()
        await serving


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, None]], None]:
    def run_in_loop(test: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
            runner.run(test)

    return run_in_loop


@pytest.mark.parametrize("make", [bytes, lambda: client_hello()[:40], client_hello], ids=["nothing", "a part", "one half"])
def test_a_handshake_that_stops_is_counted_and_ends(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], bytes]
) -> None:
    async def test() -> None:
        async with start_gateway(tmp_path, monkeypatch, head_timeout=2.0) as gateway:
            await gateway.assert_serves()
            descriptors = len(os.listdir("/proc/self/fd"))
            strangers = await gateway.connect_silently(30, make())
            await wait_until(lambda: gateway.sample("dvd_connections") >= 30, "all of them are counted")
            await gateway.assert_serves()
            failed = "dvd_tls_handshakes_failed_total"
            await wait_until(lambda: gateway.sample(failed, reason="timeout") == 30, "their time is over")
            await wait_until(lambda: gateway.sample("dvd_connections") == 0, "their connections are closed")
            for writer in strangers:
                await close(writer)
            await wait_until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors, "no descriptor is left behind")
            await gateway.assert_serves()

    run(test())


def test_more_silent_connections_than_there_may_be_do_not_keep_others_out(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with start_gateway(tmp_path, monkeypatch, head_timeout=600.0, max_connections=20) as gateway:
            strangers = await gateway.connect_silently(100)
            for _ in range(5):
                await gateway.assert_serves()
                assert gateway.sample("dvd_connections") <= 20
            assert gateway.sample("dvd_requests_refused_total", resource="connections") == 0
            for writer in strangers:
                await close(writer)
            await wait_until(lambda: gateway.sample("dvd_connections") == 0, "all connections are closed")

    run(test())


def test_what_is_not_tls_ends_at_once(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with start_gateway(tmp_path, monkeypatch, head_timeout=600.0) as gateway:
            for data in (GET, bytes(100_000)):
                reader, writer = await asyncio.open_connection(*gateway.address)
                with contextlib.suppress(OSError):
                    writer.write(data)
                    async with asyncio.timeout(60):
                        assert b"HTTP" not in await reader.read()
                await close(writer)
            await wait_until(lambda: gateway.sample("dvd_tls_handshakes_failed_total", reason="error") == 2, "both are counted")
            await gateway.assert_serves()

    run(test())


def test_handshakes_do_not_outlive_the_gateway(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with start_gateway(tmp_path, monkeypatch, head_timeout=600.0) as gateway:
            strangers = await gateway.connect_silently(3)
            await wait_until(lambda: gateway.sample("dvd_connections") == 3, "all of them are counted")
        await wait_until(lambda: gateway.sample("dvd_connections") == 0, "all of them are closed")
        for writer in strangers:
            await close(writer)
        with pytest.raises(OSError, match=r".*"):
            await asyncio.open_connection(*gateway.address)

    run(test())


def test_a_gateway_without_descriptors_accepts_again_later(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with start_gateway(tmp_path, monkeypatch) as gateway:
            monkeypatch.setattr("server.http.tls._EXHAUSTED_SECONDS", 0.1)
            with contextlib.ExitStack() as files, socket.socket() as client:
                client.setblocking(False)
                with contextlib.suppress(OSError):
                    while True:
                        files.callback(os.close, os.dup(0))
                with contextlib.suppress(BlockingIOError):
                    client.connect(gateway.address)
                await asyncio.sleep(0.3)
                assert gateway.sample("dvd_connections") == 0
            await gateway.assert_serves()

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr("server.processes.connection_limit", lambda limit: limit)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, soft), hard))
    try:
        run(test())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
