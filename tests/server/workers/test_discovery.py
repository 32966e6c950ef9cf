"""Discovery of workers by DNS names."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from server.workers import discovery
from tests.ports import free_port
from tests.server.fakes.handlers import event_stream
from tests.server.fakes.language_worker import FakeLanguageWorker
from tests.server.fakes.requests import image_file, image_part
from tests.server.fakes.stack import Stack, start_stack
from tests.server.fakes.vision_worker import FakeVisionWorker
from tests.server.fakes.vllm import EVENTS
from tests.server.fakes.waiting import wait_until

NAME = "dns:vision:50051"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (NAME, ("vision", 50051)), ("dns:a.b.c.:1", ("a.b.c.", 1)),
        ("vision:50051", None), ("dns:50051", None), ("unix:/dns:a:1", None), ("[::1]:5", None),
    ],
)  # fmt: skip
def test_names_are_distinguished_from_static_addresses(address: str, expected: tuple[str, int] | None) -> None:
    assert discovery.parse_name(address) == expected


async def test_names_are_resolved_by_the_system() -> None:
    assert "127.0.0.1:5" in await discovery.resolve("localhost", 5)
    with pytest.raises(OSError, match=r"."):
        await discovery.resolve("nowhere.invalid", 5)


async def test_each_distinct_address_is_returned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    address_infos: list[Any] = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fd00::2", 5, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.2", 5)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", 5)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", 5)),
    ]

    async def getaddrinfo(*_: Any, **__: Any) -> list[Any]:
        return address_infos

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    assert await discovery.resolve("name", 5) == ["10.0.0.1:5", "10.0.0.2:5", "[fd00::2]:5"]


class FakeResolver:
    """A resolver with results in turn, of which the last repeats, and a receiver of the addresses.

    Attributes:
        lookups: Name and port of each lookup.
        received: The addresses that `receive` accepted.
        failures: Number of calls of `receive` that raise before it accepts addresses.
    """

    def __init__(self, *results: Collection[str] | BaseException) -> None:
        self.results = list(results)
        self.lookups: list[tuple[str, int]] = []
        self.received: list[Collection[str]] = []
        self.failures = 0

    async def resolve(self, name: str, port: int) -> Collection[str]:
        self.lookups.append((name, port))
        result = self.results.pop(0) if len(self.results) > 1 else self.results[0]
        if isinstance(result, BaseException):
            raise result
        return result

    async def receive(self, addresses: Collection[str]) -> None:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("cannot update")
        self.received.append(addresses)

    async def watch(self, lookups: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Run `discovery.watch` until it has looked up the name so many times."""
        monkeypatch.setattr(discovery, "RESOLVE_INTERVAL_SECONDS", 0.0)
        watching = asyncio.create_task(discovery.watch(NAME, self.resolve, self.receive))
        await wait_until(lambda: len(self.lookups) >= lookups or watching.done(), "the lookups are made")
        watching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await watching


TEMPORARY_FAILURE = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


async def test_a_failing_resolver_is_logged_once_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "server.workers.discovery")
    invalid_name = UnicodeError("label too long")
    resolver = FakeResolver(
        TEMPORARY_FAILURE, TEMPORARY_FAILURE, ["a:1"], TEMPORARY_FAILURE, invalid_name, TimeoutError(), ["a:1", "b:1"]
    )
    await resolver.watch(8, monkeypatch)
    assert resolver.lookups[0] == ("vision", 50051)
    assert resolver.received[:2] == [["a:1"], ["a:1", "b:1"]]
    messages = [record.getMessage() for record in caplog.records]
    assert [("does not" in text, NAME in text) for text in messages] == [(True, True), (False, True)] * 2
    assert "Temporary failure" in messages[0]


@pytest.mark.parametrize("error_number", [socket.EAI_NONAME, socket.EAI_NODATA])
async def test_a_name_without_addresses_gives_an_empty_list(error_number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    resolver = FakeResolver(["a:1"], socket.gaierror(error_number, "no such name"))
    await resolver.watch(2, monkeypatch)
    assert list(map(list, resolver.received[:2])) == [["a:1"], []]


async def test_an_error_of_the_receiver_does_not_end_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    resolver = FakeResolver(["a:1"])
    resolver.failures = 2
    await resolver.watch(4, monkeypatch)
    assert resolver.received


class FakeDNS:
    """Replaces the event loop's lookups of some names. Everything after the lookup is real.

    Attributes:
        names: Addresses of each name; other names are resolved by the system.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **names: list[str]) -> None:
        self.names = names
        monkeypatch.setattr(discovery, "RESOLVE_INTERVAL_SECONDS", 0.05)
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", self._lookup)

    async def _lookup(self, host: str, port: int, **options: Any) -> list[Any]:
        if host not in self.names:  # the connections of the test's own HTTP client
            return socket.getaddrinfo(host, port, **options)
        if not self.names[host]:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in self.names[host]]


HOSTS = ("127.0.0.1", "127.0.0.2")


@dataclass(frozen=True)
class Ports:
    """Ports of the servers of each worker, the same on every host."""

    vision: int = field(default_factory=free_port)
    sink: int = field(default_factory=free_port)
    http: int = field(default_factory=free_port)


@pytest.fixture
def ports() -> Ports:
    return Ports()


def make_workers(host: str, ports: Ports) -> tuple[FakeVisionWorker, FakeLanguageWorker]:
    """Return a worker of each kind as in containers: with fixed ports, and with vLLM on all addresses of the machine."""
    language = FakeLanguageWorker(Path("/nowhere"), 0, f"{host}:{ports.sink}", f"{host}:{ports.http}")
    language.sink.http = f"0.0.0.0:{ports.http}"
    return FakeVisionWorker(f"{host}:{ports.vision}"), language


@contextlib.asynccontextmanager
async def start_named_stack(ports: Ports) -> AsyncIterator[Stack]:
    """Yield a gateway that finds its workers by name. A worker of each kind runs on every host."""
    visions, languages = zip(*(make_workers(host, ports) for host in HOSTS), strict=True)
    addresses: dict[str, Any] = {
        "vision_workers": [f"dns:vision:{ports.vision}"],
        "language_workers": [f"dns:language:{ports.sink}"],
    }
    async with start_stack(Path("/nowhere"), list(visions), list(languages), **addresses) as stack:
        yield stack


async def test_workers_are_found_by_the_systems_resolver(tmp_path: Path, ports: Ports) -> None:
    """Two vision workers at localhost that differ by their ports, and a language worker that receives embeddings over TCP."""
    vision_ports = (ports.vision, free_port())
    visions = [FakeVisionWorker(f"127.0.0.1:{port}") for port in vision_ports]
    _, language = make_workers("127.0.0.1", ports)
    addresses: dict[str, Any] = {
        "vision_workers": [f"dns:localhost:{port}" for port in vision_ports],
        "language_workers": [f"dns:localhost:{ports.sink}"],
    }
    async with start_stack(tmp_path, visions, [language], **addresses) as stack:
        await stack.wait_for_metric("dvd_worker_up", 3)
        for i in range(20):
            assert (await stack.chat(image_part(image_file(i)))).status == 200
        assert all(worker.calls for worker in stack.vision_workers)
        assert {call.deliver_to for worker in stack.vision_workers for call in worker.calls} == {f"127.0.0.1:{ports.sink}"}
        assert len(stack.sink.rows) == 20


async def test_requests_are_spread_over_all_addresses_of_a_name(monkeypatch: pytest.MonkeyPatch, ports: Ports) -> None:
    FakeDNS(monkeypatch, vision=[*HOSTS], language=[*HOSTS])
    async with start_named_stack(ports) as stack:
        await stack.wait_for_metric("dvd_worker_up", 4)
        for i in range(20):
            assert (await stack.chat(image_part(image_file(i)))).status == 200
        assert all(worker.calls for worker in stack.vision_workers)
        assert all(worker.engine.requests for worker in stack.language_workers), "each at its own host"
        assert {call.deliver_to for worker in stack.vision_workers for call in worker.calls} == {
            f"{host}:{ports.sink}" for host in HOSTS
        }


async def test_the_gateway_starts_before_the_names_resolve(monkeypatch: pytest.MonkeyPatch, ports: Ports) -> None:
    dns = FakeDNS(monkeypatch, vision=[], language=[])
    timer = asyncio.get_running_loop().call_later(0.3, dns.names.update, {"vision": [HOSTS[0]], "language": [HOSTS[0]]})
    async with start_named_stack(ports) as stack:  # returns when the gateway is ready
        assert timer.when() <= asyncio.get_running_loop().time()
        await stack.wait_for_metric("dvd_worker_up", 2)
        dns.names["vision"] = [*HOSTS]
        await stack.wait_for_metric("dvd_worker_up", 3)


async def test_a_stream_continues_after_its_worker_is_removed(monkeypatch: pytest.MonkeyPatch, ports: Ports) -> None:
    dns = FakeDNS(monkeypatch, vision=[HOSTS[0]], language=[HOSTS[0]])
    async with start_named_stack(ports) as stack:
        may_end = asyncio.Event()

        async def wait_for_event(_request: Any) -> Any:
            await may_end.wait()

        stack.engine.respond = event_stream(*EVENTS[:2], then=wait_for_event)
        streaming = asyncio.create_task(stack.chat(image_part(image_file()), stream=True))
        await wait_until(lambda: stack.engine.requests, "the engine has the request")
        dns.names["language"] = [HOSTS[1]]
        await stack.sink.stop()
        metric = f'dvd_worker_up{{address="{HOSTS[0]}:{ports.sink}"'
        await wait_until(lambda: is_not_exported(stack, metric), "the worker is removed")
        await stack.wait_until_ready()
        assert (await stack.chat(image_part(image_file(1)))).status == 200, "the other worker serves"
        assert not streaming.done()
        may_end.set()
        response = await streaming
        assert (response.status, response.body) == (200, b"".join(EVENTS[:2]))


async def is_not_exported(stack: Stack, metric: str) -> bool:
    return metric not in (await stack.get("/metrics")).body.decode()
