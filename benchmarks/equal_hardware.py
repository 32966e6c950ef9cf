"""Ours against stock vLLM on the same cores: requests/s at saturation, TTFT and inter-token latency at offered loads.

Colocated: stock vLLM on both cores, with the better of two core bindings. Ours: one core for vision, one for language, the
gateway on either. The comparison is without the router; a variant with half of the visual tokens is measured too. A
request has one image of two tiles and a thumbnail, and an answer for which both halves take about equally long.
"""

import asyncio
import itertools
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import checkpoint, colocated, costs, load, processes
from benchmarks.checkpointed import CheckpointedRun
from benchmarks.costs import Stack
from benchmarks.options import Options
from benchmarks.result import Result, median_ratio
from dvd.plan.model import Costs, Kind
from dvd.plan.simulation import percentile


class Mix(NamedTuple):
    """Images of a request: width and height, tiles of each including the thumbnail, and number."""

    size: tuple[int, int]
    tiles: int
    images: int = 1


BALANCED = "three tiles"
MIXES = {
    BALANCED: Mix((896, 448), 3),
    "one tile": Mix((448, 448), 1),
    "five tiles": Mix((896, 896), 5),
    "thirteen tiles": Mix(costs.LARGE_IMAGE_SIZE, costs.LARGE_IMAGE_TILES),
    "four images of one tile": Mix((448, 448), 1, 4),
}
COLOCATED = ("colocated, both cores", "colocated, one for its front end")
"""Bindings of stock vLLM; the index is the number of cores that its engine leaves to its front end."""
OURS, COMPRESSED = "ours", "ours, half of the visual tokens"
LOADS = (0.4, 0.7, 0.9)
"""Offered loads as shares of colocated's saturated throughput."""
PAIRS = 5
IN_FLIGHT = 32
"""Of ours about half are in the engine, the others in the vision worker."""
VLLM_FLAGS = "--dtype=float32", "--no-enable-prefix-caching"
"""Flags of vLLM on both sides. All images differ, so a prefix cache would matter only where a half is measured alone."""
HALF_OF_THE_TOKENS = ("--vir-relative-threshold=0.34", "--vir-absolute-threshold=0")
"""Compresses two of three tiles and three of five: 384 of 768 visual tokens are left, and 704 of 1,280."""
_COMPRESSED = 2 / 3
"""Share of the tiles that are compressed."""

_Rates = dict[str, list[float]]


def run(options: Options) -> Result:
    """Measure both sides. The headline is requests/s of ours without router over colocated's; the target is 1.0."""
    baseline = options.require_baseline("equal-hardware compares with stock vLLM")
    with tempfile.TemporaryDirectory(prefix="dvd-bench-") as name:
        folder = Path(name)
        plain = checkpoint.write_checkpoint(folder / "plain", flash=False)
        flash = checkpoint.write_checkpoint(folder / "flash")
        stock = colocated.copy_with_remote_code(plain, folder / "stock")
        comparison = _Comparison(options, baseline, folder, stock)
        stage_costs, text, tokens = comparison.measure_costs(plain)
        return comparison.compare(plain, flash, stage_costs, text, tokens)


class _Comparison:
    """One run of the benchmark, which continues after the measurements of an interrupted one."""

    def __init__(self, options: Options, baseline: str, folder: Path, stock: Path) -> None:
        self._options, self._baseline, self._folder, self._stock = options, baseline, folder, stock
        self._checkpointed = CheckpointedRun("equal-hardware", options.quick)
        self._seeds = itertools.count()
        self._count = 32 if options.quick else 48
        """Requests in a measurement, besides those before and after its window."""

    @contextmanager
    def our_stack(self, model: Path, *gateway_flags: str) -> Iterator[Stack]:
        """Our server, one core for vision and one for language."""
        cores = processes.available_cores()
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        with ExitStack() as servers:
            vision_flags = ("--cache=none", f"--max-batch-tiles={costs.BATCH_TILES}")
            servers.enter_context(processes.vision_worker(folder, model, cores[:1], *vision_flags))
            servers.enter_context(processes.language_worker(folder, model, cores[-1:], *VLLM_FLAGS))
            gateway = servers.enter_context(processes.gateway(folder, cores, *gateway_flags))
            yield Stack(folder, gateway.url, model, self._seeds, IN_FLIGHT)

    @contextmanager
    def colocated_stack(self, front_end_cores: int) -> Iterator[Stack]:
        """Stock vLLM; its engine leaves `front_end_cores` cores to its front end."""
        cores = processes.available_cores()
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        engine_cores = cores[front_end_cores:] or cores
        server = processes.stock_vllm(folder, self._baseline, self._stock, engine_cores, *VLLM_FLAGS)
        server.cores = cores
        with server:
            yield Stack(folder, server.url, self._stock, self._seeds, IN_FLIGHT)

    def measure_costs(self, model: Path) -> tuple[Costs, int, int]:
        """Costs of the stages, tokens of a prompt without image, and tokens of an answer that balances both halves."""
        stage_costs, text, tokens = self._checkpointed.measure("costs", partial(self._measure_costs, model))
        return Costs.model_validate(stage_costs), text, tokens

    def _measure_costs(self, model: Path) -> tuple[dict[str, Any], int, int]:
        with self.our_stack(model) as full_stack:
            stack = _with_fewer_in_flight(full_stack)
            mix = MIXES[BALANCED]
            stage_costs = asyncio.run(costs.measure_costs(stack, mix.size, mix.tiles, 4 * costs.IN_FLIGHT))
            text = asyncio.run(stack.prompt_tokens())
            requests = self.mix_requests(stack, BALANCED)
            tokens = asyncio.run(costs.measure_balanced_tokens(stack, requests, stage_costs, mix.tiles, text))
            return stage_costs.model_dump(), text, tokens

    def compare(self, plain: Path, flash: Path, stage_costs: Costs, text: int, tokens: int) -> Result:
        """Measure everything with all servers running; an idle one costs only memory."""
        measure = self._checkpointed.measure
        with ExitStack() as servers:
            bindings = {name: servers.enter_context(ExitStack()) for name in COLOCATED}
            stacks = {
                **{name: bindings[name].enter_context(self.colocated_stack(i)) for i, name in enumerate(COLOCATED)},
                OURS: servers.enter_context(self.our_stack(plain)),
                COMPRESSED: servers.enter_context(self.our_stack(flash, *HALF_OF_THE_TOKENS)),
            }
            warm_up = {name: self.saturated_rate(stack, tokens) for name, stack in stacks.items()}  # in a resumed run too
            _log(f"warm, tokens of an answer {tokens}: {warm_up}")
            first = measure("warm", lambda: warm_up)
            best, worse = sorted(COLOCATED, key=lambda name: -first[name])
            del stacks[worse]
            bindings[worse].close()
            pairs = [
                measure(f"pair {number}", partial(self.measure_pair, stacks, tokens, number % 2 == 0))
                for number in range(self._options.repeats(PAIRS))
            ]
            rates: _Rates = {name: [pair[name] for pair in pairs] for name in stacks}
            most = statistics.median(rates[best])
            latency = {
                name: measure(f"latency, {name}", partial(self.measure_latency, stacks[name], tokens, most)) for name in stacks
            }
            longer = measure("longer", partial(self.measure_longer_answers, stacks, stage_costs, text))
            mixes = {best: measure("mixes", partial(self.measure_mixes, _with_fewer_in_flight(stacks[best]), tokens))}
            bindings[best].close()  # vLLM's memory grows with every image
            ours = _with_fewer_in_flight(stacks[OURS])
            cases = [
                measure(f"case, {name}", partial(self.measure_plan_case, ours, name, stage_costs, tokens, text))
                for name in MIXES
            ]
            mixes[OURS] = {case["name"]: case["requests/s"] for case in cases[1:]}
        result = _result(rates, latency, tokens, best)
        result.figures |= {
            "requests/s, the other binding, once": {worse: round(first[worse], 3)}, "mixes, requests/s": mixes,
            "what compression allows": _compression_bound(stage_costs, tokens, text), "costs": stage_costs.model_dump(),
            "cases": cases, "answers for which both halves cost the same once two of three tiles are compressed": longer,
        }  # fmt: skip
        self._checkpointed.finish()
        return result

    def saturated_rate(self, stack: Stack, tokens: int) -> float:
        """Requests/s of the balanced mix at saturation."""
        images = stack.new_images(self._count + 2 * IN_FLIGHT, MIXES[BALANCED].size)
        return asyncio.run(stack.request_rate([[image] for image in images], tokens))

    def mix_requests(self, stack: Stack, mix: str) -> list[list[str]]:
        """Images of each request of a mix: fewer requests the more tiles they have, so that all mixes take about as long."""
        size, tiles, images = MIXES[mix]
        least = 3 * costs.IN_FLIGHT
        count = min(2 * least, max(least, 2 * least * MIXES[BALANCED].tiles // (tiles * images)))
        return [stack.new_images(images, size) for _ in range(count)]

    def mix_rate(self, stack: Stack, mix: str, tokens: int) -> float:
        """Requests/s of any mix at saturation."""
        return asyncio.run(stack.request_rate(self.mix_requests(stack, mix), tokens))

    def measure_pair(self, stacks: dict[str, Stack], tokens: int, backwards: bool) -> dict[str, float]:
        """Requests/s of each server in turn. Alternating the order spreads drifts of the machine's speed over all."""
        rates = {name: self.saturated_rate(stacks[name], tokens) for name in sorted(stacks, reverse=backwards)}
        _log(f"requests/s: {rates}")
        return rates

    def measure_longer_answers(self, stacks: dict[str, Stack], stage_costs: Costs, text: int) -> dict[str, Any]:
        """The router's gain where language is the slower half without it: with a core for each half it gains only there."""
        tokens = costs.balanced_tokens(stage_costs, MIXES[BALANCED].tiles, text, _COMPRESSED, IN_FLIGHT)
        rates: _Rates = {OURS: [], COMPRESSED: []}
        for name in [OURS, COMPRESSED] * 2:
            rates[name].append(self.saturated_rate(stacks[name], tokens))
        bound = _compression_bound(stage_costs, tokens, text)
        figures = {"tokens of an answer": tokens, **_compression_figures(rates), "what compression allows": bound}
        _log(f"longer answers: {figures}")
        return figures

    def measure_latency(self, stack: Stack, tokens: int, most: float) -> dict[str, Any]:
        """Percentiles of TTFT and ITL in milliseconds at each offered load; `most`: requests/s that correspond to 100 %."""
        figures: dict[str, Any] = {}
        for share in LOADS:
            images = stack.new_images(2 * self._count // 3, MIXES[BALANCED].size)
            bodies = [stack.chat_body([image], tokens) for image in images]
            timings = asyncio.run(load.run_open_loop(stack.url, bodies, share * most))
            ttft, gaps = [timing.ttft for timing in timings], [gap for timing in timings for gap in timing.gaps]
            figures[offered := f"offered {share:.0%} of {most:.2f}/s"] = {
                f"{name} {int(100 * p)}": round(1e3 * percentile(values, p), 1)
                for name, values in (("TTFT", ttft), ("ITL", gaps)) for p in (0.5, 0.99)
            }  # fmt: skip
            _log(f"{offered}: {figures[offered]}")
        return figures

    def measure_mixes(self, stack: Stack, tokens: int) -> dict[str, float]:
        """Requests/s of all mixes but the balanced one at saturation."""
        return {mix: round(self.mix_rate(stack, mix, tokens), 3) for mix in MIXES if mix != BALANCED}

    def measure_plan_case(self, stack: Stack, name: str, stage_costs: Costs, tokens: int, text: int) -> dict[str, Any]:
        """A mix to compare `dvd plan` with, measured before and after the rates of its halves alone."""
        mix = MIXES[name]
        kind = Kind(images=mix.images, tiles=mix.tiles, text=text, output=tokens)
        before = self.mix_rate(stack, name, tokens)
        isolated = asyncio.run(stack.isolated_rates(self.mix_requests(stack, name), tokens))
        rate = statistics.mean((before, self.mix_rate(stack, name, tokens)))
        _log(f"{name}: {rate:.2f} requests/s; alone, images/s and requests/s: {isolated}")
        calibrated = costs.calibrated(stage_costs, kind, *isolated, stack.in_flight)
        return costs.plan_case(name, kind, rate, calibrated, stack.in_flight)


def _with_fewer_in_flight(stack: Stack) -> Stack:
    """The stack with as many requests in flight as costs are measured with: some mixes take long."""
    return replace(stack, in_flight=costs.IN_FLIGHT)


def _log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _compression_bound(stage_costs: Costs, tokens: int, text: int) -> float:
    """Upper bound of the gain of compressing two of three tiles: (V + L) / (V + r L), both cores always busy."""
    tiles = MIXES[BALANCED].tiles
    (vision, language), (_, compressed) = (
        costs.worker_seconds(stage_costs, tiles, text, tokens, share, IN_FLIGHT) for share in (0.0, _COMPRESSED)
    )
    return round((vision + language) / (vision + compressed), 3)


def _compression_figures(rates: _Rates) -> dict[str, Any]:
    return {
        "requests/s": {name: round(statistics.median(repeats), 3) for name, repeats in rates.items()},
        "half of the tokens over all": round(median_ratio(rates[COMPRESSED], rates[OURS])[0], 3),
    }


def _result(rates: _Rates, latency: dict[str, Any], tokens: int, best: str) -> Result:
    ratio, spread = median_ratio(rates[OURS], rates[best])
    pairs = [round(a / b, 3) for a, b in zip(rates[OURS], rates[best], strict=True)]
    figures = {
        **_compression_figures(rates),
        "half of the tokens over colocated's": round(median_ratio(rates[COMPRESSED], rates[best])[0], 3),
        "pairs, ours over colocated's": pairs, "colocated's best": best, "tokens of an answer": tokens, "in flight": IN_FLIGHT,
        "latency, ms": latency,
    }  # fmt: skip
    return Result("equal-hardware", ratio, 1.0, spread, figures)
