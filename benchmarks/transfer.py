"""The benchmark `wire`: GB/s from a vision worker's sender into a language worker's sink, over those of a raw socket.

Both endpoints are processes, pinned to one core each. The sink is the product's: it checks the header, gets the values into
shared memory and checks that all are finite. The raw socket's sink reads into one buffer and checks nothing. Each transport is
compared with the raw socket that it would replace: a Unix socket on one machine, TCP between machines. Two further figures
show where the difference comes from: a raw socket whose sink does a sink's work, with shared memory and the check, but without
messages, files and budget; and a copy into shared memory that is mapped.
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
from benchmarks.transfer_endpoints import WIDTH, Sent
from common.checkpoint import open_checkpoint
from lm_worker.shared_memory import create_folder
from lm_worker.sink import SinkOptions
from tests.ports import free_port

EMBEDDING_BYTES = {"2 MiB": 2 << 20, "26 MiB": 26 << 20}
IN_FLIGHT = (1, 4)
WIDE_LANGUAGE = checkpoint.SMALL_LANGUAGE | {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 1}
TARGETS = {"shm": {"2 MiB": 0.5, "26 MiB": 1.0}, "tcp": {"2 MiB": 0.4, "26 MiB": 0.7}, "grpc": {}}
"""Ratio that a transport should reach; gRPC is the fallback and has none."""
_BYTES_PER_MEASUREMENT = 512 << 20
_SINK_BUDGET_BYTES = 256 << 20
"""It is full after the warm-up: from then on each embedding replaces an older one, as in a language worker after a while."""
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


def _run_sender(role: str, *arguments: object, sink: _Process | None = None) -> tuple[Sent, float]:
    """Run a sender to its end, and measure the CPU time of its sink meanwhile. Raises `RuntimeError` if it fails."""
    process = _start_endpoint(role, *arguments)
    assert process.stdout is not None
    process.stdout.readline()  # its warm-up is over
    cpu_at = _cpu_seconds(sink)
    output, _ = process.communicate(timeout=_SENDER_TIMEOUT_SECONDS)
    if process.returncode:
        raise RuntimeError(f"{role} ended with status {process.returncode}")
    return Sent(**json.loads(output)), _cpu_seconds(sink) - cpu_at


def _cpu_seconds(process: _Process | None) -> float:
    """CPU time of a running process so far."""
    if process is None:
        return 0.0
    fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass
class _Route:
    """A sink and a raw sink that are reached the same way, once they are started."""

    transport: str
    address: str
    raw_address: str
    storing_address: str

    def start(self, folder: Path, model: Path) -> list[_Process]:
        self.sink = _start_sink(folder, model, self.address)
        raw_sink = _start_endpoint("raw-sink", self.raw_address)
        return [self.sink, raw_sink, _start_endpoint("storing-sink", self.storing_address, folder, _SINK_BUDGET_BYTES)]

    def is_ready(self) -> bool:
        return all(_accepts_connections(address) for address in (self.address, self.raw_address, self.storing_address))


def _accepts_connections(address: str) -> bool:
    connection, target = transfer_endpoints.create_socket(address)
    with connection:
        return connection.connect_ex(target) == 0


def _routes(folder: Path) -> list[_Route]:
    def address(transport: str, name: str) -> str:
        return f"unix:{folder / name}" if transport == "shm" else f"127.0.0.1:{free_port()}"

    return [
        _Route(transport, address(transport, "sink"), address(transport, "raw"), address(transport, "storing"))
        for transport in TARGETS
    ]


def run(options: Options) -> Result:
    """Measure all settings. The headline is the smallest share of its target that a setting reaches; 1 meets all of them."""
    total = _BYTES_PER_MEASUREMENT // 4 if options.quick else _BYTES_PER_MEASUREMENT
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        model = checkpoint.write_checkpoint(folder / "wide", flash=False, dtype="bfloat16", language=WIDE_LANGUAGE)
        routes = _routes(folder)
        sinks = [sink for route in routes for sink in route.start(folder, model)]
        try:
            while not all(route.is_ready() for route in routes):
                if any(sink.poll() is not None for sink in sinks):
                    raise RuntimeError("a sink did not start; its error is above")
                time.sleep(0.1)
            fingerprint = open_checkpoint(model).fingerprint
            compared = [_compare(route, fingerprint, total, options.repeats(5), folder) for route in routes]
        finally:
            for sink in sinks:
                sink.kill()
                sink.wait()
    figures: dict[str, Any] = {route.transport: settings for route, (_, _, settings) in zip(routes, compared, strict=True)}
    figures["streams of vLLM's HTTP process"] = event_loop_lag.measure(options.repeats(3))
    share, spread, _ = min(compared, key=lambda each: each[0])
    return Result("wire", share, 1.0, spread, figures)


def _compare(route: _Route, fingerprint: str, total: int, repeats: int, folder: Path) -> tuple[float, float, _Settings]:
    """The smallest share of its target that a setting reaches, its spread, and the figures of each setting."""
    figures: _Settings = {}
    smallest, smallest_spread = float("inf"), 0.0
    for size_name, size in EMBEDDING_BYTES.items():
        for in_flight in IN_FLIGHT:
            figure, ratio, spread = _measure(route, fingerprint, size, in_flight, total, repeats, folder)
            setting, target = f"{size_name}, {in_flight} at once", TARGETS[route.transport].get(size_name)
            figures[setting] = figure
            if target is not None and ratio / target < smallest:
                smallest, smallest_spread = ratio / target, spread
            print(json.dumps({f"{route.transport}, {setting}": figure}), file=sys.stderr)
    return smallest, smallest_spread, figures


def _measure(
    route: _Route, fingerprint: str, size: int, in_flight: int, total: int, repeats: int, folder: Path
) -> tuple[dict[str, float], float, float]:
    """Figures of one setting, the ratio to the raw socket, and its spread. All are measured in turn."""
    raw, storing, memory, ours, sink_cpu_seconds = list[Sent](), list[Sent](), list[Sent](), list[Sent](), list[float]()
    for _ in range(repeats):
        memory.append(_run_sender("raw-memory", folder, size, total)[0])
        raw.append(_run_sender("raw-sender", route.raw_address, size, total)[0])
        storing.append(_run_sender("raw-sender", route.storing_address, size, total)[0])
        sizes = (size, in_flight, total, _SINK_BUDGET_BYTES)
        sent, cpu_seconds = _run_sender("sender", route.address, route.transport, fingerprint, *sizes, sink=route.sink)
        ours.append(sent)
        sink_cpu_seconds.append(cpu_seconds / sent.bytes * 1e9)
    ratio, spread = median_ratio([_rate(each) for each in ours], [_rate(each) for each in raw])
    figures = {
        "GB/s": round(statistics.median(map(_rate, ours)) / 1e9, 2),
        "raw GB/s": round(statistics.median(map(_rate, raw)) / 1e9, 2),
        "copy GB/s": round(statistics.median(map(_rate, memory)) / 1e9, 2),
        "ratio": round(ratio, 3), "spread": round(spread, 3),
        "raw, stored and checked GB/s": round(statistics.median(map(_rate, storing)) / 1e9, 2),
        "ratio to stored and checked": round(median_ratio(list(map(_rate, ours)), list(map(_rate, storing)))[0], 3),
        "sender CPU s/GB": round(statistics.median(each.cpu_seconds / each.bytes * 1e9 for each in ours), 3),
        "sink CPU s/GB": round(statistics.median(sink_cpu_seconds), 3),
    }  # fmt: skip
    return figures, ratio, spread


def _rate(sent: Sent) -> float:
    return sent.bytes / sent.seconds
