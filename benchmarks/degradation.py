"""Degradation: at 1.5 and 3 times the images that the server can encode, what does `--degrade-after` add to the goodput?

Two gateways are in front of the same workers, one with degradation, and get the load in turn. A real vision worker has a core
of its own; the language worker's engine is a fake with a fixed pace, so that images are the bottleneck. What fewer tiles cost
in accuracy is measured by `python -m demo.evaluate --parts tiles`.
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
from benchmarks.overload import MAX_QUEUE_SECONDS, Phase, closed_loop, open_loop
from benchmarks.result import Result, median_ratio

LOADS = (1.5, 3.0)
"""Offered load as multiples of the requests/s at saturation without degradation."""
IMAGE_SIZE = (1344, 896)
"""Six tiles and a thumbnail; the lowest level of degradation cuts four and a thumbnail at most."""
IN_FLIGHT = 4
TOKENS = 4
FLAGS = {"on": ("--degrade-after=0.5",), "off": ()}
_RECOVERY_SECONDS = 15.0
"""Between two loads: the queue empties, and the level falls to none."""


def run(options: Options) -> Result:
    """Measure goodput with and without degradation in turn. The headline is the smaller ratio, on over off; target 1.2."""
    cores = processes.available_cores()
    with tempfile.TemporaryDirectory(prefix="dvd-bench-") as name, ExitStack() as servers:
        folder = Path(name)
        model = checkpoint.write_checkpoint(folder / "medium")
        servers.enter_context(processes.image_bound_workers(folder, model, cores))
        queue = f"--max-queue-seconds={MAX_QUEUE_SECONDS:g}"
        urls = {
            mode: servers.enter_context(processes.gateway(folder, cores[-1:], queue, *flags)).url
            for mode, flags in FLAGS.items()
        }
        return asyncio.run(_measure(urls, model.name, options))


async def _measure(urls: dict[str, str], model: str, options: Options) -> Result:
    seconds, bodies = (20.0 if options.quick else 40.0), _bodies(model)
    timings = await closed_loop(urls["off"], bodies, seconds, IN_FLIGHT, "peak")
    peak = load.throughput([timing for timing in timings if not timing.error])
    figures: dict[str, Any] = {"requests/s at saturation": round(peak, 2)}
    ratios, spreads = [], []
    for multiple in LOADS:
        phases: dict[str, list[Phase]] = {mode: [] for mode in urls}
        for repeat in range(options.repeats(3)):
            for mode in [*urls][:: 1 if repeat % 2 else -1]:
                await asyncio.sleep(_RECOVERY_SECONDS)
                phases[mode].append(await _load(urls[mode], bodies, multiple * peak, seconds))
        goodput = {mode: [phase.goodput() for phase in repeats] for mode, repeats in phases.items()}
        ratio, spread = median_ratio(goodput["on"], goodput["off"])
        ratios.append(ratio)
        spreads.append(spread)
        figures[f"{multiple:g} times"] = {
            **{f"goodput {mode}, requests/s": round(statistics.median(values), 3) for mode, values in goodput.items()},
            **{f"answers {mode}": phases[mode][-1].codes() for mode in urls},
            "on / off": round(ratio, 3), "spread": round(spread, 3),
        }  # fmt: skip
    return Result("degradation", min(ratios), 1.2, max(spreads), figures)


async def _load(url: str, bodies: Iterator[bytes], rate: float, seconds: float) -> Phase:
    """Send requests at `rate` whether or not the server keeps up."""
    ready = list(itertools.islice(bodies, int(rate * seconds)))  # made before, so that the generator keeps up
    started = asyncio.get_running_loop().time()
    timings = await open_loop(url, ready, rate, {})
    return Phase(timings, started, started + seconds)


def _bodies(model: str) -> Iterator[bytes]:
    """Requests with an image each, none of them equal."""
    for number in itertools.count():
        yield load.chat_body(model, f"What is shown? {number}", [load.image_url(number, *IMAGE_SIZE)], TOKENS)
