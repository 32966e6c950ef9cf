"""Endpoints of the benchmark `wire`, a process each: `python -m benchmarks.transfer_endpoints ROLE ARGUMENTS`.

Roles and their arguments:
    grpc-sender ADDRESS FINGERPRINT SIZE IN_FLIGHT TOTAL: delivers embeddings to a sink, prints bytes per second.
    raw-sink ADDRESS: reads from a socket into one buffer until it is ended.
    raw-sender ADDRESS SIZE TOTAL: writes to a raw sink, prints bytes per second.

SIZE and TOTAL are bytes. The module imports only what an endpoint needs, so that processes start quickly.
"""

import asyncio
import contextlib
import os
import socket
import sys
import time

from benchmarks import processes

WIDTH = 4096
"""Values per token, two bytes each."""
_BLOCK_BYTES = 1 << 20
_DELIVERY_TIMEOUT_SECONDS = 60


async def _send_embeddings(address: str, fingerprint: str, size: int, in_flight: int, total: int) -> float:
    """Deliver embeddings of `size` bytes, `in_flight` at once, to a sink. Returns bytes per second."""
    from common.embedding import Header
    from vision_worker.delivery import SinkChannels

    data, rows = memoryview(bytes(size)), size // (2 * WIDTH)
    count = max(in_flight, total // size)
    numbers = iter(range(count))
    async with SinkChannels() as sinks:

        async def send_remaining() -> None:
            for number in numbers:
                header = Header(f"k-{os.getpid()}-{number}", fingerprint, "bfloat16", rows, WIDTH)
                await sinks.deliver(address, header, data, _DELIVERY_TIMEOUT_SECONDS)

        warm_up = Header("warm", fingerprint, "bfloat16", rows, WIDTH)
        await sinks.deliver(address, warm_up, data, _DELIVERY_TIMEOUT_SECONDS)
        started_at = time.monotonic()
        await asyncio.gather(*(send_remaining() for _ in range(in_flight)))
        return count * size / (time.monotonic() - started_at)


def create_socket(address: str) -> tuple[socket.socket, str | tuple[str, int]]:
    """A socket for `unix:PATH` or `HOST:PORT`, and the address in the form that the socket takes."""
    if address.startswith("unix:"):
        return socket.socket(socket.AF_UNIX), address.removeprefix("unix:")
    host, _, port = address.rpartition(":")
    return socket.socket(socket.AF_INET), (host, int(port))


def _run_raw_sink(address: str) -> None:
    """Read each connection to its end and confirm with one byte, until the process is ended."""
    listener, target = create_socket(address)
    with listener:
        listener.bind(target)
        listener.listen()
        buffer = memoryview(bytearray(_BLOCK_BYTES))
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):  # a probe for readiness is gone already
                while connection.recv_into(buffer):
                    pass
                connection.sendall(b"!")


def _send_raw(address: str, size: int, total: int) -> float:
    """Write `total` bytes in messages of `size` to a raw sink. Returns bytes per second."""
    data, count = memoryview(bytes(size)), total // size
    connection, target = create_socket(address)
    with connection:
        connection.connect(target)
        started_at = time.monotonic()
        for _ in range(count):
            for start in range(0, size, _BLOCK_BYTES):
                connection.sendall(data[start : start + _BLOCK_BYTES])
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)
        return count * size / (time.monotonic() - started_at)


def _main(role: str, address: str, *arguments: str) -> None:
    os.sched_setaffinity(0, {processes.available_cores()[0 if role.endswith("sink") else -1]})
    if role == "grpc-sender":
        fingerprint, *sizes = arguments
        print(asyncio.run(_send_embeddings(address, fingerprint, *map(int, sizes))))
    elif role == "raw-sink":
        _run_raw_sink(address)
    elif role == "raw-sender":
        print(_send_raw(address, *map(int, arguments)))
    else:
        raise ValueError(f"unknown role {role!r}: expected grpc-sender, raw-sink or raw-sender")


if __name__ == "__main__":
    _main(*sys.argv[1:])
