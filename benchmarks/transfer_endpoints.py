"""Endpoints of the benchmark `wire`, a process each: `python -m benchmarks.transfer_endpoints ROLE ARGUMENTS`.

Roles and their arguments:
    sender ADDRESS TRANSPORT FINGERPRINT SIZE IN_FLIGHT TOTAL WARM_UP: delivers embeddings to a sink.
    raw-sink ADDRESS: reads from a socket into one buffer until it is ended.
    storing-sink ADDRESS FOLDER BYTES: reads into so much shared memory, over and over, and checks that all values are finite.
    raw-sender ADDRESS SIZE TOTAL: writes to a raw sink.
    raw-memory FOLDER SIZE TOTAL: copies into mapped files of shared memory, one after another.

SIZE, TOTAL and WARM_UP are bytes. All but the raw sinks print an empty line when they begin to measure, and at the end `Sent`
as JSON. The module imports only what an endpoint needs, so that processes start quickly.
"""

import asyncio
import contextlib
import json
import mmap
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from benchmarks import processes

WIDTH = 4096
"""Values per token, two bytes each."""
_BLOCK_BYTES = 1 << 20
_CHECK_BYTES = 256 << 10
_DELIVERY_TIMEOUT_SECONDS = 60


_FILES = 4
"""Files that `raw-memory` writes in turn, as a sink's slots are."""


@dataclass
class Sent:
    """Bytes that were sent in a measurement, and its duration and the sender's CPU time in seconds."""

    bytes: int
    seconds: float
    cpu_seconds: float


@contextlib.contextmanager
def _measured(count: int) -> Iterator[Sent]:
    """Measure the block, in which `count` bytes are sent."""
    sent = Sent(count, 0.0, 0.0)
    print(flush=True)
    started_at, cpu_at = time.monotonic(), time.process_time()
    yield sent
    sent.seconds, sent.cpu_seconds = time.monotonic() - started_at, time.process_time() - cpu_at


async def _send_embeddings(
    address: str, transport: str, fingerprint: str, size: int, in_flight: int, total: int, warm_up: int
) -> Sent:
    """Deliver embeddings of `size` bytes, `in_flight` at once, to a sink, after as many as fill its budget."""
    from common.embedding import Header
    from vision_worker.delivery import SinkChannels, transports_to

    data, rows = memoryview(bytes(size)), size // (2 * WIDTH)
    count = max(in_flight, total // size)
    async with SinkChannels(
        transports=lambda *arguments: [each for each in transports_to(*arguments) if each.name == transport]
    ) as sinks:

        async def send(numbers: Iterator[int]) -> None:
            for number in numbers:
                header = Header(f"k-{os.getpid()}-{number}", fingerprint, "bfloat16", rows, WIDTH)
                await sinks.deliver(address, header, data, _DELIVERY_TIMEOUT_SECONDS)

        async def send_all(first: int, count: int) -> None:
            numbers = iter(range(first, first + count))
            await asyncio.gather(*(send(numbers) for _ in range(in_flight)))

        await send_all(count, warm_up // size + 1)
        with _measured(count * size) as sent:
            await send_all(0, count)
        return sent


def create_socket(address: str) -> tuple[socket.socket, str | tuple[str, int]]:
    """A socket for `unix:PATH` or `HOST:PORT`, and the address in the form that the socket takes."""
    if address.startswith("unix:"):
        return socket.socket(socket.AF_UNIX), address.removeprefix("unix:")
    host, _, port = address.rpartition(":")
    return socket.socket(socket.AF_INET), (host, int(port))


def _run_raw_sink(address: str, read: Callable[[socket.socket], None]) -> None:
    """Read each connection to its end and confirm with one byte, until the process is ended."""
    listener, target = create_socket(address)
    with listener:
        listener.bind(target)
        listener.listen()
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):  # a probe for readiness is gone already
                read(connection)
                connection.sendall(b"!")


def _discard(connection: socket.socket) -> None:
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    while connection.recv_into(buffer):
        pass


def _store(folder: str, size: int) -> Callable[[socket.socket], None]:
    """Read into memory that exists: what a sink has to do at least."""
    from common.embedding import check_finite

    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(size)
        memory = memoryview(mmap.mmap(file.fileno(), size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE))

    def read(connection: socket.socket) -> None:
        received = 0
        while count := connection.recv_into(memory[received % size :][:_CHECK_BYTES], 0, socket.MSG_WAITALL):
            check_finite(memory[received % size :][:count], "bfloat16")
            received += count

    return read


def _send_raw(address: str, size: int, total: int) -> Sent:
    """Write `total` bytes in messages of `size` to a raw sink."""
    data, count = memoryview(bytes(size)), total // size
    connection, target = create_socket(address)
    with connection:
        connection.connect(target)
        with _measured(count * size) as sent:
            for _ in range(count):
                for start in range(0, size, _BLOCK_BYTES):
                    connection.sendall(data[start : start + _BLOCK_BYTES])
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1)
        return sent


def _copy_raw(folder: str, size: int, total: int) -> Sent:
    """Copy `total` bytes in blocks of `size` into files whose pages exist."""
    data, count = memoryview(bytes(size)), total // size
    with contextlib.ExitStack() as stack:
        targets = []
        for _ in range(_FILES):
            file = stack.enter_context(tempfile.TemporaryFile(dir=folder))
            file.truncate(size)
            targets.append(stack.enter_context(mmap.mmap(file.fileno(), size)))
            targets[-1][:] = data
        with _measured(count * size) as sent:
            for number in range(count):
                targets[number % _FILES][:] = data
        return sent


def _main(role: str, address: str, *arguments: str) -> None:
    os.sched_setaffinity(0, {processes.available_cores()[0 if role.endswith("sink") else -1]})
    if role == "raw-sink":
        _run_raw_sink(address, _discard)
    elif role == "storing-sink":
        folder, size = arguments
        _run_raw_sink(address, _store(folder, int(size)))
    elif role == "sender":
        transport, fingerprint, *sizes = arguments
        print(json.dumps(asdict(asyncio.run(_send_embeddings(address, transport, fingerprint, *map(int, sizes))))))
    elif role in ("raw-sender", "raw-memory"):
        send = _send_raw if role == "raw-sender" else _copy_raw
        print(json.dumps(asdict(send(address, *map(int, arguments)))))
    else:
        raise ValueError(f"unknown role {role!r}: expected sender, raw-sink, storing-sink, raw-sender or raw-memory")


if __name__ == "__main__":
    _main(*sys.argv[1:])
