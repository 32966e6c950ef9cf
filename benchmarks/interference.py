"""How much do image requests slow running streams? Inter-token latency of text streams during bursts of images.

The same streams, the same bursts and the same two cores for both sides: decoupled workers, and stock vLLM, which encodes
images in the loop that it decodes in.

Ours gets two more kinds of bursts, which tell where the rest comes from: prompts of as many text tokens, whose prefill is all
that they cost; and images that its sink has already, which adds reading embeddings. What new images add to these is the tower.
"""

import asyncio
import itertools
import random
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import checkpoint, colocated, load, processes
from benchmarks.options import Options
from benchmarks.result import Result, median_ratio
from dvd.plan.simulation import percentile

STREAMS, TOKENS = 4, 400
BURSTS, IMAGES_PER_BURST = 6, 4
BURST_INTERVAL_SECONDS = 1.5
IMAGE_SIZE = (896, 896)  # four tiles and a thumbnail
_IMAGE_TOKENS = 5 * 256
STEP_FLAGS = "--max-num-batched-tokens=32", "--max-num-seqs=32"
"""Flags of both sides. The prefill of an image's tokens delays running streams wherever it was encoded; this bounds it."""

_Percentiles = dict[str, list[dict[str, float]]]


def run(options: Options) -> Result:
    """Measure both sides. The headline is colocated's 99th percentile with images over ours; the target is 5.

    The figures also have each side's percentiles over that without images.
    """
    baseline = options.require_baseline("interference compares with stock vLLM")
    cores = processes.available_cores()
    with tempfile.TemporaryDirectory(prefix="dvd-bench-") as name, ExitStack() as servers:
        folder = Path(name)
        plain = checkpoint.write_checkpoint(folder / "plain", flash=False, language=checkpoint.SMALL_LANGUAGE)
        stock = colocated.copy_with_remote_code(plain, folder / "stock")
        servers.enter_context(processes.vision_worker(folder, plain, cores[:1], "--cache=none"))
        servers.enter_context(processes.language_worker(folder, plain, cores[-1:], "--dtype=float32", *STEP_FLAGS))
        gateway = servers.enter_context(processes.gateway(folder, cores))
        vllm = servers.enter_context(processes.stock_vllm(folder, baseline, stock, cores, "--dtype=float32", *STEP_FLAGS))
        percentiles: _Percentiles = {"ours": [], "colocated": []}
        for repeat in range(options.repeats(3) + 1):
            for side, server, model in (("ours", gateway, plain.name), ("colocated", vllm, stock.name)):
                measured = asyncio.run(_measure(server.url, model, repeat, explain=side == "ours"))
                if repeat:  # the first is the warm-up
                    percentiles[side].append(measured)
    return _result(percentiles)


def _result(percentiles: _Percentiles) -> Result:
    colocated_seconds, our_seconds = (
        [repeat["with images"] for repeat in percentiles[side]] for side in ("colocated", "ours")
    )  # fmt: skip
    ratio, spread = median_ratio(colocated_seconds, our_seconds)
    figures: dict[str, Any] = {}
    for side, repeats in percentiles.items():
        medians = {name: statistics.median(repeat[name] for repeat in repeats) for name in repeats[0]}
        figures[side] = {f"ITL p99 {name}, ms": round(1e3 * value, 2) for name, value in medians.items()}
        figures[side]["over alone"] = {
            name: round(statistics.median(repeat[name] / repeat["alone"] for repeat in repeats), 3) for name in repeats[0]
        }
    return Result("interference", ratio, 5.0, spread, figures)


async def _measure(url: str, model: str, repeat: int, explain: bool) -> dict[str, float]:
    """99th percentile of the streams' inter-token latency in seconds, without and with images.

    With `explain` also that with the two kinds of bursts that cost a part of what images do.
    """
    seeds = itertools.count(1000 * repeat)
    # Images are made before the streams start: making them takes CPU from the servers.
    images = [load.image_url(next(seeds), *IMAGE_SIZE) for _ in range(BURSTS * IMAGES_PER_BURST)]
    bodies = {"alone": list[bytes]()}
    if explain:
        bodies["with prompts of as many tokens"] = [_text_body(model, next(seeds)) for _ in images]
    bodies["with images"] = [_image_body(model, next(seeds), image) for image in images]
    if explain:
        bodies["with the same images again"] = [_image_body(model, next(seeds), image) for image in images]
    return {name: await _stream_percentile(url, model, next(seeds), burst_bodies) for name, burst_bodies in bodies.items()}


def _text_body(model: str, seed: int) -> bytes:
    """Return a request whose prompt has as many tokens as an image: the tokenizer encodes digits one by one."""
    digits = random.Random(seed).choices("0123456789", k=_IMAGE_TOKENS)
    return load.chat_body(model, "".join(digits), tokens=1)


def _image_body(model: str, seed: int, image: str) -> bytes:
    """Return a request that begins with a text of its own, so that vLLM reuses nothing of an earlier prompt."""
    parts = [
        {"type": "text", "text": f"Picture {seed}."},
        {"type": "image_url", "image_url": {"url": image}},
        {"type": "text", "text": "What is this?"},
    ]
    return load.chat_body(model, "", tokens=1, messages=[{"role": "user", "content": parts}])


async def _stream_percentile(url: str, model: str, seed: int, bodies: Sequence[bytes]) -> float:
    """Return the percentile of streams during bursts of these requests."""
    texts = [load.chat_body(model, f"Tell me about {seed} and {i}.", tokens=TOKENS) for i in range(STREAMS)]
    async with load.open_session() as session:
        streams = [asyncio.create_task(load.send(session, url, body)) for body in texts]
        await asyncio.sleep(1)
        requests = []
        for start in range(0, len(bodies), IMAGES_PER_BURST):
            burst = bodies[start : start + IMAGES_PER_BURST]
            requests += [asyncio.create_task(load.send(session, url, body)) for body in burst]
            await asyncio.sleep(BURST_INTERVAL_SECONDS)
        stream_timings = await asyncio.gather(*streams)
        for timing in (*stream_timings, *await asyncio.gather(*requests)):
            load.require_success(timing)
    return percentile([gap for timing in stream_timings for gap in timing.gaps], 0.99)
