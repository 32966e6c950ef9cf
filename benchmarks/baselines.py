"""Ours against the best of three ways to serve with stock vLLM on the same two cores, on several mixes of requests.

* one stock vLLM over both cores,
* two independent replicas with a core each, between which the client alternates (a round-robin that costs nothing),
* tensor parallelism of two, with the vision tower's data split between the ranks (`--mm-encoder-tp-mode data`).

Ours: one core for vision, one for language, the gateway on either. Caches are on, as they are by default on either side. Stock
vLLM cannot load a checkpoint with a router: ours with one, which halves the visual tokens, is compared with theirs without.
`equal_hardware.py` measures latency and the bindings of one stock vLLM.
"""

import asyncio
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import checkpoint, colocated, costs, load, processes
from benchmarks.checkpointed import CheckpointedRun
from benchmarks.equal_hardware import HALF_OF_THE_TOKENS
from benchmarks.options import Options
from benchmarks.result import Result, median_ratio


class Mix(NamedTuple):
    """Requests of a mix.

    Attributes:
        with_image: Share of the requests that have an image.
        size: Width and height of the images.
        repeated: Share of the images that were sent before.
        tokens: Mean length of an answer.
        layers: Layers of the language model.
    """

    with_image: float
    size: tuple[int, int] = (896, 448)
    repeated: float = 0.0
    tokens: int = 85
    layers: int = checkpoint.LANGUAGE["num_hidden_layers"]


MIXES = {
    "balanced": Mix(1.0),
    "text only": Mix(0.0),
    "image-light": Mix(0.2),
    "balanced, a fifth repeated": Mix(1.0, repeated=0.2),
    "image-heavy": Mix(1.0, (896, 896), tokens=40),
    "long answers": Mix(1.0, tokens=140),
    "large language model": Mix(1.0, tokens=40, layers=14),
}
"""A balanced request has three tiles, an image-heavy one five. In the last two language is the slower half: by its answers, and
by its prefill, as where a language model of 8B reads the tiles of a tower of 300M."""
STOCK = ("one over both cores", "two replicas", "tensor parallel")
REPLICAS = STOCK[1]
OURS, COMPRESSED = "ours", "ours, half of the visual tokens"
GOALS = {
    ("balanced", OURS): 1.0, ("image-heavy", OURS): 1.0, ("long answers", COMPRESSED): 1.2,
    ("large language model", COMPRESSED): 1.2, ("balanced, a fifth repeated", OURS): 1.4,
}  # fmt: skip
IN_FLIGHT = 16
REQUESTS = 44
WARM_UP_REQUESTS = 8
DTYPE = "--dtype=float32"


class Started(NamedTuple):
    """What answers requests: the model, the URL, and the processes by their part."""

    model: Path
    url: load.Url
    parts: Mapping[str, processes.Server]


Stacks = Mapping[str, Callable[[], AbstractContextManager[Started]]]
"""What starts servers that belong together, by their name."""
Measured = dict[str, list[tuple[float, dict[str, float]]]]
"""Requests/s, and the busy cores of each part, of each repeat on a server."""


def run(options: Options) -> Result:
    """Measure all mixes. The headline is the smallest of the goals' ratios over their targets; the target is 1.0.

    A quick run compares with replicas only.
    """
    baseline = options.require_baseline("baselines compares with stock vLLM")
    with tempfile.TemporaryDirectory(prefix="dvd-bench-") as name:
        comparison = _Comparison(options)
        for layers in sorted({mix.layers for mix in MIXES.values()}):
            mixes = [name for name, mix in MIXES.items() if mix.layers == layers]
            comparison.measure(mixes, *_stacks(Path(name) / str(layers), baseline, layers))
        return comparison.result()


def _stacks(folder: Path, baseline: str, layers: int) -> tuple[Stacks, Stacks]:
    """Write checkpoints whose language model has so many layers. Returns the stacks of stock vLLM, and ours."""
    language = {**checkpoint.LANGUAGE, "num_hidden_layers": layers}
    plain = checkpoint.write_checkpoint(folder / "plain", flash=False, language=language)
    flash = checkpoint.write_checkpoint(folder / "flash", language=language)
    stock = colocated.copy_with_remote_code(plain, folder / "stock")
    theirs = {
        STOCK[0]: partial(_stock, folder, baseline, stock),
        REPLICAS: partial(_replicas, folder, baseline, stock),
        STOCK[2]: partial(_stock, folder, baseline, stock, "-tp=2", "--mm-encoder-tp-mode=data"),
    }
    return theirs, {OURS: partial(_ours, folder, plain), COMPRESSED: partial(_ours, folder, flash, *HALF_OF_THE_TOKENS)}


class _Comparison:
    """One run of the benchmark, which continues after the measurements of an interrupted one."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._checkpointed = CheckpointedRun("baselines", options.quick)
        self._seeds = itertools.count()
        self._failed: dict[str, str] = {}
        self._measured: dict[str, Measured] = {}
        self._best: dict[str, str] = {}
        self._alone: dict[str, dict[str, float]] = {}  # by mix

    def measure(self, mixes: Sequence[str], theirs: Stacks, ours: Stacks) -> None:
        """Find the best of theirs on each of these mixes, each alone; then measure it side by side with ours."""
        alone = {} if self._options.quick else self._measure_alone(mixes, theirs)
        best = {mix: max(alone, key=lambda name: alone[name][mix], default=REPLICAS) for mix in mixes}
        self._best |= best
        self._alone |= {mix: {name: rates[mix] for name, rates in alone.items()} for mix in mixes}
        with ExitStack() as servers:
            # all run at once: an idle one costs memory, and 2 % of a core for each vLLM
            stacks = {name: theirs[name] for name in sorted(set(best.values()))} | dict(ours)
            running = {name: servers.enter_context(start()) for name, start in stacks.items()}
            for name, started in running.items():
                self._warm_up(name, started)
            for repeat in range(self._options.repeats(3)):
                for mix in mixes:
                    names = [best[mix], *ours]
                    for name in names[:: 1 if repeat % 2 else -1]:
                        values = self._measure(running[name], mix, f"{mix}, {name}, {repeat}")
                        self._measured.setdefault(mix, {}).setdefault(name, []).append(values)

    def result(self) -> Result:
        """Return the result, and forget what an interrupted run would continue with."""
        self._checkpointed.finish()
        return _result(self._measured, self._best, self._alone, self._failed)

    def _measure_alone(self, mixes: Sequence[str], theirs: Stacks) -> dict[str, dict[str, float]]:
        """Return requests/s of each of theirs that runs here, by its name and mix."""
        rates = {}
        for name, start in theirs.items():
            with ExitStack() as servers:
                try:
                    started = servers.enter_context(start())
                except RuntimeError as error:
                    self._failed[name] = str(error)[-300:]
                    _log(f"{name} does not run: {self._failed[name]}")
                    continue
                self._warm_up(name, started)
                rates[name] = {mix: self._measure(started, mix, f"alone: {mix}, {name}")[0] for mix in mixes}
        return rates

    def _warm_up(self, name: str, started: Started) -> None:
        bodies = _bodies(started.model, MIXES["balanced"], self._seeds, WARM_UP_REQUESTS)
        asyncio.run(load.run_closed_loop(started.url, bodies, WARM_UP_REQUESTS))
        _log(f"{name} is warm")

    def _measure(self, started: Started, mix: str, key: str) -> tuple[float, dict[str, float]]:
        """Return requests/s and the busy cores of each part; a key names a measurement of the run."""
        rate, cores = self._checkpointed.measure(key, partial(_measure, started, MIXES[mix], self._seeds))
        _log(f"{key}: {rate:.3f} requests/s, busy cores: {cores}")
        return rate, cores


def _measure(started: Started, mix: Mix, seeds: Iterator[int]) -> tuple[float, dict[str, float]]:
    """Return requests per second of a mix at saturation, and the busy cores of each part.

    Cores over requests/s are core-seconds per request. To divide by the number of requests sent would count those as served
    that are cancelled at the end.
    """
    bodies = _bodies(started.model, mix, seeds, REQUESTS)
    before, started_at = _cpu_seconds(started), time.monotonic()
    rate = asyncio.run(load.saturated_rate(started.url, bodies, IN_FLIGHT))
    seconds = time.monotonic() - started_at
    return rate, {part: round((value - before[part]) / seconds, 3) for part, value in _cpu_seconds(started).items()}


def _cpu_seconds(started: Started) -> dict[str, float]:
    return {part: server.cpu_seconds() for part, server in started.parts.items()}


@contextmanager
def _stock(folder: Path, python: str, model: Path, *flags: str) -> Iterator[Started]:
    """One stock vLLM over all cores."""
    cores, own = processes.available_cores(), Path(tempfile.mkdtemp(dir=folder))
    bind = "|".join(map(str, cores)) if flags else ",".join(map(str, cores))  # a rank for each core, or one for all
    environment = {"VLLM_CPU_OMP_THREADS_BIND": bind}
    with processes.stock_vllm(own, python, model, cores, DTYPE, *flags, environment=environment) as server:
        yield Started(model, server.url, {"vLLM": server})


@contextmanager
def _replicas(folder: Path, python: str, model: Path) -> Iterator[Started]:
    """A stock vLLM on each core; requests alternate between them."""
    with ExitStack() as servers:
        parts = {}
        for number, core in enumerate(processes.available_cores()[:2]):
            server = processes.stock_vllm(Path(tempfile.mkdtemp(dir=folder)), python, model, [core], DTYPE)
            parts[f"replica {number}"] = servers.enter_context(server)
        yield Started(model, itertools.cycle([server.url for server in parts.values()]), parts)


@contextmanager
def _ours(folder: Path, model: Path, *gateway_flags: str) -> Iterator[Started]:
    """Our server, one core for vision and one for language."""
    cores, own = processes.available_cores(), Path(tempfile.mkdtemp(dir=folder))
    with ExitStack() as servers:
        parts = {
            "vision": processes.vision_worker(own, model, cores[:1], f"--max-batch-tiles={costs.BATCH_TILES}"),
            "language": processes.language_worker(own, model, cores[-1:], DTYPE),
            "gateway": processes.gateway(own, cores, *gateway_flags),
        }
        for server in parts.values():
            servers.enter_context(server)
        yield Started(model, parts["gateway"].url, parts)


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
    measured: Mapping[str, Measured],
    best: Mapping[str, str],
    alone: Mapping[str, Mapping[str, float]],
    failed: Mapping[str, str],
) -> Result:
    figures: dict[str, Any] = {}
    for mix, by_server in measured.items():
        rates = {name: [rate for rate, _ in repeats] for name, repeats in by_server.items()}
        ratios = {
            name: dict(zip(("ratio", "spread"), (round(x, 3) for x in median_ratio(values, rates[best[mix]])), strict=True))
            for name, values in rates.items()
            if name not in STOCK
        }
        figures[mix] = {
            "requests/s": {name: round(statistics.median(values), 3) for name, values in rates.items()},
            "best of stock vLLM": best[mix], "over the best": ratios,
            "stock vLLM, each alone, once": {name: round(rate, 3) for name, rate in alone[mix].items()},
            "busy cores, last repeat": {name: repeats[-1][1] for name, repeats in by_server.items()},
        }  # fmt: skip
    shares = {(mix, name): figures[mix]["over the best"][name]["ratio"] / goal for (mix, name), goal in GOALS.items()}
    spread = max(figures[mix]["over the best"][name]["spread"] for mix, name in GOALS)
    figures["goals"] = {f"{mix}, {name}": goal for (mix, name), goal in GOALS.items()}
    if failed:
        figures["does not run here"] = dict(failed)
    return Result("baselines", min(shares.values()), 1.0, spread, figures)


def _log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
