"""What a narrow embedding costs: bytes in each place where it is stored, and CPU time."""

import asyncio
import base64
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from redis import Redis
from torch import Tensor

from benchmarks import checkpoint, load, processes
from benchmarks.encoder import our_tower
from benchmarks.gpu.shapes import INTERN_VIT_300M
from benchmarks.transfer import WIDE_LANGUAGE
from common import messages, rpc
from common.embedding import Header, check_values
from lm_worker.dequantization import dequantize
from lm_worker.shared_memory import create_folder
from lm_worker.sink import SinkOptions
from protos import embeddings_pb2, embeddings_pb2_grpc, vision_pb2, vision_pb2_grpc
from tests.ports import free_port
from tests.redis_server import redis_server
from vision_worker.models import onednn
from vision_worker.quantization import EMBEDDING_DTYPES, NARROW_DTYPES, convert, join, view

DTYPES = ("float32", "bfloat16", "int8", "fp8")
ROWS_PER_TILE, WIDTHS = 256, (1024, 2048, 4096)
_START_TIMEOUT_SECONDS = 120


def measure_bytes() -> dict[str, Any]:
    """Bytes of one tile of 256 visual tokens of width 4096 in each place, by dtype, as real processes report them.

    "delivered" is what the vision worker has sent, "sink" what the sink's shared memory has grown by, and "redis" the length
    of the value under its key.
    """
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name, ExitStack() as stack:
        folder = Path(name)
        model = checkpoint.write_checkpoint(folder / "wide", flash=False, dtype="bfloat16", language=WIDE_LANGUAGE)
        redis = stack.enter_context(redis_server(folder))
        port, cores = free_port(), processes.available_cores()
        flags = ("--vision-backend=fake", f"--cache={redis.url}", f"--metrics-port={port}")
        stack.enter_context(processes.vision_worker(folder, model, cores[:1], *flags))
        return {dtype: _bytes_of(dtype, folder, model, Redis.from_url(redis.url), port) for dtype in DTYPES}


def _bytes_of(dtype: str, folder: Path, model: Path, redis: Redis, metrics_port: int) -> dict[str, int]:
    listen, store = f"unix:{folder / f'sink-{dtype}'}", folder / f"store-{dtype}"
    create_folder(store)
    options = SinkOptions(str(model), listen, "", dtype, str(store), 1 << 28, 60.0)
    sink = subprocess.Popen([sys.executable, *options.arguments()], stdin=subprocess.PIPE)
    keys, delivered = set(redis.keys()), _delivered_bytes(metrics_port)
    try:
        used = asyncio.run(_deliver_tile(dtype, f"unix:{folder / 'vision'}", listen))
    finally:
        sink.kill()
        sink.wait()
    while not (new := set(redis.keys()) - keys):  # the cache is written in the background
        time.sleep(0.05)
    return {
        "delivered": _delivered_bytes(metrics_port) - delivered, "sink": used, "redis": int(redis.strlen(new.pop())),
    }  # fmt: skip


async def _deliver_tile(dtype: str, vision: str, sink: str) -> int:
    """Let the vision worker encode one tile and deliver it to the sink. Returns the bytes that the sink then uses."""
    async with rpc.open_channel(sink) as sinks, rpc.open_channel(vision) as visions:
        await asyncio.wait_for(sinks.channel_ready(), _START_TIMEOUT_SECONDS)
        image = vision_pb2.Image(key="tile", data=_image_bytes(load.image_url(0, 448, 448)))
        await vision_pb2_grpc.VisionStub(visions).Encode(
            vision_pb2.EncodeRequest(images=[image], dtype=messages.dtype_to_proto(dtype), deliver_to=sink)
        )
        description = await embeddings_pb2_grpc.EmbeddingSinkStub(sinks).Describe(embeddings_pb2.DescribeRequest())
        return int(description.used_bytes)


def _image_bytes(url: str) -> bytes:
    return base64.b64decode(url.partition(",")[2])


def _delivered_bytes(metrics_port: int) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=20) as response:
        lines = response.read().decode().splitlines()
    return sum(int(float(line.split()[1])) for line in lines if line.startswith("dvd_vision_delivered_bytes_total "))


def measure_costs(repeats: int) -> dict[str, Any]:
    """Milliseconds of CPU time per tile, on one thread, and their share of those in which a 300M tower encodes it."""
    torch.set_num_threads(1)
    encode = _encode_seconds(2)
    figures: dict[str, Any] = {"encode, ms": round(1e3 * encode, 1), "tower": "InternViT-300M, float32, one tile, one thread"}
    for width, tower_dtype in itertools.product(WIDTHS, (torch.bfloat16, torch.float32)):
        tokens = torch.randn(ROWS_PER_TILE, width).to(tower_dtype)
        name = str(tower_dtype).removeprefix("torch.")
        for dtype in (name, *NARROW_DTYPES):
            seconds = _stage_seconds(tokens, dtype, repeats)
            figures[f"width {width}, {name} to {dtype}"] = {
                **{f"{stage}, ms": round(1e3 * value, 3) for stage, value in seconds.items()},
                "share of encode": round(sum(seconds.values()) / encode, 5),
            }  # fmt: skip
    return figures


def _stage_seconds(tokens: Tensor, dtype: str, repeats: int) -> dict[str, float]:
    """Seconds of a tile to become a payload, to be checked by the sink, and to be widened by vLLM's worker."""
    parts, header = convert(tokens, EMBEDDING_DTYPES[dtype]), Header("key", "", dtype, *tokens.shape)
    payload = view(join(parts, slice(0, len(tokens))))
    stages: dict[str, Callable[[], object]] = {
        "convert": lambda: join(convert(tokens, EMBEDDING_DTYPES[dtype]), slice(0, len(tokens))),
        "check": lambda: check_values(header, payload),
        # values that are not narrow are mapped
        "widen": lambda: dequantize(*parts, tokens.dtype) if len(parts) == 2 else None,
    }  # fmt: skip
    return {name: _cpu_seconds(stage, repeats) for name, stage in stages.items()}


def _cpu_seconds(work: Callable[[], object], repeats: int) -> float:
    """Median CPU time of this thread, so that other processes on the core do not count. The first run is the warm-up."""
    seconds = []
    for _ in range(repeats + 1):
        started_at = time.thread_time()
        work()
        seconds.append(time.thread_time() - started_at)
    return statistics.median(seconds[1:])


@torch.inference_mode()
def _encode_seconds(repeats: int) -> float:
    tower = our_tower(INTERN_VIT_300M, "cpu", torch.float32)
    if onednn.is_supported(torch.device("cpu"), torch.float32):
        onednn.optimize(tower)
    pixels = torch.randn(1, 3, 448, 448)
    return _cpu_seconds(lambda: tower(pixels), repeats)
