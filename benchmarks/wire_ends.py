"""The ends of a wire under measurement, each a process: `python -m benchmarks.wire_ends ROLE ARGUMENTS`.

Apart from the run, so that they begin at once: what they import is what they need.
"""

import asyncio
import contextlib
import os
import socket
import sys
import time

from benchmarks import processes

WIDTH = 4096
"""Values of a token, two bytes each."""


async def _grpc_sender(address: str, fingerprint: str, size: int, at_once: int, total: int) -> float:
    from common.embedding import Header
    from vision_worker.delivery import SinkChannels

    data, rows = memoryview(bytes(size)), size // (2 * WIDTH)
    async with SinkChannels() as sinks:
        await sinks.deliver(address, Header("warm", fingerprint, "bfloat16", rows, WIDTH), data, 60)
        numbers = iter(range(max(at_once, total // size)))

        async def send() -> None:
            for number in numbers:
                header = Header(f"k-{os.getpid()}-{number}", fingerprint, "bfloat16", rows, WIDTH)
                await sinks.deliver(address, header, data, 60)

        began = time.monotonic()
        await asyncio.gather(*(send() for _ in range(at_once)))
        seconds = time.monotonic() - began
    return max(at_once, total // size) * size / seconds


def socket_of(address: str) -> tuple[socket.socket, str | tuple[str, int]]:
    """For `unix:PATH` or `HOST:PORT`, and the address as the socket wants it."""
    if address.startswith("unix:"):
        return socket.socket(socket.AF_UNIX), address.removeprefix("unix:")
    host, _, port = address.rpartition(":")
    return socket.socket(socket.AF_INET), (host, int(port))


def _raw_sink(address: str) -> None:
    listening, at = socket_of(address)
    with listening:
        listening.bind(at)
        listening.listen()
        buffer = memoryview(bytearray(1 << 20))
        while True:
            connection, _ = listening.accept()
            with connection, contextlib.suppress(OSError):  # of one who only looked whether anybody is here
                while connection.recv_into(buffer):
                    pass
                connection.sendall(b"!")


def _raw_sender(address: str, size: int, total: int) -> float:
    data, count = memoryview(bytes(size)), total // size
    connection, at = socket_of(address)
    with connection:
        connection.connect(at)
        began = time.monotonic()
        for _ in range(count):
            for start in range(0, size, 1 << 20):
                connection.sendall(data[start : start + (1 << 20)])
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)
        return count * size / (time.monotonic() - began)


def _main(role: str, *arguments: str) -> None:
    said = [int(word) if word.isdigit() else word for word in arguments]
    os.sched_setaffinity(0, {processes.cores()[0 if role.endswith("sink") else -1]})
    if role == "grpc-sender":
        print(asyncio.run(_grpc_sender(*said)))  # type: ignore[arg-type]
    elif role == "raw-sink":
        _raw_sink(*said)  # type: ignore[arg-type]
    else:
        print(_raw_sender(*said))  # type: ignore[arg-type]


if __name__ == "__main__":
    _main(*sys.argv[1:])
