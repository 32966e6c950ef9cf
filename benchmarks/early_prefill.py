"""How much sooner is the first token of a request with many images if vLLM prefills them as they arrive?

Two gateways are in front of the same workers, one with `--early-prefill=false`, and get requests in turn. Each half has one
core. All images are new and have one tile, like the frames of a video; the checkpoint has no router, so that their visual
tokens are known beforehand.
"""

import asyncio
import itertools
import statistics
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import checkpoint, load, processes
from benchmarks.options import Options
from benchmarks.result import Result, median_ratio

IMAGE_SIZE = (448, 448)  # one tile
IMAGE_COUNTS = (8, 16)
PROMPT = "What happens?"
TOKENS = 4
SATURATED_REQUESTS, IN_FLIGHT, LOAD_IMAGES = 15, 3, 8
LOAD, LOADED_REQUESTS = 0.7, 10
"""Share of the throughput without, and how many requests arrive at random in a run at that load."""
_Measured = tuple[float, float, dict[str, list[float]]]
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
    bench = _Bench(urls, model)
    figures: dict[str, Any] = {}
    ratios, spreads = [], []
    for count in IMAGE_COUNTS:
        ratio, spread, ttfts = await bench.idle_ttfts(count, options.repeats(5))
        ratios.append(ratio)
        spreads.append(spread)
        figures[f"{count} images"] = {
            **{f"TTFT {mode}, s": round(statistics.median(values), 3) for mode, values in ttfts.items()},
            "off / on": round(ratio, 3), "spread": round(spread, 3),
        }  # fmt: skip
    ratio, spread, rates = await bench.saturated_rates(options.repeats(3))
    figures["saturated"] = {
        **{f"requests/s {mode}": round(statistics.median(values), 3) for mode, values in rates.items()},
        "on / off": round(ratio, 3), "spread": round(spread, 3), "images": LOAD_IMAGES, "in flight": IN_FLIGHT,
    }  # fmt: skip
    offered = LOAD * statistics.median(rates["off"])
    ratio, spread, medians = await bench.loaded_ttfts(offered, options.repeats(3))
    figures[f"at {LOAD:.0%} load"] = {
        **{f"median TTFT {mode}, s": round(statistics.median(values), 3) for mode, values in medians.items()},
        "off / on": round(ratio, 3), "spread": round(spread, 3), "offered, requests/s": round(offered, 3),
    }  # fmt: skip
    return Result("early-prefill", min(ratios), 1.3, max(spreads), figures)


@dataclass
class _Bench:
    """Both gateways, by mode, and the measurements: each returns the median ratio, its spread and what was measured by mode."""

    urls: dict[str, str]
    model: str
    _seeds: Iterator[int] = field(default_factory=itertools.count)

    async def idle_ttfts(self, images: int, repeats: int) -> _Measured:
        """Time to first token of a request that is alone."""

        async def ttft(url: str) -> float:
            (timing,) = await load.run_closed_loop(url, self._bodies(1, images), 1)
            return timing.ttft

        return _compared(await self._in_turn(ttft, repeats + 1), "off", "on", warm_up=1)

    async def saturated_rates(self, repeats: int) -> _Measured:
        """Requests per second at saturation."""

        async def rate(url: str) -> float:
            return await load.saturated_rate(url, self._bodies(SATURATED_REQUESTS, LOAD_IMAGES), IN_FLIGHT)

        return _compared(await self._in_turn(rate, repeats), "on", "off")

    async def loaded_ttfts(self, offered: float, repeats: int) -> _Measured:
        """Median time to first token at an offered load in requests per second."""

        async def ttft(url: str) -> float:
            timings = await load.run_open_loop(url, self._bodies(LOADED_REQUESTS, LOAD_IMAGES), offered)
            return statistics.median(timing.ttft for timing in timings)

        return _compared(await self._in_turn(ttft, repeats), "off", "on")

    async def _in_turn(self, measure: Callable[[str], Awaitable[float]], repeats: int) -> dict[str, list[float]]:
        """Measure both modes, each first in every second repeat."""
        measured: dict[str, list[float]] = {mode: [] for mode in self.urls}
        for repeat in range(repeats):
            for mode in [*self.urls][:: 1 if repeat % 2 else -1]:
                measured[mode].append(await measure(self.urls[mode]))
        return measured

    def _bodies(self, requests: int, images: int) -> list[bytes]:
        return [
            load.chat_body(self.model, PROMPT, [load.image_url(next(self._seeds), *IMAGE_SIZE) for _ in range(images)], TOKENS)
            for _ in range(requests)
        ]


def _compared(measured: dict[str, list[float]], over: str, under: str, warm_up: int = 0) -> _Measured:
    kept = {mode: values[warm_up:] for mode, values in measured.items()}
    return *median_ratio(kept[over], kept[under]), kept
