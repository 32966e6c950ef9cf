"""Pools in front of fake workers, for the tests of probes and compatibility."""

import contextlib
import re
import socket
from collections import Counter
from collections.abc import AsyncIterator, Collection, Sequence
from pathlib import Path

import pytest

from server.metrics import Metrics
from server.workers import discovery, probes
from server.workers.probes import WorkerPools
from tests.server.fakes.language_worker import FakeLanguageWorker
from tests.server.fakes.vision_worker import FakeVisionWorker
from tests.server.fakes.waiting import wait_until

_NEVER_SECONDS = 3600.0


@contextlib.asynccontextmanager
async def start_pools(
    folder: Path, monkeypatch: pytest.MonkeyPatch, timeout: float = 20.0
) -> AsyncIterator[tuple[WorkerPools, FakeVisionWorker, FakeLanguageWorker]]:
    """Yield pools of one vision and one language worker, both up, which only the test probes from then on."""
    monkeypatch.setattr(probes, "POLL_INTERVAL_SECONDS", _NEVER_SECONDS)
    monkeypatch.setattr(probes, "PROBE_TIMEOUT_SECONDS", timeout)
    vision, language = FakeVisionWorker(f"unix:{folder}/vision"), FakeLanguageWorker(folder, 0)
    await vision.start()
    await language.start()
    try:
        async with WorkerPools([vision.address], [language.sink.address], Metrics()) as workers:
            await wait_until(lambda: count_up(workers) == (1, 1), "both workers are up")
            await workers.probe()  # the first round of probes has ended then
            yield workers, vision, language
    finally:
        await vision.stop()
        await language.stop()


def count_up(workers: WorkerPools) -> tuple[int, int]:
    """Return the numbers of vision workers and of language workers that are up."""
    return len(workers.vision.available()), len(workers.language.available())


class FakeNames:
    """The names `vision` and `language`, their addresses, and the fake workers behind these.

    Attributes:
        addresses: Addresses of each name; a name without an entry does not resolve.
        lookups: Number of lookups of each name.
        visions: The vision workers, started.
        language: The language worker, started.
        metrics: The metrics of the pools.
    """

    def __init__(self, folder: Path, vision_count: int) -> None:
        self.addresses: dict[str, list[str]] = {}
        self.lookups: Counter[str] = Counter()
        self.visions = [FakeVisionWorker(f"unix:{folder}/v{i}") for i in range(vision_count)]
        self.language = FakeLanguageWorker(folder, 0)
        self.metrics = Metrics()

    async def resolve(self, name: str, port: int) -> Collection[str]:
        """Resolve a name. Raises `socket.gaierror` if it has no entry."""
        assert port == 1
        self.lookups[name] += 1
        if name not in self.addresses:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return self.addresses[name]

    async def set_visions(self, *indices: int) -> None:
        """Change the vision workers to which the name resolves; return when the pool has the change."""
        self.addresses["vision"] = [self.visions[i].address for i in indices]
        await self.wait_for_lookups()

    async def wait_for_lookups(self) -> None:
        """Wait until the pool has the result of a lookup that starts after this call."""
        before = self.lookups["vision"]  # one lookup may be running, and the third starts after the second is processed
        await wait_until(lambda: self.lookups["vision"] >= before + 3, "the name is looked up again")

    def exported(self) -> dict[str, float]:
        """Return `dvd_worker_up` of each vision worker by its address."""
        lines = self.metrics.text().decode().splitlines()
        matches = (re.fullmatch(r'dvd_worker_up\{address="(.+)",kind="vision"\} (.+)', line) for line in lines)
        return {match[1]: float(match[2]) for match in matches if match}


@contextlib.asynccontextmanager
async def start_named_pools(
    folder: Path, monkeypatch: pytest.MonkeyPatch, vision_count: int = 2, static: Sequence[int] = ()
) -> AsyncIterator[tuple[WorkerPools, FakeNames]]:
    """Yield pools that find their workers by name, without a pause between lookups, and probe new workers only.

    Args:
        folder: Folder for the workers' sockets.
        monkeypatch: Sets the intervals.
        vision_count: Number of vision workers that run.
        static: Indices of those that are listed by address besides the name.
    """
    monkeypatch.setattr(probes, "POLL_INTERVAL_SECONDS", _NEVER_SECONDS)
    monkeypatch.setattr(probes, "PROBE_TIMEOUT_SECONDS", 20.0)
    monkeypatch.setattr(discovery, "RESOLVE_INTERVAL_SECONDS", 0.01)
    names = FakeNames(folder, vision_count)
    fakes: list[FakeVisionWorker | FakeLanguageWorker] = [*names.visions, names.language]
    for worker in fakes:
        await worker.start()
    names.addresses["language"] = [names.language.sink.address]
    visions = [*(names.visions[i].address for i in static), "dns:vision:1"]
    try:
        async with WorkerPools(visions, ["dns:language:1"], names.metrics, names.resolve) as workers:
            await wait_until(lambda: workers.language.available(), "the language worker is up")
            yield workers, names
    finally:
        for worker in fakes:
            await worker.stop()
