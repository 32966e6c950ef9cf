"""How much sooner is a request with one image answered, while the same caller has requests with twelve, because of the order?

Two stacks, one of which serves images in order of arrival, get the same load in turn. A real vision worker has a core of its
own; the language worker's engine is a fake with a fixed pace, so that images are the bottleneck. All requests come from one
address, so that turns of callers change nothing.
"""

import asyncio
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import checkpoint, load, processes
from benchmarks.options import Options
from benchmarks.result import Result, median_ratio

LARGE_IMAGES = 12
LARGE_IN_FLIGHT = 3
SMALL_PAUSE_SECONDS = 1.0
IMAGE_SIZE = (448, 448)
TOKENS = 4
RUNNERS = {"own order": (), "in order of arrival": ("benchmarks.first_come_first_served",)}


def run(options: Options) -> Result:
    """Measure both orders in turn. The headline is the ratio of the small requests' median latencies; the target is 3."""
    cores = processes.available_cores()
    with tempfile.TemporaryDirectory(prefix="dvd-bench-") as name, ExitStack() as servers:
        model = checkpoint.write_checkpoint(Path(name) / "medium")
        urls = {}
        for order, runner in RUNNERS.items():
            folder = Path(tempfile.mkdtemp(dir=name))
            servers.enter_context(processes.image_bound_workers(folder, model, cores, runner))
            urls[order] = servers.enter_context(processes.gateway(folder, cores[-1:], runner=runner)).url
        return asyncio.run(_measure(urls, model.name, options))


async def _measure(urls: dict[str, str], model: str, options: Options) -> Result:
    seeds, seconds = itertools.count(), 30.0 if options.quick else 60.0
    latencies: dict[str, list[float]] = {order: [] for order in urls}
    rates: dict[str, list[float]] = {order: [] for order in urls}
    for repeat in range(options.repeats(3)):
        for order in [*urls][:: 1 if repeat % 2 else -1]:
            small, images = await _load(urls[order], model, seeds, seconds)
            latencies[order].append(statistics.median(small))
            rates[order].append(images)
    own, arrival = RUNNERS
    ratio, spread = median_ratio(latencies[arrival], latencies[own])
    figures: dict[str, Any] = {
        "median latency of a request with one image, s": {o: round(statistics.median(v), 2) for o, v in latencies.items()},
        "images/s": {order: round(statistics.median(values), 2) for order, values in rates.items()},
        "images/s, own order over order of arrival": round(median_ratio(rates[own], rates[arrival])[0], 3),
    }
    return Result("scheduling", ratio, 3.0, spread, figures)


async def _load(url: str, model: str, seeds: Iterator[int], seconds: float) -> tuple[list[float], float]:
    """Keep large requests in flight and send small ones. Returns the latencies of the small ones, and images/s of all."""
    started = time.monotonic()
    answered: list[tuple[float, float, int]] = []

    async def send(images: int, pause: float) -> None:
        async with load.open_session() as session:
            while time.monotonic() < started + seconds:
                urls = [load.image_url(next(seeds), *IMAGE_SIZE) for _ in range(images)]
                timing = await load.send(session, url, load.chat_body(model, "What is shown?", urls, TOKENS))
                load.require_success(timing)
                answered.append((timing.ended_at, timing.duration, images))
                await asyncio.sleep(pause)

    await asyncio.gather(*(send(LARGE_IMAGES, 0.0) for _ in range(LARGE_IN_FLIGHT)), send(1, SMALL_PAUSE_SECONDS))
    ended = max(end for end, _, _ in answered)
    return [duration for _, duration, images in answered if images == 1], sum(n for _, _, n in answered) / (ended - started)
