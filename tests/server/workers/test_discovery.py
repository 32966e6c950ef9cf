"""Names that stand for workers."""

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
    ("address", "stands"),
    [
        (NAME, ("vision", 50051)), ("dns:a.b.c.:1", ("a.b.c.", 1)),
        ("vision:50051", None), ("dns:50051", None), ("unix:/dns:a:1", None), ("[::1]:5", None),
    ],
)  # fmt: skip
def test_a_name_is_told_from_an_address(address: str, stands: tuple[str, int] | None) -> None:
    assert discovery.parse_name(address) == stands


async def test_the_systems_resolver_is_asked() -> None:
    assert "127.0.0.1:5" in await discovery.resolve("localhost", 5)
    with pytest.raises(OSError, match=r"."):
        await discovery.resolve("nowhere.invalid", 5)


async def test_each_address_of_either_family_is_one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fd00::2", 5, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.2", 5)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", 5)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", 5)),
    ]

    async def getaddrinfo(*_: Any, **__: Any) -> list[Any]:
        return found

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    assert await discovery.resolve("name", 5) == ["10.0.0.1:5", "10.0.0.2:5", "[fd00::2]:5"]


class Zone:
    """A resolver that answers in turn, the last for ever, and who listens to `watch`."""

    def __init__(self, *answers: Collection[str] | BaseException) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, int]] = []
        self.told: list[Collection[str]] = []
        self.refuses = 0

    async def resolve(self, name: str, port: int) -> Collection[str]:
        self.asked.append((name, port))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, BaseException):
            raise answer
        return answer

    async def tell(self, addresses: Collection[str]) -> None:
        if self.refuses:
            self.refuses -= 1
            raise RuntimeError("not now")
        self.told.append(addresses)

    async def asked_times(self, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(discovery, "RESOLVE_INTERVAL_SECONDS", 0.0)
        watching = asyncio.create_task(discovery.watch(NAME, self.resolve, self.tell))
        await wait_until(lambda: len(self.asked) >= count or watching.done(), "asked so often")
        watching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await watching


FAILURE = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


async def test_a_resolver_that_fails_is_complained_of_once_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "server.workers.discovery")
    bad = UnicodeError("label too long")
    zone = Zone(FAILURE, FAILURE, ["a:1"], FAILURE, bad, TimeoutError(), ["a:1", "b:1"])
    await zone.asked_times(8, monkeypatch)
    assert zone.asked[0] == ("vision", 50051)
    assert zone.told[:2] == [["a:1"], ["a:1", "b:1"]]
    said = [record.getMessage() for record in caplog.records]
    assert [("does not" in text, NAME in text) for text in said] == [(True, True), (False, True)] * 2
    assert "Temporary failure" in said[0]


@pytest.mark.parametrize("number", [socket.EAI_NONAME, socket.EAI_NODATA])
async def test_a_name_without_an_address_is_an_answer(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    zone = Zone(["a:1"], socket.gaierror(number, "no such name"))
    await zone.asked_times(2, monkeypatch)
    assert list(map(list, zone.told[:2])) == [["a:1"], []]


async def test_what_goes_wrong_while_taking_over_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    zone = Zone(["a:1"])
    zone.refuses = 2
    await zone.asked_times(4, monkeypatch)
    assert zone.told


class Hosts:
    """The system's resolver as the event loop asks it, with names of a test's own. Everything after the lookup is real."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **names: list[str]) -> None:
        self.names = names
        monkeypatch.setattr(discovery, "RESOLVE_INTERVAL_SECONDS", 0.05)
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", self._answer)

    async def _answer(self, host: str, port: int, **rest: Any) -> list[Any]:
        if host not in self.names:  # of others in this loop: the callers' own connections
            return socket.getaddrinfo(host, port, **rest)
        if not self.names[host]:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in self.names[host]]


HOSTS = ("127.0.0.1", "127.0.0.2")


@dataclass(frozen=True)
class Ports:
    """Of a kind of worker, the same on every host."""

    vision: int = field(default_factory=free_port)
    sink: int = field(default_factory=free_port)
    http: int = field(default_factory=free_port)


@pytest.fixture
def ports() -> Ports:
    return Ports()


def at(host: str, ports: Ports) -> tuple[FakeVisionWorker, FakeLanguageWorker]:
    """A worker of each kind as a container has them: fixed ports, and vLLM on every address of the machine."""
    language = FakeLanguageWorker(Path("/nowhere"), 0, f"{host}:{ports.sink}", f"{host}:{ports.http}")
    language.sink.http = f"0.0.0.0:{ports.http}"
    return FakeVisionWorker(f"{host}:{ports.vision}"), language


@contextlib.asynccontextmanager
async def named(ports: Ports) -> AsyncIterator[Stack]:
    """A gateway that knows its workers by name; all of them run."""
    visions, languages = zip(*(at(host, ports) for host in HOSTS), strict=True)
    lists = {"vision_workers": [f"dns:vision:{ports.vision}"], "language_workers": [f"dns:language:{ports.sink}"]}
    async with start_stack(Path("/nowhere"), list(visions), list(languages), **lists) as stack:
        yield stack


async def test_workers_by_the_systems_resolver(tmp_path: Path, ports: Ports) -> None:
    """Two servers behind localhost, told apart by their ports, and a language worker whose embeddings come by TCP."""
    second = free_port()
    visions, (_, language) = [FakeVisionWorker(f"127.0.0.1:{port}") for port in (ports.vision, second)], at("127.0.0.1", ports)
    lists = {"vision_workers": [f"dns:localhost:{port}" for port in (ports.vision, second)]}
    async with start_stack(tmp_path, visions, [language], **lists, language_workers=[f"dns:localhost:{ports.sink}"]) as stack:
        await stack.wait_for_metric("dvd_worker_up", 3)
        for i in range(20):
            assert (await stack.chat(image_part(image_file(i)))).status == 200
        assert all(peer.calls for peer in stack.vision_workers)
        assert {call.deliver_to for peer in stack.vision_workers for call in peer.calls} == {f"127.0.0.1:{ports.sink}"}
        assert len(stack.sink.rows) == 20


async def test_replicas_of_one_name_share_the_work(monkeypatch: pytest.MonkeyPatch, ports: Ports) -> None:
    Hosts(monkeypatch, vision=[*HOSTS], language=[*HOSTS])
    async with named(ports) as stack:
        await stack.wait_for_metric("dvd_worker_up", 4)
        for i in range(20):
            assert (await stack.chat(image_part(image_file(i)))).status == 200
        assert all(peer.calls for peer in stack.vision_workers)
        assert all(peer.engine.requests for peer in stack.language_workers), "each at its own address, though all say 0.0.0.0"
        assert {call.deliver_to for peer in stack.vision_workers for call in peer.calls} == {
            f"{host}:{ports.sink}" for host in HOSTS
        }


async def test_the_gateway_starts_before_its_workers_have_names(monkeypatch: pytest.MonkeyPatch, ports: Ports) -> None:
    hosts = Hosts(monkeypatch, vision=[], language=[])
    name_them = asyncio.get_running_loop().call_later(0.3, hosts.names.update, {"vision": [HOSTS[0]], "language": [HOSTS[0]]})
    async with named(ports) as stack:  # this waits until it is ready
        assert name_them.when() <= asyncio.get_running_loop().time()
        await stack.wait_for_metric("dvd_worker_up", 2)
        hosts.names["vision"] = [*HOSTS]
        await stack.wait_for_metric("dvd_worker_up", 3)


async def test_an_answer_that_has_begun_ends_though_its_worker_has_left(monkeypatch: pytest.MonkeyPatch, ports: Ports) -> None:
    hosts = Hosts(monkeypatch, vision=[HOSTS[0]], language=[HOSTS[0]])
    async with named(ports) as stack:
        more = asyncio.Event()

        async def later(_request: Any) -> Any:
            await more.wait()

        stack.engine.respond = event_stream(*EVENTS[:2], then=later)
        asked = asyncio.create_task(stack.chat(image_part(image_file()), stream=True))
        await wait_until(lambda: stack.engine.requests, "the engine answers")
        hosts.names["language"] = [HOSTS[1]]
        await stack.sink.stop()
        left = f'dvd_worker_up{{address="{HOSTS[0]}:{ports.sink}"'
        await wait_until(lambda: gone(stack, left), "it is no longer shown")
        await stack.wait_until_ready()
        assert (await stack.chat(image_part(image_file(1)))).status == 200, "the other one serves"
        assert not asked.done()
        more.set()
        answer = await asked
        assert (answer.status, answer.body) == (200, b"".join(EVENTS[:2]))


async def gone(stack: Stack, metric: str) -> bool:
    return metric not in (await stack.get("/metrics")).body.decode()
