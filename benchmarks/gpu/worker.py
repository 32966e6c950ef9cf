"""A whole vision worker by gRPC: tiles/s of its process over those of its tower alone, and where the time of a call goes.

It also needs grpcio, protobuf, pydantic, PyYAML and prometheus-client, and is skipped where they are missing.
"""

import asyncio
import functools
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.kit import Kit, Measurement, require
from benchmarks.gpu.model import write_model
from benchmarks.gpu.preprocessing import jpeg
from benchmarks.gpu.shapes import Shape

if TYPE_CHECKING:
    from protos import vision_pb2

_ROOT = Path(__file__).parents[2]
_FILES = 256
"""Distinct images: several times as many as there are calls in flight, since equal ones would share a computation."""
_START_SECONDS = 240.0
_SECONDS = 6.0
_WORKERS = 3
_SINK_BYTES = 2 << 30
_STAGES = ("wait", "decode", "tile", "queue", "encode", "route", "deliver")


@dataclass(frozen=True)
class Workload:
    """What is sent.

    Attributes:
        name: Names it in the results.
        size: Width and height of the JPEG files.
        router: `AUTO` or `OFF`: whether the router compresses tiles.
        delivered: Whether embeddings go to a sink in shared memory.
        in_flight: Calls at once, an image each.
    """

    name: str
    size: tuple[int, int]
    router: str
    delivered: bool
    in_flight: int


WORKLOADS = (
    Workload("one call at a time, 1920 × 1080", (1920, 1080), "AUTO", True, 1),
    Workload("1920 × 1080, not delivered", (1920, 1080), "OFF", False, 32),
    Workload("1920 × 1080, delivered", (1920, 1080), "OFF", True, 32),
    Workload("1920 × 1080, routed and delivered", (1920, 1080), "AUTO", True, 32),
    Workload("448 × 448, routed and delivered", (448, 448), "AUTO", True, 64),
)


@dataclass
class _Observed:
    """Replies of a time span, of one at least. Times are those of `time.monotonic`, durations seconds."""

    begins_at: float
    ends_at: float
    tiles: int = 0
    latencies: list[float] = field(default_factory=list)
    stages: list[list[float]] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether the span is over."""
        return bool(self.latencies) and time.monotonic() >= self.ends_at

    def add(self, reply: "vision_pb2.EncodeReply", latency: float) -> None:
        """Count a reply that has just come, if it belongs to the span."""
        now = time.monotonic()
        if now < self.begins_at or self.is_complete:
            return
        self.ends_at = max(self.ends_at, now)  # later only if this is the first one
        self.tiles += sum(len(image.compressed) for image in reply.images)
        self.latencies.append(latency)
        self.stages.append([getattr(reply.timings, name) for name in _STAGES])


def measurements(kit: Kit, shape: Shape) -> Iterator[Measurement]:
    """Yield measurements of one worker, of several on one GPU with small images, and of one whose tower is compiled."""
    name = f"vision worker {shape.name}"
    yield Measurement(name, 75, functools.partial(_measure, kit, shape))
    yield Measurement(f"{_WORKERS} × {name}", 40, functools.partial(_measure, kit, shape, _WORKERS, WORKLOADS[-1:]))
    if not kit.dry:
        compiles = f"{name} --vision-compile"
        yield Measurement(compiles, 90, functools.partial(_measure, kit, shape, 1, WORKLOADS, "--vision-compile"))


def _measure(
    kit: Kit, shape: Shape, workers: int = 1, workloads: Sequence[Workload] = WORKLOADS, *flags: str
) -> dict[str, Any]:
    require("grpc", "prometheus_client", "pydantic", "yaml")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name, ExitStack() as servers:
        folder = Path(name)
        model = write_model(folder / "model", shape)
        started_at = time.monotonic()
        sink = servers.enter_context(_sink(folder, model))
        starting = [_vision_worker(kit, folder, model, f"vision-{i}", flags) for i in range(workers)]
        addresses = [servers.enter_context(worker) for worker in starting]
        figures: dict[str, Any] = {"start, s": round(time.monotonic() - started_at, 1)}
        alone = tower_tiles_per_second(kit, shape, "compiled, CUDA graph" if flags else "CUDA graph")
        for workload in workloads:
            observed = asyncio.run(_load(addresses, sink, workload, 0.1 if kit.dry else _SECONDS))
            figures[workload.name] = _summarize(observed, alone)
    return figures


def tower_tiles_per_second(kit: Kit, shape: Shape, variant: str) -> float | None:
    """Return the best rate of the tower alone in the measurements so far, run as the worker runs it."""
    rates = [row["tiles/s"] for name, row in kit.figures.items() if name.startswith(f"tower {shape.name}, {variant}, ")]
    return max(rates, default=None)


def _summarize(observed: _Observed, alone: float | None) -> dict[str, float]:
    seconds = observed.ends_at - observed.begins_at
    rate = observed.tiles / seconds
    stages = zip(_STAGES, zip(*observed.stages, strict=True), strict=True)
    return {
        "tiles/s": round(rate, 1), "images/s": round(len(observed.latencies) / seconds, 1),
        **({"over the tower alone": round(rate / alone, 3)} if alone else {}),
        "median latency, ms": round(1e3 * statistics.median(observed.latencies), 1),
        **{f"{name}, ms": round(1e3 * statistics.fmean(values), 2) for name, values in stages},
    }  # fmt: skip


@contextmanager
def _sink(folder: Path, model: Path) -> Iterator[str]:
    """Start a sink as a language worker does, and yield its address."""
    from lm_worker.shared_memory import create_folder
    from lm_worker.sink import SinkOptions

    create_folder(folder / "store")
    address = f"unix:{folder / 'sink'}"
    options = SinkOptions(str(model), address, "", "bfloat16", str(folder / "store"), _SINK_BYTES, 0.0, 0, "warning")
    with _running([sys.executable, *options.arguments()], folder, lambda: (folder / "sink").exists(), stdin=subprocess.PIPE):
        yield address


@contextmanager
def _vision_worker(kit: Kit, folder: Path, model: Path, name: str, flags: Sequence[str]) -> Iterator[str]:
    """Start a vision worker as an operator does, without a cache, and yield its address."""
    command = [
        sys.executable, "-m", "vision_worker", str(model), "--load-format=dummy", f"--device={kit.device.type}",
        f"--listen=unix:{folder / name}", "--cache=none", "--log-level=warning", *flags,
    ]  # fmt: skip
    with _running(command, folder, lambda: (folder / name).exists()):
        yield f"unix:{folder / name}"


@contextmanager
def _running(command: list[str], folder: Path, is_ready: Callable[[], bool], stdin: int = subprocess.DEVNULL) -> Iterator[None]:
    """Run a process for the length of the block. Raises `RuntimeError` with the end of its log if it does not get ready."""
    log = folder / f"{len(list(folder.iterdir()))}.log"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=_ROOT, env=environment, stdin=stdin, stdout=output, stderr=output)
    try:
        started_at = time.monotonic()
        while not is_ready():
            if process.poll() is not None or time.monotonic() - started_at > _START_SECONDS:
                raise RuntimeError(f"{command[2]} did not start: {log.read_text(errors='replace').strip().splitlines()[-1]}")
            time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait()
        if process.stdin is not None:
            process.stdin.close()


async def _load(workers: Sequence[str], sink: str, workload: Workload, seconds: float) -> _Observed:
    """Keep `in_flight` calls running, spread over all workers, and observe those that end in a span of `seconds`.

    A warm-up of half its length comes before.
    """
    from common import rpc
    from protos import vision_pb2_grpc

    files, numbers, warm_at = jpegs(workload.size), itertools.count(), time.monotonic() + seconds / 2
    observed = _Observed(warm_at, warm_at + seconds)
    async with AsyncExitStack() as channels:
        opened = [await channels.enter_async_context(rpc.open_channel(worker)) for worker in workers]
        stubs = [vision_pb2_grpc.VisionStub(channel) for channel in opened]

        async def call_repeatedly(stub: vision_pb2_grpc.VisionStub) -> None:
            while not observed.is_complete:
                started_at = time.monotonic()
                reply = await stub.Encode(_request(next(numbers), files, workload, sink), timeout=120)
                observed.add(reply, time.monotonic() - started_at)

        await asyncio.gather(*(call_repeatedly(stubs[i % len(stubs)]) for i in range(workload.in_flight)))
    return observed


def _request(number: int, files: list[bytes], workload: Workload, sink: str) -> "vision_pb2.EncodeRequest":
    from protos import embeddings_pb2, vision_pb2

    image = vision_pb2.Image(key=f"benchmark-{workload.name.encode().hex()[:16]}-{number}", data=files[number % len(files)])
    return vision_pb2.EncodeRequest(
        images=[image], dtype=embeddings_pb2.BFLOAT16, router=vision_pb2.Router(mode=workload.router),
        deliver_to=sink if workload.delivered else "", dry_run=not workload.delivered, caller=str(number % 8),
    )  # fmt: skip


@functools.cache
def jpegs(size: tuple[int, int]) -> list[bytes]:
    """Return distinct JPEG files."""
    return [jpeg(size, seed) for seed in range(_FILES)]
