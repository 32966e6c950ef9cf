"""Ours against the best of three ways to serve with stock vLLM on the same two cores, on four mixes of requests.

* one stock vLLM over both cores,
* two independent replicas with a core each, between which the client alternates (a round-robin that costs nothing),
* tensor parallelism of two, with the vision tower's data split between the ranks (`--mm-encoder-tp-mode data`).

Ours: one core for vision, one for language, the gateway on either; and the same with a spare vision worker on the language
worker's core, which encodes when that core is idle. Stock vLLM cannot load a checkpoint with a router: ours
with one is compared with theirs without. `equal_hardware.py` measures latency and the bindings of one stock vLLM.
"""

import asyncio
import itertools
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import checkpoint, colocated, costs, load, processes
from benchmarks.checkpointed import CheckpointedRun
from benchmarks.equal_hardware import HALF_COMPRESSED_FLAGS, VLLM_FLAGS
from benchmarks.options import Options
from benchmarks.result import Result, median_ratio


class Mix(NamedTuple):
    """Requests of a mix.

    Attributes:
        with_image: Share of the requests that have an image.
        size: Width and height of the images.
        repeated: Share of the images that were sent before.
        tokens: Mean length of an answer.
    """

    with_image: float
    size: tuple[int, int] = (896, 448)
    repeated: float = 0.0
    tokens: int = 85


MIXES = {
    "balanced": Mix(1.0),
    "text only": Mix(0.0),
    "image-light": Mix(0.2),
    "balanced, a fifth repeated": Mix(1.0, repeated=0.2),
    "image-heavy": Mix(1.0, (896, 896), tokens=40),
    "long answers": Mix(1.0, tokens=140),
}
"""A balanced request has three tiles, an image-heavy one five. With long answers language is the slower half."""
STOCK = ("one over both cores", "two replicas", "tensor parallel")
OURS, SPARE, COMPRESSED = "ours", "ours, spare vision worker", "ours, half compressed"
GOALS = {
    ("balanced", OURS): 1.0, ("image-heavy", OURS): 1.0, ("long answers", COMPRESSED): 1.2,
    ("balanced, a fifth repeated", OURS): 1.4,
}  # fmt: skip
IN_FLIGHT = 16
REQUESTS = 44
WARM_UP_REQUESTS = 8


class Started(NamedTuple):
    """What answers requests: its URL, and its processes by their part."""

    url: load.Url
    parts: Mapping[str, processes.Server]


Start = Callable[[], AbstractContextManager[Sequence[Started]]]
"""Starts servers that belong together."""
Stack = tuple[Path, tuple[str, ...], Start]
"""Model, names and start of servers that belong together."""
Running = dict[str, tuple[Path, Started]]
"""Model and processes of each server."""


def run(options: Options) -> Result:
    """Measure all mixes. The headline is the smallest of the goals' ratios over their targets; the target is 1.0.

    A quick run compares ours with replicas, and leaves the router out.
    """
    baseline = options.require_baseline("baselines compares with stock vLLM")
    with tempfile.TemporaryDirectory(prefix="dvd-bench-") as name:
        folder = Path(name)
        plain = checkpoint.write_checkpoint(folder / "plain", flash=False)
        flash = checkpoint.write_checkpoint(folder / "flash")
        stock = colocated.copy_with_remote_code(plain, folder / "stock")
        replicas = (stock, (STOCK[1],), partial(_replicas, folder, baseline, stock))
        ours = (plain, (OURS, SPARE), partial(_ours, folder, plain, spare=True))
        others: list[Stack] = [
            (stock, (STOCK[0],), partial(_stock, folder, baseline, stock)),
            (stock, (STOCK[2],), partial(_stock, folder, baseline, stock, "-tp=2", "--mm-encoder-tp-mode=data")),
            (flash, (COMPRESSED,), partial(_ours, folder, flash, *HALF_COMPRESSED_FLAGS)),
        ]
        return _compare([replicas, ours] if options.quick else [replicas, *others, ours], options)


def _compare(stacks: Sequence[Stack], options: Options) -> Result:
    """Measure every mix on every server. All are running: an idle one costs memory, and 2 % of a core for each vLLM."""
    checkpointed = CheckpointedRun("baselines", options.quick)
    rates: dict[str, dict[str, list[float]]] = {mix: {} for mix in MIXES}
    core_seconds: dict[str, dict[str, dict[str, float]]] = {mix: {} for mix in MIXES}
    with ExitStack() as servers:
        running, failed = _start(stacks, servers)
        seeds = itertools.count()
        for name, (model, started) in running.items():
            asyncio.run(
                load.run_closed_loop(started.url, _bodies(model, MIXES["balanced"], seeds, WARM_UP_REQUESTS), WARM_UP_REQUESTS)
            )
            _log(f"{name} is warm")
        for repeat in range(options.repeats(3)):
            for mix in MIXES:
                names = [name for name in running if _is_compared(name, rates[mix])]
                for name in names[:: 1 if repeat % 2 else -1]:
                    model, started = running[name]
                    measure = partial(_measure, started, model, MIXES[mix], seeds)
                    rate, core_seconds[mix][name] = checkpointed.measure(f"{mix}, {name}, {repeat}", measure)
                    rates[mix].setdefault(name, []).append(rate)
                    _log(f"{mix}, {name}: {rate:.3f} requests/s, core-seconds per request: {core_seconds[mix][name]}")
    checkpointed.finish()
    return _result(rates, core_seconds, failed)


def _measure(started: Started, model: Path, mix: Mix, seeds: Iterator[int]) -> tuple[float, dict[str, float]]:
    """Return requests per second of a mix at saturation, and the core-seconds per request of each part."""
    before = _cpu_seconds(started)
    rate = asyncio.run(load.saturated_rate(started.url, _bodies(model, mix, seeds, REQUESTS), IN_FLIGHT))
    return rate, {part: round((value - before[part]) / REQUESTS, 3) for part, value in _cpu_seconds(started).items()}


def _cpu_seconds(started: Started) -> dict[str, float]:
    return {part: server.cpu_seconds() for part, server in started.parts.items()}


def _is_compared(name: str, measured: dict[str, list[float]]) -> bool:
    """Return whether a server is measured again on a mix: of stock vLLM's ways only the best one."""
    return name not in STOCK or not measured or name == _best_of_stock(measured)


def _best_of_stock(measured: dict[str, list[float]]) -> str:
    return max((name for name in measured if name in STOCK), key=lambda name: measured[name][0])


def _start(stacks: Sequence[Stack], servers: ExitStack) -> tuple[Running, dict[str, str]]:
    """Start all servers. Returns model and processes of each, and why one of stock vLLM's ways does not run here."""
    running, failed = Running(), dict[str, str]()
    for model, names, start in stacks:
        try:
            running |= {name: (model, one) for name, one in zip(names, servers.enter_context(start()), strict=True)}
        except RuntimeError as error:
            if names[0] not in STOCK:
                raise
            failed[names[0]] = str(error)[-300:]
            _log(f"{names[0]} does not run: {failed[names[0]]}")
    return running, failed


@contextmanager
def _stock(folder: Path, python: str, model: Path, *flags: str) -> Iterator[Sequence[Started]]:
    """One stock vLLM over all cores."""
    cores, own = processes.available_cores(), Path(tempfile.mkdtemp(dir=folder))
    bind = "|".join(map(str, cores)) if flags else ",".join(map(str, cores))  # a rank for each core, or one for all
    environment = {"VLLM_CPU_OMP_THREADS_BIND": bind}
    with processes.stock_vllm(own, python, model, cores, *VLLM_FLAGS, *flags, environment=environment) as server:
        yield [Started(server.url, {"vLLM": server})]


@contextmanager
def _replicas(folder: Path, python: str, model: Path) -> Iterator[Sequence[Started]]:
    """A stock vLLM on each core; requests alternate between them."""
    with ExitStack() as servers:
        parts = {}
        for number, core in enumerate(processes.available_cores()[:2]):
            server = processes.stock_vllm(Path(tempfile.mkdtemp(dir=folder)), python, model, [core], *VLLM_FLAGS)
            parts[f"replica {number}"] = servers.enter_context(server)
        yield [Started(itertools.cycle([server.url for server in parts.values()]), parts)]


@contextmanager
def _ours(folder: Path, model: Path, *gateway_flags: str, spare: bool = False) -> Iterator[Sequence[Started]]:
    """Our server, one core for vision and one for language.

    `spare`: with a second gateway, which also has a spare vision worker on the latter core.
    """
    cores, own = processes.available_cores(), Path(tempfile.mkdtemp(dir=folder))
    flags = ("--cache=none", f"--max-batch-tiles={costs.BATCH_TILES}")
    with ExitStack() as servers:
        vision = {"vision": servers.enter_context(processes.vision_worker(own, model, cores[:1], *flags))}
        language = {"language": servers.enter_context(processes.language_worker(own, model, cores[-1:], *VLLM_FLAGS))}
        fleets = [vision]
        if spare:
            worker = processes.vision_worker(own, model, cores[-1:], *flags, "--spare", name="spare")
            fleets.append(vision | {"spare": servers.enter_context(worker)})
        started = []
        for fleet in fleets:
            gateway = servers.enter_context(processes.gateway(own, cores, *gateway_flags, vision_names=[*fleet]))
            started.append(Started(gateway.url, fleet | language | {"gateway": gateway}))
        yield started


def _bodies(model: Path, mix: Mix, seeds: Iterator[int], count: int) -> list[bytes]:
    """Requests of a mix. Answers have half to one and a half times the mean length, so that they do not end in waves."""
    rng, sent, bodies = random.Random(7), list[str](), []
    for number in range(count):
        images = []
        if number * mix.with_image % 1 + mix.with_image >= 1:  # evenly spread
            repeat = sent and rng.random() < mix.repeated
            images = [rng.choice(sent) if repeat else load.image_url(next(seeds), *mix.size)]
            sent += images
        bodies.append(
            load.chat_body(model.name, f"What is this? {next(seeds)}", images, round(mix.tokens * rng.uniform(0.5, 1.5)))
        )
    return bodies


def _result(
    rates: dict[str, dict[str, list[float]]], core_seconds: dict[str, dict[str, dict[str, float]]], failed: dict[str, str]
) -> Result:
    figures: dict[str, Any] = {}
    for mix, by_server in rates.items():
        medians = {name: round(statistics.median(values), 3) for name, values in by_server.items()}
        best = _best_of_stock(by_server)
        ratios = {
            name: dict(zip(("ratio", "spread"), (round(x, 3) for x in median_ratio(values, by_server[best])), strict=True))
            for name, values in by_server.items()
            if name not in STOCK
        }
        figures[mix] = {
            "requests/s": medians, "best of stock vLLM": best, "over the best": ratios,
            "core-seconds per request, last repeat": core_seconds[mix],
        }  # fmt: skip
    goals = {(mix, name): goal for (mix, name), goal in GOALS.items() if name in rates[mix]}
    shares = {(mix, name): figures[mix]["over the best"][name]["ratio"] / goal for (mix, name), goal in goals.items()}
    spread = max(figures[mix]["over the best"][name]["spread"] for mix, name in goals)
    figures["goals"] = {f"{mix}, {name}": goal for (mix, name), goal in goals.items()}
    if failed:
        figures["does not run here"] = failed
    return Result("baselines", min(shares.values()), 1.0, spread, figures)


def _log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
