"""Sinks as processes, and embeddings whose bytes follow from their key, for the tests of transports."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.checkpoint import open_checkpoint
from common.embedding import HEADER_SIZE, Header
from common.security import TOKEN_VARIABLE, Credentials
from common.transport.base import Transport
from common.transport.direct_call import TcpPort
from common.transport.shared_memory import SharedMemoryTransport
from lm_worker.shared_memory import create_folder, map_embedding, remove_folder
from lm_worker.sink import SinkOptions
from tests.ports import free_port

CHECKPOINT = Path(__file__).parents[2] / "data/golden/flash-qwen3/checkpoint"
FINGERPRINT = open_checkpoint(CHECKPOINT).fingerprint
WIDTH = 128
ROW_BYTES = WIDTH * 4

TRANSPORTS: dict[str, Callable[[str, Credentials], Sequence[Transport]]] = {
    "shm": lambda *_: [SharedMemoryTransport()],
    "shm-grpc": lambda *_: [SharedMemoryTransport()],
    "shm-tcp": lambda address, _: [SharedMemoryTransport(), TcpPort(address)],
    "tcp": lambda address, _: [TcpPort(address)],
    "grpc": lambda *_: [],
}
"""What a sender may use, by the name of the transport.

"shm": by direct calls through a Unix socket; "shm-grpc": by gRPC calls over loopback; "shm-tcp": by direct calls over loopback.
"""


@dataclass
class RunningSink:
    options: SinkOptions
    process: "subprocess.Popen[bytes]"

    @property
    def folder(self) -> Path:
        return Path(self.options.folder)

    def files(self) -> list[Path]:
        """All files in the sink's memory."""
        return [file for file in self.folder.rglob("*") if file.is_file()]

    def embeddings(self) -> list[str]:
        """Keys of all visible embeddings."""
        return [file.name for file in self.folder.iterdir() if file.is_file() and not file.name.startswith(".")]

    def received_by(self) -> dict[str, float]:
        """Bytes that were stored, by transport."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.options.metrics_port}/metrics", timeout=20) as response:
            lines = response.read().decode().splitlines()
        prefix = 'dvd_sink_received_bytes_total{transport="'
        pairs = (line.removeprefix(prefix).split('"} ') for line in lines if line.startswith(prefix))
        return {name: float(value) for name, value in pairs}


@contextlib.contextmanager
def start_sink(
    folder: Path, transport: str, budget: int, stall_seconds: float = 3.0, lease: float = 0.0, token: str = ""
) -> Iterator[RunningSink]:
    """A sink that senders reach as `transport` needs it. `folder` becomes its memory."""
    create_folder(folder)
    listen = f"127.0.0.1:{free_port()}" if transport in ("tcp", "shm-grpc", "shm-tcp") else f"unix:{folder}.sock"
    metrics = f"127.0.0.1:{free_port()}"
    options = SinkOptions(
        model=str(CHECKPOINT), listen=listen, http="unix:/nowhere", dtype="float32", folder=str(folder), budget=budget,
        lease=lease, metrics_port=int(metrics.rpartition(":")[2]), stall_seconds=stall_seconds,
    )  # fmt: skip
    environment = {**os.environ, TOKEN_VARIABLE: token} if token else None
    process = subprocess.Popen([sys.executable, *options.arguments()], stdin=subprocess.PIPE, env=environment)
    assert process.stdin is not None
    try:
        while process.poll() is None and not all(map(_is_listening, (listen, metrics))):
            time.sleep(0.02)
        yield RunningSink(options, process)
        process.stdin.close()
        if process.poll() is None:
            assert process.wait(20) == 0, "the sink must end with its language worker"
            assert not folder.exists(), "the sink must give its memory back"
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        remove_folder(folder)


def _is_listening(address: str) -> bool:
    is_unix = address.startswith("unix:")
    with socket.socket(socket.AF_UNIX if is_unix else socket.AF_INET) as probe:
        target = address.removeprefix("unix:") if is_unix else ("127.0.0.1", int(address.rpartition(":")[2]))
        return probe.connect_ex(target) == 0


def header_of(number: int, rows: int) -> Header:
    return Header(f"n-{number}-{rows}", FINGERPRINT, "float32", rows, WIDTH)


def values_of(header: Header) -> memoryview:
    """The values of an embedding: all equal to its number."""
    number = int(header.key.split("-")[1])
    return memoryview(np.full(header.rows * header.width, number, "float32").tobytes())


def is_right(mapping: memoryview | bytes, key: str) -> bool:
    """Whether a whole file has the values that `header_of` and `values_of` give for its key."""
    _, number, rows = key.split("-")
    header = header_of(int(number), int(rows))
    values = np.frombuffer(mapping, "float32", offset=HEADER_SIZE)
    is_header = bytes(mapping[:HEADER_SIZE]) == header.pack()
    return is_header and len(values) == header.rows * header.width and bool((values == np.float32(int(number))).all())


def stored_right(sink: RunningSink, key: str) -> bool:
    """Whether the embedding is visible with the right bytes."""
    _, mapping = map_embedding(sink.folder / key)
    with mapping, memoryview(mapping) as whole:
        return is_right(bytes(whole), key)
