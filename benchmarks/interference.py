"""How much do image requests slow running streams? Inter-token latency of text streams during bursts of images.

The same streams, the same bursts and the same two cores for both sides: decoupled workers, and stock vLLM, which encodes
images in the loop that it decodes in.
"""

import asyncio
import statistics
import tempfile
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
STEP_FLAGS = "--max-num-batched-tokens=32", "--max-num-seqs=32"
"""Flags of both sides. The prefill of an image's tokens delays running streams wherever it was encoded; this bounds it."""

_Percentiles = dict[str, list[dict[str, float]]]


def run(options: Options) -> Result:
    """Measure both sides. The headline is colocated's 99th percentile with images over ours; the target is 5.

    The figures also have each side's percentile with images over that without.
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
                measured = asyncio.run(_measure(server.url, model, repeat))
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
        figures[side]["with over without"] = round(statistics.median(r["with images"] / r["alone"] for r in repeats), 3)
    return Result("interference", ratio, 5.0, spread, figures)


async def _measure(url: str, model: str, repeat: int) -> dict[str, float]:
    """99th percentile of the streams' inter-token latency in seconds, without and with images."""
    return {
        "alone": await _stream_percentile(url, model, 2 * repeat, 0),
        "with images": await _stream_percentile(url, model, 2 * repeat + 1, BURSTS),
    }


async def _stream_percentile(url: str, model: str, seed: int, bursts: int) -> float:
    texts = [load.chat_body(model, f"Tell me about {seed} and {i}.", tokens=TOKENS) for i in range(STREAMS)]
    # Images are made before the streams start: making them takes CPU from the servers.
    images = [load.image_url(1000 * seed + i, *IMAGE_SIZE) for i in range(bursts * IMAGES_PER_BURST)]
    image_bodies = [load.chat_body(model, "What is this?", [image], tokens=1) for image in images]
    async with load.open_session() as session:
        streams = [asyncio.create_task(load.send(session, url, body)) for body in texts]
        await asyncio.sleep(1)
        image_requests = []
        for start in range(0, len(image_bodies), IMAGES_PER_BURST):
            burst = image_bodies[start : start + IMAGES_PER_BURST]
            image_requests += [asyncio.create_task(load.send(session, url, body)) for body in burst]
            await asyncio.sleep(BURST_INTERVAL_SECONDS)
        stream_timings = await asyncio.gather(*streams)
        image_timings = await asyncio.gather(*image_requests)
    for timing in (*stream_timings, *image_timings):
        load.require_success(timing)
    return percentile([gap for timing in stream_timings for gap in timing.gaps], 0.99)
