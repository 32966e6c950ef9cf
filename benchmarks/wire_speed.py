"""GB/s from a vision worker's sender into a language worker's sink, over those of a raw socket in the same run.

Both ends are processes of their own, pinned to one core each. The sink is the product's: header checked, values written into
shared memory, every value checked to be finite. The raw socket writes into a buffer and checks nothing.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import arrival, checkpoint, processes
from benchmarks.options import Options
from benchmarks.result import Result, ratio_of
from benchmarks.wire_ends import WIDTH
from lm_worker.sink import SinkOptions
from lm_worker.store import create_folder
from wire.checkpoint import open_checkpoint

SIZES = {"2 MiB": 2 << 20, "26 MiB": 26 << 20}
WIDE = checkpoint.SMALL | {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 1}
_TOTAL = 512 << 20
"""Bytes of one measurement."""


def _process(role: str, *arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "benchmarks.wire_ends", role, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _sink(folder: Path, model: Path) -> "subprocess.Popen[str]":
    """As a language worker starts its own."""
    create_folder(folder / "store")
    said = SinkOptions(str(model), f"unix:{folder / 'grpc'}", "", "bfloat16", str(folder / "store"), 2 << 30, 0.0, 0, "warning")
    sink = subprocess.Popen([sys.executable, *said.arguments()], stdin=subprocess.PIPE, text=True)
    os.sched_setaffinity(sink.pid, processes.cores()[:1])
    return sink


def _measured(role: str, *arguments: object) -> float:
    process = _process(role, *arguments)
    said, _ = process.communicate(timeout=300)
    if process.returncode:
        raise RuntimeError(f"{role} ended with {process.returncode}")
    return float(said)


def run(options: Options) -> Result:
    """The headline is the least of the four settings."""
    total = _TOTAL // 4 if options.quick else _TOTAL
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        model = checkpoint.make(folder / "wide", flash=False, dtype="bfloat16", language=WIDE)
        ends = [_sink(folder, model), _process("raw-sink", folder / "raw")]
        try:
            while not ((folder / "grpc").exists() and (folder / "raw").exists()):
                if any(end.poll() is not None for end in ends):
                    raise RuntimeError("an end of the wire did not start")
                time.sleep(0.1)
            found = _compared(folder, open_checkpoint(model).fingerprint, total, options.repeats(5))
        finally:
            for end in ends:
                end.kill()
                end.wait()
    found.figures["streams of vLLM's HTTP process"] = arrival.felt(options.repeats(3))
    return found


def _compared(folder: Path, fingerprint: str, total: int, repeats: int) -> Result:
    figures: dict[str, dict[str, float]] = {}
    least, spread = float("inf"), 0.0
    for name, size in SIZES.items():
        for at_once in (1, 4):
            raw, grpc = [], []
            for _ in range(repeats):
                raw.append(_measured("raw-sender", folder / "raw", size, total))
                grpc.append(_measured("grpc-sender", f"unix:{folder / 'grpc'}", fingerprint, size, at_once, total))
            ratio, width = ratio_of(grpc, raw)
            figures[f"{name}, {at_once} at once"] = {
                "grpc GB/s": round(statistics.median(grpc) / 1e9, 2), "raw GB/s": round(statistics.median(raw) / 1e9, 2),
                "ratio": round(ratio, 3), "spread": round(width, 3),
            }  # fmt: skip
            if ratio < least:
                least, spread = ratio, width
            print(json.dumps({f"{name}, {at_once} at once": figures[f"{name}, {at_once} at once"]}), file=sys.stderr)
    return Result("wire", least, 0.5, spread, figures)
