"""Does the whole go as fast as its slower half? V images/s alone, L requests/s alone, E end to end; one core for each half.

V: `Vision.Encode` with delivery into the language worker's sink, nothing read. L: requests whose embeddings are there
already. E: fresh images through the gateway. Prefix caching is off, so that L and E read the same; the answer's length is
chosen so that V and L are near each other, where a serial system would do half of either.
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
from benchmarks.result import Result, ratio_of
from dvd.plan.model import Kind

SIZE = (448, 448)  # one tile
IN_FLIGHT = 32
"""All begin at once. With half as many the engine soon has them all, and vision runs dry until the first answers end."""
LONGER = 1.1
"""Language takes so many times as long as vision: gateway and load, which have no core of their own, get what vision leaves."""


def run(options: Options) -> Result:
    """The headline is E / min(V, L); target 0.9."""
    with tempfile.TemporaryDirectory(prefix="dvd-bench-") as name, ExitStack() as held:
        folder = Path(name)
        traces = folder / "traces"
        stack = _started(folder, traces, held)
        found, middle = asyncio.run(_measured(stack, options))
        found.notes.append(timeline.draw(traces, "overlap", middle))
        return found


def _started(folder: Path, traces: Path, held: ExitStack) -> Stack:
    cores, model = processes.cores(), checkpoint.make(folder / "middling")
    eye, tongue = cores[:1], cores[-1:]
    seeing = ("--cache=none", f"--trace={traces}", f"--max-batch-tiles={costs.BATCH}")
    held.enter_context(processes.vision(folder, model, eye, *seeing))
    held.enter_context(processes.language(folder, model, tongue, "--no-enable-prefix-caching", "--dtype=float32"))
    server, url = processes.gateway(folder, cores, f"--trace={traces}")
    held.enter_context(server)
    return Stack(folder, url, model, itertools.count(), IN_FLIGHT)


async def _measured(stack: Stack, options: Options) -> tuple[Result, float]:
    """And a moment at which all of it ran, of the monotonic clock; not of the last repeat: a trace is written out in pieces."""
    count = 96 if options.quick else 160
    await stack.requests([[picture] for picture in stack.pictures(2 * IN_FLIGHT, SIZE)], 4)  # warms everything
    priced, text = await costs.measured(replace(stack, in_flight=costs.IN_FLIGHT), SIZE, 1, count), await costs.prompt(stack)
    shown = [[picture] for picture in stack.pictures(count, SIZE)]
    tokens = await costs.balanced_alone(stack, shown, priced, 1, text, LONGER)
    found: dict[str, list[float]] = {"V": [], "L": [], "E": []}
    middles: list[float] = []
    for _ in range(options.repeats(3)):
        fresh = [[picture] for picture in stack.pictures(count, SIZE)]
        found["V"].append(await stack.images(stack.pictures(count, SIZE)))
        began = time.monotonic()
        found["E"].append(await stack.requests(fresh, tokens))
        middles.append((began + time.monotonic()) / 2)
        found["L"].append(await stack.requests(fresh, tokens))  # now they are there
    middle = {name: round(statistics.median(values), 3) for name, values in found.items()}
    ratio, spread = ratio_of(found["E"], [min(both) for both in zip(found["V"], found["L"], strict=True)])
    serial = 1 / (1 / middle["V"] + 1 / middle["L"])
    kind = Kind(tiles=1, text=text, output=tokens)
    beside = costs.beside(priced, kind, middle["V"], middle["L"], IN_FLIGHT)
    figures: dict[str, Any] = {
        **middle, "serial bound": round(serial, 3), "E over the serial bound": round(middle["E"] / serial, 3),
        "tokens of an answer": tokens, "in flight": IN_FLIGHT, "images": count,
        "cases": [costs.case("overlap", kind, middle["E"], beside, IN_FLIGHT)],
    }  # fmt: skip
    return Result("overlap", ratio, 0.9, spread, figures), middles[(len(middles) - 1) // 2]
