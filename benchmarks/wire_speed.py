"""GB/s from a vision worker's sender into a language worker's sink, over those of a raw socket in the same run.

Both ends are processes of their own, pinned to one core each. The sink is the product's: header checked, values written into
shared memory, every value checked to be finite. The raw socket writes into a buffer and checks nothing. On one machine, where
the sender writes the sink's file, and over TCP, where the values go through gRPC.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import arrival, checkpoint, processes, wire_ends
from benchmarks.options import Options
from benchmarks.result import Result, ratio_of
from benchmarks.wire_ends import WIDTH
from common.checkpoint import open_checkpoint
from lm_worker.shared_memory import create_folder
from lm_worker.sink import SinkOptions

SIZES = {"2 MiB": 2 << 20, "26 MiB": 26 << 20}
WIDE = checkpoint.SMALL | {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 1}
HERE, BETWEEN = "on one machine", "over TCP, as between machines"
_TOTAL = 512 << 20
"""Bytes of one measurement."""


def _process(role: str, *arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "benchmarks.wire_ends", role, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _sink(folder: Path, model: Path, listen: str) -> "subprocess.Popen[str]":
    """As a language worker starts its own."""
    store = Path(tempfile.mkdtemp(dir=folder)) / "store"
    create_folder(store)
    said = SinkOptions(str(model), listen, "", "bfloat16", str(store), 2 << 30, 0.0, 0, "warning")
    sink = subprocess.Popen([sys.executable, *said.arguments()], stdin=subprocess.PIPE, text=True)
    os.sched_setaffinity(sink.pid, processes.cores()[:1])
    return sink


def _measured(role: str, *arguments: object) -> float:
    process = _process(role, *arguments)
    said, _ = process.communicate(timeout=300)
    if process.returncode:
        raise RuntimeError(f"{role} ended with {process.returncode}")
    return float(said)


@dataclass(frozen=True)
class _Way:
    """Two ends of either kind that reach each other in one way."""

    sink: str
    raw: str

    def started(self, folder: Path, model: Path) -> "list[subprocess.Popen[str]]":
        return [_sink(folder, model, self.sink), _process("raw-sink", self.raw)]

    def open(self) -> bool:
        return all(_answers(address) for address in (self.sink, self.raw))


def _answers(address: str) -> bool:
    connection, at = wire_ends.socket_of(address)
    with connection:
        return connection.connect_ex(at) == 0


def run(options: Options) -> Result:
    """The headline is the least of the four settings on one machine."""
    total = _TOTAL // 4 if options.quick else _TOTAL
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        model = checkpoint.make(folder / "wide", flash=False, dtype="bfloat16", language=WIDE)
        ways = {
            HERE: _Way(f"unix:{folder / 'sink'}", f"unix:{folder / 'raw'}"),
            BETWEEN: _Way(*(f"127.0.0.1:{processes.free_port()}" for _ in range(2))),
        }
        ends = [end for way in ways.values() for end in way.started(folder, model)]
        try:
            while not all(way.open() for way in ways.values()):
                if any(end.poll() is not None for end in ends):
                    raise RuntimeError("an end of the wire did not start")
                time.sleep(0.1)
            fingerprint = open_checkpoint(model).fingerprint
            found = {name: _compared(way, fingerprint, total, options.repeats(5)) for name, way in ways.items()}
        finally:
            for end in ends:
                end.kill()
                end.wait()
    figures: dict[str, Any] = {name: settings for name, (_, _, settings) in found.items()}
    figures["streams of vLLM's HTTP process"] = arrival.felt(options.repeats(3))
    ratio, spread, _ = found[HERE]
    return Result("wire", ratio, 0.5, spread, figures)


def _compared(way: _Way, fingerprint: str, total: int, repeats: int) -> tuple[float, float, dict[str, dict[str, float]]]:
    """The least ratio, its spread, and all settings."""
    figures: dict[str, dict[str, float]] = {}
    least, spread = float("inf"), 0.0
    for name, size in SIZES.items():
        for at_once in (1, 4):
            raw, ours = [], []
            for _ in range(repeats):
                raw.append(_measured("raw-sender", way.raw, size, total))
                ours.append(_measured("grpc-sender", way.sink, fingerprint, size, at_once, total))
            ratio, width = ratio_of(ours, raw)
            setting = f"{name}, {at_once} at once"
            figures[setting] = {
                "GB/s": round(statistics.median(ours) / 1e9, 2), "raw GB/s": round(statistics.median(raw) / 1e9, 2),
                "ratio": round(ratio, 3), "spread": round(width, 3),
            }  # fmt: skip
            if ratio < least:
                least, spread = ratio, width
            print(json.dumps({setting: figures[setting]}), file=sys.stderr)
    return least, spread, figures
