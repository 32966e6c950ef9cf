"""What the second request with the same picture costs: vision work, bytes shipped, and time to the first token.

A second turn, another user of the same caller, sixteen at once; then, with redis, a second vision worker and a language
worker that was restarted. Work is counted where it is done: at the encoder and at the sender of each vision worker.
"""

import asyncio
import re
import statistics
import tempfile
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks import checkpoint, load, processes
from benchmarks.options import Options
from benchmarks.result import Result
from tests.redis_server import redis_server

SIZE = (1344, 896)  # six tiles and a thumbnail
TEXT = "What do you see?"


def run(options: Options) -> Result:
    """The headline: time to the first token of the first request over that of the repeat; target 2, and no work at all."""
    with tempfile.TemporaryDirectory(prefix="dvd-bench-") as name, ExitStack() as held:
        folder = Path(name)
        cores, model = processes.cores(), checkpoint.make(folder / "middling")
        cache = held.enter_context(redis_server(folder)).url
        ports = [processes.free_port(), processes.free_port()]
        for i, port in enumerate(ports):
            eye = "vision" if i == 0 else f"vision-{i}"
            flags = (f"--cache={cache}", f"--metrics-port={port}")
            held.enter_context(processes.vision(folder, model, cores[:1], *flags, name=eye))
        tongue = held.enter_context(ExitStack())
        tongue.enter_context(processes.language(folder, model, cores[-1:], "--dtype=float32"))
        server, url = processes.gateway(folder, cores, visions=2)
        held.enter_context(server)
        figures, ratios = _measured(url, model.name, ports, options.repeats(5))
        tongue.close()
        held.enter_context(processes.language(folder, model, cores[-1:], "--dtype=float32"))
        figures["restarted language worker"] = _restarted(url, model.name, ports)
    ratio = statistics.median(ratios)
    return Result("reuse", ratio, 2.0, (max(ratios) - min(ratios)) / ratio, figures)


def _measured(url: str, model: str, ports: list[int], repeats: int) -> tuple[dict[str, Any], list[float]]:
    ratios: list[float] = []
    work: dict[str, list[dict[str, float]]] = {"second turn": [], "another user": [], "sixteen at once": []}
    for i in range(repeats + 1):
        picture = load.picture(i, *SIZE)
        first = asyncio.run(_ask(url, [load.chat(model, TEXT, [picture], 4)]))[0]
        asks = {
            "second turn": [load.chat(model, f"{TEXT} And now?", [picture], 4)],
            "another user": [load.chat(model, TEXT, [picture], 4, user="somebody else")],
            "sixteen at once": [load.chat(model, f"{TEXT} {n}", [picture], 4) for n in range(16)],
        }
        for name, bodies in asks.items():
            before = _work(ports)
            done = asyncio.run(_ask(url, bodies))
            if i:  # the first picture warms
                work[name].append({what: after - before[what] for what, after in _work(ports).items()})
                if name == "another user":
                    ratios.append(first.ttft / done[0].ttft)
    figures: dict[str, Any] = {
        name: {what: max(found[what] for found in every) for what in every[0]} for name, every in work.items()
    }
    return figures, ratios


def _restarted(url: str, model: str, ports: list[int]) -> dict[str, float]:
    """The first picture again: its embedding is shipped anew, and not computed."""
    before = _work(ports)
    for _ in range(60):
        done = asyncio.run(_ask(url, [load.chat(model, TEXT, [load.picture(0, *SIZE)], 4)], patient=True))
        if not done[0].error:
            break
    return {what: after - before[what] for what, after in _work(ports).items()}


async def _ask(url: str, bodies: list[bytes], patient: bool = False) -> list[load.Felt]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as session:
        done = list(await asyncio.gather(*(load.ask(session, url, body) for body in bodies)))
    if errors := [felt.error for felt in done if felt.error]:
        if not patient:
            raise RuntimeError(errors[0])
        await asyncio.sleep(1)
    return done


def _work(ports: list[int]) -> dict[str, float]:
    """Tiles looked at and bytes sent, by all vision workers since they began."""
    found = {"tiles encoded": 0.0, "bytes shipped": 0.0}
    for port in ports:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
        for what, metric in (("tiles encoded", "dvd_vision_tiles"), ("bytes shipped", "dvd_vision_delivered_bytes")):
            found[what] += sum(float(value) for value in re.findall(rf"^{metric}_total(?:{{[^}}]*}})? (\S+)$", text, re.M))
    return found
