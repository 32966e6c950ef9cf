"""Senders and sinks are killed at random moments, while a reader maps what is visible. Nothing leaks, and no byte is wrong."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from common import errors
from lm_worker.pins import Pins
from lm_worker.shared_memory import map_embedding
from lm_worker.slot_file import DESCRIPTORS
from tests.common.transport.sender import MAX_ROWS
from tests.common.transport.sinks import ROW_BYTES, TRANSPORTS, RunningSink, header_of, is_right, start_sink, stored_right
from tests.common.transport.test_contract import describe, send
from vision_worker.delivery import SinkChannels

BUDGET = 8 * MAX_ROWS * ROW_BYTES
KILLS = int(os.environ.get("DVD_TEST_KILLS", "0"))
CASES = [
    *(pytest.param(transport, 1, id=transport) for transport in TRANSPORTS),
    *(
        pytest.param(transport, KILLS or kills, id=f"{transport}, many", marks=pytest.mark.long)
        for transport, kills in {"shm": 8, "tcp": 8, "grpc": 4}.items()
    ),
]
"""Transports and numbers of kills, of senders and of sinks each: one in every run, more in `make test-long`.

A kill takes two to four seconds on a busy machine. The environment variable DVD_TEST_KILLS sets another number.
"""
STALL_SECONDS = 60.0
"""No delivery ends because the machine is busy."""
MAX_SECONDS = 0.3
"""Latest moment of a kill after the first embedding has arrived: time for dozens of deliveries."""


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in shared memory, where a language worker's is."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="dvd-test-") as folder:
        yield Path(folder) / "store"


class Reader:
    """Pins, maps and unpins visible embeddings, and keeps the mappings, as vLLM's encoder cache does."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._pins = folder, Pins(folder)
        self._mapped: list[tuple[str, memoryview]] = []

    def read(self, key: str) -> None:
        if self._pins.pin(key):
            _, mapping = map_embedding(self._pins.path(key))
            self._pins.unpin(key)
            self._mapped.append((key, memoryview(mapping)))

    def check(self, keep: int) -> None:
        """Check all mappings, and drop the oldest."""
        for key, mapping in self._mapped:
            assert is_right(mapping, key), f"{key} was overwritten while it was mapped"
        del self._mapped[: max(0, len(self._mapped) - keep)]


def start_sender(transport: str, sink: RunningSink, first: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "tests.common.transport.sender", transport, sink.options.listen, str(first)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


async def read_until_killed(process: "subprocess.Popen[bytes]", victim: int, sink: RunningSink, seconds: float) -> int:
    """Read what arrives, and kill a process at a moment after the sender's first embedding. Returns how many were read."""
    reader, loop = Reader(sink.folder), asyncio.get_running_loop()
    assert process.stdout is not None
    assert await asyncio.to_thread(process.stdout.readline), "the sender must come to its first embedding"
    end, count = loop.time() + seconds, 0
    while loop.time() < end:
        for key in random.sample(keys := sink.embeddings(), min(2, len(keys))):
            reader.read(key)
            count += 1
        reader.check(keep=3)
        await asyncio.sleep(0)
    os.kill(victim, signal.SIGKILL)
    reader.check(keep=3)
    for _ in range(50):  # senders that were killed may not have written their last byte yet
        reader.check(keep=3)
    reader.check(keep=0)
    return count


async def expect_only_embeddings(sink: RunningSink) -> None:
    """Wait until the sink has noticed the end of its senders, and check that what it uses is what is visible."""
    async with asyncio.timeout(30):
        while any((sink.folder / ".incoming").iterdir()):
            await asyncio.sleep(0.01)
    keys = sink.embeddings()
    assert all(stored_right(sink, key) for key in keys)
    assert (await describe(sink)).used_bytes == sum((sink.folder / key).stat().st_size for key in keys)
    assert sum(file.stat().st_size for file in sink.files()) <= BUDGET
    assert list((sink.folder / ".pinned").iterdir()) == []


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("transport", "kills"), CASES)
async def test_senders_that_are_killed_leave_nothing_behind(transport: str, kills: int, memory: Path) -> None:
    moments, count = random.Random(26), 0
    with start_sink(memory, transport, BUDGET, STALL_SECONDS) as sink:
        await describe(sink)
        for kill in range(kills):
            sender = start_sender(transport, sink, first=kill * 100_000)
            count += await read_until_killed(sender, sender.pid, sink, moments.uniform(0, MAX_SECONDS))
            sender.communicate()
            await expect_only_embeddings(sink)
            of_files = DESCRIPTORS * len(sink.files())
            assert len(os.listdir(f"/proc/{sink.process.pid}/fd")) < 60 + of_files, "descriptors leak"
        assert count
        async with SinkChannels(transports=TRANSPORTS[transport]) as sinks:
            await send(sinks, sink, header_of(99_000_000, MAX_ROWS))


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("transport", "kills"), CASES)
async def test_sinks_that_are_killed_leave_nothing_visible_that_is_wrong(transport: str, kills: int, memory: Path) -> None:
    moments = random.Random(62)
    for kill in range(kills):
        with start_sink(memory, transport, BUDGET, STALL_SECONDS) as sink:
            await describe(sink)
            sender = start_sender(transport, sink, first=kill * 100_000)
            await read_until_killed(sender, sink.process.pid, sink, moments.uniform(0, MAX_SECONDS))
            sink.process.wait()
            assert all(stored_right(sink, key) for key in sink.embeddings())
            await asyncio.to_thread(sender.communicate, timeout=60)
            assert sender.returncode, "the sender learns that its deliveries failed"


async def test_a_sender_is_told_at_once_that_its_sink_was_killed(memory: Path) -> None:
    for transport in TRANSPORTS:
        with start_sink(memory, transport, BUDGET) as sink:
            async with SinkChannels(transports=TRANSPORTS[transport]) as sinks:
                await describe(sink)
                await send(sinks, sink, header_of(1, 1))
                sink.process.kill()
                sink.process.wait()
                with pytest.raises(errors.SinkUnavailable):
                    async with asyncio.timeout(30):
                        await send(sinks, sink, header_of(2, MAX_ROWS))
