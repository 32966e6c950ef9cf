"""Is the pipeline as fast as its slower half? V: images/s of vision alone. L: requests/s of language alone. E: end to end.

Each half has one core. V is `Vision.Encode` with delivery into the language worker's sink and no prefill. L are requests
whose embeddings are in place. E are new images through the gateway. Prefix caching is off, so that L and E prefill the same
tokens. The answer length is chosen so that V and L are close, where a serial system would reach half of either.
"""

import asyncio
import itertools
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import checkpoint, costs, processes, timeline
from benchmarks.costs import Stack
from benchmarks.options import Options
from benchmarks.result import Result, median_ratio
from dvd.plan.model import Kind

IMAGE_SIZE = (448, 448)  # one tile
IN_FLIGHT = 32
"""All begin at once. With half as many, soon all are in the engine, and vision idles until the first answers end."""
LANGUAGE_FACTOR = 1.1
"""Language takes this many times as long as vision. The gateway and the load have no core of their own and use the rest."""


def run(options: Options) -> Result:
    """Measure V, L and E. The headline is E / min(V, L); the target is 0.9."""
    with tempfile.TemporaryDirectory(prefix="dvd-bench-") as name, ExitStack() as servers:
        folder = Path(name)
        traces = folder / "traces"
        stack = _start(folder, traces, servers)
        result, middle = asyncio.run(_measure(stack, options))
        result.notes.append(timeline.draw(traces, "overlap", middle))
        return result


def _start(folder: Path, traces: Path, servers: ExitStack) -> Stack:
    cores, model = processes.available_cores(), checkpoint.write_checkpoint(folder / "medium")
    vision_cores, language_cores = cores[:1], cores[-1:]
    vision_flags = ("--cache=none", f"--trace={traces}", f"--max-batch-tiles={costs.BATCH_TILES}")
    vllm_flags = ("--no-enable-prefix-caching", "--dtype=float32")
    servers.enter_context(processes.vision_worker(folder, model, vision_cores, *vision_flags))
    servers.enter_context(processes.language_worker(folder, model, language_cores, *vllm_flags))
    gateway = servers.enter_context(processes.gateway(folder, cores, f"--trace={traces}"))
    return Stack(folder, gateway.url, model, itertools.count(), IN_FLIGHT)


async def _measure(stack: Stack, options: Options) -> tuple[Result, float]:
    """The result, and a moment of the monotonic clock in the middle of an end-to-end run.

    The moment is not in the last repeat, because traces are written in pieces.
    """
    count = 96 if options.quick else 160
    await stack.request_rate(_single_image_requests(stack, 2 * IN_FLIGHT), 4)  # warm-up
    stage_costs = await costs.measure_costs(replace(stack, in_flight=costs.IN_FLIGHT), IMAGE_SIZE, 1, count)
    text = await stack.prompt_tokens()
    requests = _single_image_requests(stack, count)
    tokens = await costs.measure_balanced_tokens(stack, requests, stage_costs, 1, text, LANGUAGE_FACTOR)
    rates: dict[str, list[float]] = {"V": [], "L": [], "E": []}
    middles: list[float] = []
    for _ in range(options.repeats(3)):
        requests = _single_image_requests(stack, count)
        rates["V"].append(await stack.encode_rate(stack.new_images(count, IMAGE_SIZE)))
        started_at = time.monotonic()
        rates["E"].append(await stack.request_rate(requests, tokens))
        middles.append((started_at + time.monotonic()) / 2)
        rates["L"].append(await stack.request_rate(requests, tokens))  # their embeddings are in place now
    medians = {name: round(statistics.median(values), 3) for name, values in rates.items()}
    ratio, spread = median_ratio(rates["E"], [min(pair) for pair in zip(rates["V"], rates["L"], strict=True)])
    serial = 1 / (1 / medians["V"] + 1 / medians["L"])
    kind = Kind(tiles=1, text=text, output=tokens)
    calibrated = costs.calibrated(stage_costs, kind, medians["V"], medians["L"], IN_FLIGHT)
    figures: dict[str, Any] = {
        **medians, "serial bound": round(serial, 3), "E over the serial bound": round(medians["E"] / serial, 3),
        "tokens of an answer": tokens, "in flight": IN_FLIGHT, "images": count,
        "cases": [costs.plan_case("overlap", kind, medians["E"], calibrated, IN_FLIGHT)],
    }  # fmt: skip
    return Result("overlap", ratio, 0.9, spread, figures), middles[(len(middles) - 1) // 2]


def _single_image_requests(stack: Stack, count: int) -> list[list[str]]:
    return [[image] for image in stack.new_images(count, IMAGE_SIZE)]
