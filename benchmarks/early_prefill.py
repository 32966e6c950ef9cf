"""How much sooner is the first token of a request with many images if vLLM prefills them as they arrive?

Two gateways are in front of the same workers, one with `--early-prefill=false`, and get requests in turn. Each half has one
core. All images are new and have one tile, like the frames of a video; the checkpoint has no router, so that their visual
tokens are known beforehand.
"""

import asyncio
import itertools
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import checkpoint, load, processes
from benchmarks.options import Options
from benchmarks.result import Result, median_ratio

IMAGE_SIZE = (448, 448)  # one tile
IMAGE_COUNTS = (8, 16)
PROMPT = "What happens?"
TOKENS = 4
SATURATED_REQUESTS, IN_FLIGHT, SATURATED_IMAGES = 9, 3, 8
FLAGS = {"on": ("--early-prefill=true",), "off": ("--early-prefill=false",)}


def run(options: Options) -> Result:
    """Measure TTFT and throughput, on and off in turn. The headline is the smaller ratio of TTFT, off over on; target 1.3."""
    with tempfile.TemporaryDirectory(prefix="dvd-bench-") as name, ExitStack() as servers:
        folder = Path(name)
        cores, model = processes.available_cores(), checkpoint.write_checkpoint(folder / "medium", flash=False)
        servers.enter_context(processes.vision_worker(folder, model, cores[:1], "--cache=none"))
        servers.enter_context(processes.language_worker(folder, model, cores[-1:], "--dtype=float32"))
        urls = {mode: servers.enter_context(processes.gateway(folder, cores, *flags)).url for mode, flags in FLAGS.items()}
        return asyncio.run(_measure(urls, model.name, options))


async def _measure(urls: dict[str, str], model: str, options: Options) -> Result:
    seeds = itertools.count()
    figures: dict[str, Any] = {}
    ratios, spreads = [], []
    for count in IMAGE_COUNTS:
        ttfts: dict[str, list[float]] = {mode: [] for mode in urls}
        for repeat in range(options.repeats(5) + 1):
            for mode in _in_turn(repeat):
                (timing,) = await load.run_closed_loop(urls[mode], _bodies(model, seeds, 1, count), 1)
                if repeat:  # the first one is the warm-up
                    ttfts[mode].append(timing.ttft)
        ratio, spread = median_ratio(ttfts["off"], ttfts["on"])
        ratios.append(ratio)
        spreads.append(spread)
        figures[f"{count} images"] = {
            **{f"TTFT {mode}, s": round(statistics.median(values), 3) for mode, values in ttfts.items()},
            "off / on": round(ratio, 3), "spread": round(spread, 3),
        }  # fmt: skip
    rates: dict[str, list[float]] = {mode: [] for mode in urls}
    for repeat in range(options.repeats(3)):
        for mode in _in_turn(repeat):
            bodies = _bodies(model, seeds, SATURATED_REQUESTS, SATURATED_IMAGES)
            rates[mode].append(await load.saturated_rate(urls[mode], bodies, IN_FLIGHT))
    ratio, spread = median_ratio(rates["on"], rates["off"])
    figures["saturated"] = {
        **{f"requests/s {mode}": round(statistics.median(values), 3) for mode, values in rates.items()},
        "on / off": round(ratio, 3), "spread": round(spread, 3), "images": SATURATED_IMAGES, "in flight": IN_FLIGHT,
    }  # fmt: skip
    return Result("early-prefill", min(ratios), 1.3, max(spreads), figures)


def _in_turn(repeat: int) -> list[str]:
    """Both modes, each first in every second repeat."""
    return [*FLAGS][:: 1 if repeat % 2 else -1]


def _bodies(model: str, seeds: Iterator[int], requests: int, images: int) -> list[bytes]:
    return [
        load.chat_body(model, PROMPT, [load.image_url(next(seeds), *IMAGE_SIZE) for _ in range(images)], TOKENS)
        for _ in range(requests)
    ]
