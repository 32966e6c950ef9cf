"""The benchmark `wire`: GB/s from a vision worker's sender into a language worker's sink, over those of a raw socket.

Both endpoints are processes, pinned to one core each. The sink is the product's: it checks the header, writes the values into
shared memory and checks that all are finite. The raw socket's sink reads into one buffer and checks nothing. Measured on one
machine, where the sender writes the sink's file, and over TCP, where the values travel through gRPC.
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

from benchmarks import checkpoint, event_loop_lag, processes, transfer_endpoints
from benchmarks.options import Options
from benchmarks.result import Result, median_ratio
from benchmarks.transfer_endpoints import WIDTH
from common.checkpoint import open_checkpoint
from lm_worker.shared_memory import create_folder
from lm_worker.sink import SinkOptions
from tests.ports import free_port

EMBEDDING_BYTES = {"2 MiB": 2 << 20, "26 MiB": 26 << 20}
IN_FLIGHT = (1, 4)
WIDE_LANGUAGE = checkpoint.SMALL_LANGUAGE | {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 1}
ONE_MACHINE, TCP = "on one machine", "over TCP, as between machines"
_BYTES_PER_MEASUREMENT = 512 << 20
_SINK_BUDGET_BYTES = 2 << 30
_SENDER_TIMEOUT_SECONDS = 300

_Process = subprocess.Popen[str]
_Settings = dict[str, dict[str, float]]


def _start_endpoint(role: str, *arguments: object) -> _Process:
    command = [sys.executable, "-m", "benchmarks.transfer_endpoints", role, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _start_sink(folder: Path, model: Path, listen: str) -> _Process:
    """Start a sink as a language worker does."""
    store = Path(tempfile.mkdtemp(dir=folder)) / "store"
    create_folder(store)
    options = SinkOptions(str(model), listen, "", "bfloat16", str(store), _SINK_BUDGET_BYTES, 0.0, 0, "warning")
    sink = subprocess.Popen([sys.executable, *options.arguments()], stdin=subprocess.PIPE, text=True)
    os.sched_setaffinity(sink.pid, processes.available_cores()[:1])
    return sink


def _run_sender(role: str, *arguments: object) -> float:
    """Bytes per second of a sender. Raises `RuntimeError` if it fails."""
    process = _start_endpoint(role, *arguments)
    output, _ = process.communicate(timeout=_SENDER_TIMEOUT_SECONDS)
    if process.returncode:
        raise RuntimeError(f"{role} ended with status {process.returncode}")
    return float(output)


@dataclass(frozen=True)
class _Route:
    """Addresses of a sink and of a raw sink that are reached the same way."""

    sink: str
    raw_sink: str

    def start_sinks(self, folder: Path, model: Path) -> list[_Process]:
        return [_start_sink(folder, model, self.sink), _start_endpoint("raw-sink", self.raw_sink)]

    def is_ready(self) -> bool:
        return all(_accepts_connections(address) for address in (self.sink, self.raw_sink))


def _accepts_connections(address: str) -> bool:
    connection, target = transfer_endpoints.create_socket(address)
    with connection:
        return connection.connect_ex(target) == 0


def run(options: Options) -> Result:
    """Measure all settings. The headline is the smallest ratio of the four settings on one machine; the target is 0.5."""
    total = _BYTES_PER_MEASUREMENT // 4 if options.quick else _BYTES_PER_MEASUREMENT
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        model = checkpoint.write_checkpoint(folder / "wide", flash=False, dtype="bfloat16", language=WIDE_LANGUAGE)
        routes = {
            ONE_MACHINE: _Route(f"unix:{folder / 'sink'}", f"unix:{folder / 'raw'}"),
            TCP: _Route(f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"),
        }
        sinks = [sink for route in routes.values() for sink in route.start_sinks(folder, model)]
        try:
            while not all(route.is_ready() for route in routes.values()):
                if any(sink.poll() is not None for sink in sinks):
                    raise RuntimeError("a sink did not start; its error is above")
                time.sleep(0.1)
            fingerprint = open_checkpoint(model).fingerprint
            compared = {name: _compare(route, fingerprint, total, options.repeats(5)) for name, route in routes.items()}
        finally:
            for sink in sinks:
                sink.kill()
                sink.wait()
    figures: dict[str, Any] = {name: settings for name, (_, _, settings) in compared.items()}
    figures["streams of vLLM's HTTP process"] = event_loop_lag.measure(options.repeats(3))
    ratio, spread, _ = compared[ONE_MACHINE]
    return Result("wire", ratio, 0.5, spread, figures)


def _compare(route: _Route, fingerprint: str, total: int, repeats: int) -> tuple[float, float, _Settings]:
    """The smallest ratio of all settings, its spread, and the figures of each setting."""
    figures: _Settings = {}
    smallest, smallest_spread = float("inf"), 0.0
    for size_name, size in EMBEDDING_BYTES.items():
        for in_flight in IN_FLIGHT:
            raw, ours = [], []
            for _ in range(repeats):
                raw.append(_run_sender("raw-sender", route.raw_sink, size, total))
                ours.append(_run_sender("grpc-sender", route.sink, fingerprint, size, in_flight, total))
            ratio, spread = median_ratio(ours, raw)
            setting = f"{size_name}, {in_flight} at once"
            figures[setting] = {
                "GB/s": round(statistics.median(ours) / 1e9, 2), "raw GB/s": round(statistics.median(raw) / 1e9, 2),
                "ratio": round(ratio, 3), "spread": round(spread, 3),
            }  # fmt: skip
            if ratio < smallest:
                smallest, smallest_spread = ratio, spread
            print(json.dumps({setting: figures[setting]}), file=sys.stderr)
    return smallest, smallest_spread, figures
