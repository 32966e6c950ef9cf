"""What a second request with the same image costs: vision work, bytes shipped, and time to first token.

The image comes again in a second turn, from another user, and in sixteen concurrent requests; then, with Redis and two vision
workers, after a restart of the language worker. Work is counted by the metrics of the vision workers.
"""

import asyncio
import re
import statistics
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import checkpoint, load, processes
from benchmarks.options import Options
from benchmarks.result import Result, spread_of
from tests.ports import free_port
from tests.redis_server import redis_server

IMAGE_SIZE = (1344, 896)  # six tiles and a thumbnail
PROMPT = "What do you see?"
TOKENS = 4
VISION_NAMES = ("vision", "vision-1")
COUNTERS = {"tiles encoded": "dvd_vision_tiles", "bytes shipped": "dvd_vision_delivered_bytes"}
"""Metrics of a vision worker by the name of the figure."""
_RESTART_ATTEMPTS = 60

_Work = dict[str, float]


def run(options: Options) -> Result:
    """Measure reuse. The headline is TTFT of a first request over that of its repeat; the target is 2."""
    with tempfile.TemporaryDirectory(prefix="dvd-bench-") as name, ExitStack() as servers:
        folder = Path(name)
        cores, model = processes.available_cores(), checkpoint.write_checkpoint(folder / "medium")
        cache = servers.enter_context(redis_server(folder)).url
        metrics_ports = [free_port() for _ in VISION_NAMES]
        for vision_name, port in zip(VISION_NAMES, metrics_ports, strict=True):
            flags = (f"--cache={cache}", f"--metrics-port={port}")
            servers.enter_context(processes.vision_worker(folder, model, cores[:1], *flags, name=vision_name))
        language = servers.enter_context(ExitStack())
        language.enter_context(processes.language_worker(folder, model, cores[-1:], "--dtype=float32"))
        url = servers.enter_context(processes.gateway(folder, cores, vision_names=VISION_NAMES)).url
        figures, ratios = _measure(url, model.name, metrics_ports, options.repeats(5))
        language.close()
        servers.enter_context(processes.language_worker(folder, model, cores[-1:], "--dtype=float32"))
        figures["restarted language worker"] = _work_after_restart(url, model.name, metrics_ports)
    return Result("reuse", statistics.median(ratios), 2.0, spread_of(ratios), figures)


def _measure(url: str, model: str, metrics_ports: list[int], repeats: int) -> tuple[dict[str, Any], list[float]]:
    """Maximum work of each kind of repeat, and the ratios of TTFT, first over another user's."""
    ratios: list[float] = []
    work: dict[str, list[_Work]] = {"second turn": [], "another user": [], "sixteen at once": []}
    for repeat in range(repeats + 1):
        image = load.image_url(repeat, *IMAGE_SIZE)
        first = asyncio.run(_send_all(url, [load.chat_body(model, PROMPT, [image], TOKENS)]))[0]
        repeated = {
            "second turn": [load.chat_body(model, f"{PROMPT} And now?", [image], TOKENS)],
            "another user": [load.chat_body(model, PROMPT, [image], TOKENS, user="another user")],
            "sixteen at once": [load.chat_body(model, f"{PROMPT} {n}", [image], TOKENS) for n in range(16)],
        }
        for name, bodies in repeated.items():
            before = _read_work(metrics_ports)
            timings = asyncio.run(_send_all(url, bodies))
            if repeat:  # the first image is the warm-up
                work[name].append(_work_since(before, metrics_ports))
                if name == "another user":
                    ratios.append(first.ttft / timings[0].ttft)
    return {
        name: {counter: max(entry[counter] for entry in entries) for counter in COUNTERS} for name, entries in work.items()
    }, ratios


def _work_after_restart(url: str, model: str, metrics_ports: list[int]) -> _Work:
    """Work for the first image: its embedding is shipped again, but not computed. Retries until the worker is up."""
    before = _read_work(metrics_ports)
    body = load.chat_body(model, PROMPT, [load.image_url(0, *IMAGE_SIZE)], TOKENS)
    for _ in range(_RESTART_ATTEMPTS):
        try:
            asyncio.run(_send_all(url, [body]))
            break
        except RuntimeError:
            time.sleep(1)
    return _work_since(before, metrics_ports)


async def _send_all(url: str, bodies: list[bytes]) -> list[load.RequestTiming]:
    """Send all requests at once. Raises `RuntimeError` if one fails."""
    return await load.run_closed_loop(url, bodies, len(bodies))


def _work_since(before: _Work, metrics_ports: list[int]) -> _Work:
    return {counter: value - before[counter] for counter, value in _read_work(metrics_ports).items()}


def _read_work(metrics_ports: list[int]) -> _Work:
    """Sums of the counters over all vision workers since they started."""
    work = dict.fromkeys(COUNTERS, 0.0)
    for port in metrics_ports:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
            text = response.read().decode()
        for counter, metric in COUNTERS.items():
            values = re.findall(rf"^{metric}_total(?:{{[^}}]*}})? (\S+)$", text, re.M)
            work[counter] += sum(float(value) for value in values)
    return work
