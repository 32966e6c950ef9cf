"""Requests per second of one GPU that serves an 8B model: by stock vLLM, and by a vision and a language worker that share it.

With images that were sent before, only the language worker computes, so that its half is measured alone. Needs vLLM, aiohttp
and what the server needs; weights are random and the vocabulary is that of the demo's tokenizer.
"""

import asyncio
import functools
import itertools
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.kit import Kit, Measurement, Skipped, require
from benchmarks.gpu.model import write_model
from benchmarks.gpu.shapes import Shape

if TYPE_CHECKING:
    from benchmarks.load import RequestTiming
    from benchmarks.processes import Server

STOCK, OURS, FLASH = "stock vLLM", "vision and language worker", "vision and language worker, half compressed"
NEW, REPEATED = "new images", "repeated images"
_QWEN3_8B = {
    "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
_DRY_LANGUAGE = {
    "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
}  # fmt: skip
_FLAGS = ("--no-enable-prefix-caching", "--max-model-len=16384", "--max-num-seqs=64", "--max-num-batched-tokens=8192")
_DEVICE_FLAGS = {
    "cuda": ("--dtype=bfloat16", "--gpu-memory-utilization=0.7"),
    "cpu": ("--dtype=float32", "--enforce-eager", "--kv-cache-memory-bytes=268435456"),
}
_ROOT = Path(__file__).parents[2]
_POOL = 16
"""Images that are sent repeatedly."""


@dataclass(frozen=True)
class _Workload:
    """What is sent: requests with an image each, `in_flight` at once, for `seconds` after a warm-up of half that time.

    Answers have half to one and a half times the mean number of `tokens`, so that they do not end in waves.
    """

    size: tuple[int, int]
    tokens: int
    in_flight: int
    seconds: float


def measurements(kit: Kit, shape: Shape) -> Iterator[Measurement]:
    """Yield a measurement for stock vLLM, for ours without a router, and for ours with one."""
    for name in (STOCK, OURS, FLASH):
        yield Measurement(f"serving 8B, {name}", 230, functools.partial(_measure, kit, shape, name))


def _measure(kit: Kit, shape: Shape, name: str) -> dict[str, Any]:
    require("vllm", "aiohttp", "grpc", *(["torchvision"] if name == STOCK else []))
    workload = _Workload((112, 56), 4, 2, 2.0) if kit.dry else _Workload((1920, 1080), 128, 64, 20.0)
    with tempfile.TemporaryDirectory(prefix="dvd-gpu-") as temporary, ExitStack() as servers:
        folder = Path(temporary)
        model = _write_checkpoint(folder / "model", kit, shape, flash=name == FLASH)
        started_at = time.monotonic()
        start = _stock if name == STOCK else _ours
        url = servers.enter_context(start(folder, model, kit.device.type))
        figures: dict[str, Any] = {"start, s": round(time.monotonic() - started_at, 1)}
        for images in (NEW, REPEATED) if name != STOCK else (NEW,):
            figures[images] = asyncio.run(_run(url, model.name, workload, repeated=images == REPEATED))
    return figures


def _write_checkpoint(folder: Path, kit: Kit, shape: Shape, flash: bool) -> Path:
    from benchmarks.checkpoint import write_front_end
    from demo.text.tokenizer import DemoTokenizer

    tokenizer = DemoTokenizer()
    sizes = _DRY_LANGUAGE if kit.dry else _QWEN3_8B
    language = {**sizes, "vocab_size": tokenizer.size, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6}
    write_model(folder, shape, language | {"torch_dtype": "bfloat16", "tie_word_embeddings": False}, flash)
    write_front_end(folder, tokenizer)
    return folder


@contextmanager
def _stock(folder: Path, model: Path, device: str) -> Iterator[str]:
    from benchmarks import colocated, processes
    from tests.ports import free_port

    remote = colocated.copy_with_remote_code(model, folder / "stock")
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={remote}", f"--port={port}", "--host=127.0.0.1",
        f"--served-model-name={model.name}", "--trust-remote-code", "--load-format=dummy", *_FLAGS, *_DEVICE_FLAGS[device],
    ]  # fmt: skip
    with _server(folder, "stock", command, lambda: processes.returns_ok(f"{url}/health"), VLLM_PLUGINS="none"):
        yield url


@contextmanager
def _ours(folder: Path, model: Path, device: str) -> Iterator[str]:
    from benchmarks import processes
    from tests.ports import free_port

    url = f"http://127.0.0.1:{(port := free_port())}"
    engine = f"127.0.0.1:{free_port()}"
    common = (str(model), "--load-format=dummy", f"--device={device}")
    vision = [sys.executable, "-m", "vision_worker", *common, f"--listen=unix:{folder / 'vision'}"]
    language = [
        sys.executable, "-m", "lm_worker", *common, f"--listen=unix:{folder / 'language'}", f"--http={engine}",
        "--", *_FLAGS, *_DEVICE_FLAGS[device],
    ]  # fmt: skip
    gateway = [
        sys.executable, "-m", "server", f"--port={port}", f"--vision-workers=unix:{folder / 'vision'}",
        f"--language-workers=unix:{folder / 'language'}", "--max-queue-seconds=3600",
    ]  # fmt: skip
    with ExitStack() as servers:
        # the vision worker first: vLLM's share is one of all memory, and it refuses to start where less is free
        servers.enter_context(_server(folder, "vision", vision, lambda: (folder / "vision").exists()))
        servers.enter_context(_server(folder, "language", language, lambda: processes.returns_ok(f"http://{engine}/health")))
        servers.enter_context(_server(folder, "gateway", gateway, lambda: processes.returns_ok(f"{url}/health/ready")))
        yield url


def _server(folder: Path, name: str, command: Sequence[str], ready: Callable[[], bool], **environment: str) -> "Server":
    from benchmarks import processes

    environment["PYTHONPATH"] = os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])
    return processes.Server(name, command, processes.available_cores(), folder, ready, environment)


async def _run(url: str, model: str, workload: _Workload, repeated: bool) -> dict[str, Any]:
    from benchmarks import load

    rng = random.Random(0)

    def body(image: str) -> bytes:
        return load.chat_body(model, "Describe the image.", [image], round(workload.tokens * rng.uniform(0.5, 1.5)))

    with _images(workload.size, _POOL if repeated else 0, workload.in_flight) as images:
        if repeated:  # from now on their embeddings are cached
            await load.run_closed_loop(url, [body(image) for image in itertools.islice(images, _POOL)], _POOL)
        begins_at = time.monotonic() + workload.seconds / 2
        ends_at = begins_at + workload.seconds
        bodies = (body(image) for image in itertools.takewhile(lambda _: time.monotonic() < ends_at, images))
        timings = await load.run_closed_loop(url, bodies, workload.in_flight)
    return summarize(timings, begins_at, ends_at)


@contextmanager
def _images(size: tuple[int, int], pool: int, ahead: int) -> Iterator[Iterator[str]]:
    """Yield an endless iterator of images, new ones or those of a pool; they are made by all cores ahead of their use."""
    from benchmarks import load

    with ProcessPoolExecutor(max(1, len(os.sched_getaffinity(0)) - 1), mp_context=get_context("spawn")) as executor:
        seeds = itertools.count(time.time_ns() & 0xFFFFFFFF)
        futures = [executor.submit(load.image_url, next(seeds), *size) for _ in range(pool or 4 * ahead)]
        for future in futures:
            future.result()

        def new_ones() -> Iterator[str]:
            while True:
                futures.append(executor.submit(load.image_url, next(seeds), *size))
                yield futures.pop(0).result()

        yield itertools.cycle([future.result() for future in futures]) if pool else new_ones()
        executor.shutdown(cancel_futures=True)


def summarize(timings: "Sequence[RequestTiming]", begins_at: float, ends_at: float) -> dict[str, float]:
    """Return requests per second of a span, and latencies of what came in it, in milliseconds.

    A request counts half with its first token and half with its other tokens. Raises: Skipped if no token came.
    """
    from dvd.plan.simulation import percentile, share_in_window

    def is_inside(moment: float) -> bool:
        return begins_at <= moment < ends_at

    shares = [share_in_window(each.token_times, len(each.token_times), begins_at, ends_at) for each in timings]
    first = [each.ttft for each in timings if is_inside(each.token_times[0])]
    gaps = [b - a for each in timings for a, b in itertools.pairwise(each.token_times) if is_inside(b)]
    if not first or not gaps:
        raise Skipped("no token came in time")
    return {
        "requests/s": round(sum(shares) / (ends_at - begins_at), 2),
        "median TTFT, ms": round(1e3 * statistics.median(first), 1),
        "median ITL, ms": round(1e3 * statistics.median(gaps), 2),
        "p99 ITL, ms": round(1e3 * percentile(gaps, 0.99), 1),
    }
