"""Do running answers feel images arrive? Inter-token latency of text streams with bursts of images over that without.

The same streams, the same bursts, the same two cores: through decoupled workers, and through stock vLLM that encodes in the
loop it decodes in.
"""

import asyncio
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks import checkpoint, colocated, load, processes
from benchmarks.options import Options
from benchmarks.result import Result, ratio_of

STREAMS, TOKENS = 4, 400
BURSTS, BURST = 6, 4
PAUSE = 1.5
SIZE = (896, 896)  # four tiles and a thumbnail
STEP = "--max-num-batched-tokens=32", "--max-num-seqs=32"
"""Of both sides: reading an image's tokens holds running answers up too, wherever it was encoded, and this bounds it."""


def run(options: Options) -> Result:
    """The headline: colocated's 99th percentile with images over ours; target 5. Ours with over without is in the figures."""
    if options.baseline is None:
        raise RuntimeError("stock vLLM to compare with: name its Python with --baseline")
    cores = processes.cores()
    with tempfile.TemporaryDirectory(prefix="dvd-bench-") as name, ExitStack() as held:
        folder = Path(name)
        plain = checkpoint.make(folder / "plain", flash=False, language=checkpoint.SMALL)
        stock = colocated.copied(plain, folder / "stock")
        held.enter_context(processes.vision(folder, plain, cores[:1], "--cache=none"))
        held.enter_context(processes.language(folder, plain, cores[-1:], "--dtype=float32", *STEP))
        ours, our_url = processes.gateway(folder, cores)
        theirs, their_url = processes.colocated(folder, options.baseline, stock, cores, "--dtype=float32", *STEP)
        held.enter_context(ours)
        held.enter_context(theirs)
        found: dict[str, list[dict[str, float]]] = {"ours": [], "colocated": []}
        for repeat in range(options.repeats(3) + 1):
            for side, url, model in (("ours", our_url, plain.name), ("colocated", their_url, stock.name)):
                felt = asyncio.run(_felt(url, model, repeat))
                if repeat:  # the first warms
                    found[side].append(felt)
    return _result(found)


def _result(found: dict[str, list[dict[str, float]]]) -> Result:
    theirs, ours = ([repeat["with images"] for repeat in found[side]] for side in ("colocated", "ours"))
    ratio, spread = ratio_of(theirs, ours)
    figures: dict[str, Any] = {}
    for side, repeats in found.items():
        middle = {name: statistics.median(r[name] for r in repeats) for name in repeats[0]}
        figures[side] = {f"ITL p99 {name}, ms": round(1e3 * value, 2) for name, value in middle.items()}
        figures[side]["with over without"] = round(statistics.median(r["with images"] / r["alone"] for r in repeats), 3)
    return Result("interference", ratio, 5.0, spread, figures)


async def _felt(url: str, model: str, seed: int) -> dict[str, float]:
    """99th percentile of the streams' gaps, seconds: alone, and while images come."""
    return {"alone": await _streams(url, model, 2 * seed, 0), "with images": await _streams(url, model, 2 * seed + 1, BURSTS)}


async def _streams(url: str, model: str, seed: int, bursts: int) -> float:
    texts = [load.chat(model, f"Tell me about {seed} and {i}.", tokens=TOKENS) for i in range(STREAMS)]
    pictures = [load.picture(1000 * seed + i, *SIZE) for i in range(bursts * BURST)]  # not while somebody listens
    images = [load.chat(model, "What is this?", [picture], tokens=1) for picture in pictures]
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=900), read_bufsize=1 << 20) as session:
        speaking = [asyncio.create_task(load.ask(session, url, body)) for body in texts]
        await asyncio.sleep(1)
        shown = []
        for start in range(0, len(images), BURST):
            shown += [asyncio.create_task(load.ask(session, url, body)) for body in images[start : start + BURST]]
            await asyncio.sleep(PAUSE)
        done = await asyncio.gather(*speaking)
        seen = await asyncio.gather(*shown)
    for felt in (*done, *seen):
        if felt.error:
            raise RuntimeError(felt.error)
    return load.percentile([gap for felt in done for gap in felt.gaps], 0.99)
