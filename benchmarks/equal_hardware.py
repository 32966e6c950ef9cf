"""The same two cores for both: requests/s at saturation, TTFT and inter-token latency at several offered loads.

Colocated: stock vLLM over both cores, and the better of two bindings. Ours: a core for vision, a core for language, the
gateway on whichever is free; without the router for the comparison, and with half of all tiles compressed beside it. The
mix: two tiles and a thumbnail an image, an answer as long as makes both halves cost about the same.
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
from benchmarks.checkpointed import Kept
from benchmarks.costs import Stack
from benchmarks.options import Options
from benchmarks.result import Result, ratio_of
from dvd.plan.model import Costs, Kind


class Mix(NamedTuple):
    """What a request shows: pictures of a size that makes so many tiles, thumbnail counted."""

    size: tuple[int, int]
    tiles: int
    images: int = 1


BALANCED = "three tiles"
MIXES = {
    BALANCED: Mix((896, 448), 3),
    "one tile": Mix((448, 448), 1),
    "five tiles": Mix((896, 896), 5),
    "thirteen tiles": Mix(*costs.DEEP),
    "four images of one tile": Mix((448, 448), 1, 4),
}
COLOCATED = ("colocated, both cores", "colocated, one for its front end")
"""By how many cores vLLM leaves to its front end."""
OURS, ROUTED = "ours", "ours, half compressed"
LOADS = (0.4, 0.7, 0.9)
"""Offered, as shares of what colocated does at most."""
PAIRS = 5
IN_FLIGHT = 32
"""Of ours about half are with the engine, the others with the tower."""
ENGINE = "--dtype=float32", "--no-enable-prefix-caching"
"""Both sides' vLLM. No two pictures are alike: there is nothing to find again, but where a half is measured alone."""
HALF = ("--vir-relative-threshold=0.5", "--vir-absolute-threshold=0")


def run(options: Options) -> Result:
    """The headline: requests/s of ours over colocated's, saturated, balanced, no router; target 1.0."""
    if options.baseline is None:
        raise RuntimeError("stock vLLM to compare with: name its Python with --baseline")
    with tempfile.TemporaryDirectory(prefix="dvd-bench-") as name:
        folder = Path(name)
        plain, flash = (checkpoint.make(folder / kind, flash=kind == "flash") for kind in ("plain", "flash"))
        stock = colocated.copied(plain, folder / "stock")
        run = _Run(options, folder, stock)
        priced, text, tokens = run.priced(plain)
        return run.compared(plain, flash, priced, text, tokens)


class _Run:
    def __init__(self, options: Options, folder: Path, stock: Path) -> None:
        self._options, self._folder, self._stock = options, folder, stock
        self._kept = Kept("equal-hardware", options.quick)
        self._numbers = itertools.count()
        self._count = 32 if options.quick else 48  # that are measured

    @contextmanager
    def ours(self, model: Path, *flags: str) -> Iterator[Stack]:
        """`flags` are the gateway's."""
        cores = processes.cores()
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        with ExitStack() as held:
            seeing = ("--cache=none", f"--max-batch-tiles={costs.BATCH}")
            held.enter_context(processes.vision(folder, model, cores[:1], *seeing))
            held.enter_context(processes.language(folder, model, cores[-1:], *ENGINE))
            server, url = processes.gateway(folder, cores, *flags)
            held.enter_context(server)
            yield Stack(folder, url, model, self._numbers, IN_FLIGHT)

    @contextmanager
    def colocated(self, reserve: int) -> Iterator[Stack]:
        """`reserve`: cores that vLLM leaves to its front end."""
        assert self._options.baseline is not None
        cores = processes.cores()
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        server, url = processes.colocated(folder, self._options.baseline, self._stock, cores[reserve:] or cores, *ENGINE)
        server.cores = cores
        with server:
            yield Stack(folder, url, self._stock, self._numbers, IN_FLIGHT)

    def priced(self, model: Path) -> tuple[Costs, int, int]:
        """What stages cost, tokens of a prompt without images, and of an answer for which both halves cost the same."""
        priced, text, tokens = self._kept.part("costs", partial(self._priced, model))
        return Costs.model_validate(priced), text, tokens

    def _priced(self, model: Path) -> tuple[dict[str, Any], int, int]:
        with self.ours(model) as stack:
            few = _fewer(stack)
            found = asyncio.run(costs.measured(few, *MIXES[BALANCED][:2], 4 * costs.IN_FLIGHT))
            text = asyncio.run(costs.prompt(few))
            shown, tiles = self.shown(few, BALANCED), MIXES[BALANCED].tiles
            return found.model_dump(), text, asyncio.run(costs.balanced_alone(few, shown, found, tiles, text))

    def saturated(self, stack: Stack, tokens: int) -> float:
        """Requests a second, balanced."""
        pictures = stack.pictures(self._count + 2 * IN_FLIGHT, MIXES[BALANCED].size)
        return asyncio.run(stack.requests([[picture] for picture in pictures], tokens))

    def shown(self, stack: Stack, mix: str) -> list[list[str]]:
        """Of larger images fewer, so that all mixes take about as long."""
        size, tiles, images = MIXES[mix]
        few = 3 * costs.IN_FLIGHT
        count = min(2 * few, max(few, 2 * few * MIXES[BALANCED].tiles // (tiles * images)))
        return [stack.pictures(images, size) for _ in range(count)]

    def mixed(self, stack: Stack, mix: str, tokens: int) -> float:
        """Requests a second, of other images too."""
        return asyncio.run(stack.requests(self.shown(stack, mix), tokens))

    def compared(self, plain: Path, flash: Path, priced: Costs, text: int, tokens: int) -> Result:
        with ExitStack() as held:  # those that are not asked cost nothing but memory: vLLM's grows with every picture
            bindings = {name: held.enter_context(ExitStack()) for name in COLOCATED}
            stacks = {
                **{name: bindings[name].enter_context(self.colocated(reserve)) for reserve, name in enumerate(COLOCATED)},
                OURS: held.enter_context(self.ours(plain)),
                ROUTED: held.enter_context(self.ours(flash, *HALF)),
            }
            warm = {name: self.saturated(stack, tokens) for name, stack in stacks.items()}  # a run that goes on has to, too
            _progress(f"warm, tokens of an answer {tokens}: {warm}")
            first = self._kept.part("warm", lambda: warm)
            best, worse = sorted(COLOCATED, key=lambda name: -first[name])
            del stacks[worse]
            bindings[worse].close()
            pairs = [
                self._kept.part(f"pair {number}", partial(self.pair, stacks, tokens, number % 2 == 0))
                for number in range(self._options.repeats(PAIRS))
            ]
            found = {name: [pair[name] for pair in pairs] for name in stacks}
            most = statistics.median(found[best])
            felt = {name: self._kept.part(f"felt, {name}", partial(self.felt, stacks[name], tokens, most)) for name in stacks}
            longer = self._kept.part("longer", partial(self.longer, stacks, priced, text))
            mixes = {best: self._kept.part("mixes", partial(self.mixes, _fewer(stacks[best]), tokens))}
            bindings[best].close()
            cases = [
                self._kept.part(f"case, {name}", partial(self.case, _fewer(stacks[OURS]), name, priced, tokens, text))
                for name in MIXES
            ]
            mixes[OURS] = {case["name"]: case["requests/s"] for case in cases[1:]}
        made = _result(found, felt, tokens, best)
        made.figures |= {
            "requests/s, the other binding, once": {worse: round(first[worse], 3)}, "mixes, requests/s": mixes,
            "what compression allows": _allowed(priced, tokens, text), "costs": priced.model_dump(), "cases": cases,
            "answers for which both halves cost the same once half is compressed": longer,
        }  # fmt: skip
        self._kept.done()
        return made

    def pair(self, stacks: dict[str, Stack], tokens: int, backwards: bool) -> dict[str, float]:
        """Requests a second of each, one after another; whichever the machine slows for, it is either's turn."""
        found = {name: self.saturated(stacks[name], tokens) for name in sorted(stacks, reverse=backwards)}
        _progress(f"requests/s: {found}")
        return found

    def longer(self, stacks: dict[str, Stack], priced: Costs, text: int) -> dict[str, Any]:
        """With a core for each half the router gains where language is the slower one without it."""
        tokens = costs.balanced(priced, MIXES[BALANCED].tiles, text, 0.5, IN_FLIGHT)
        found: dict[str, list[float]] = {OURS: [], ROUTED: []}
        for name in [OURS, ROUTED] * 2:
            found[name].append(self.saturated(stacks[name], tokens))
        said = {"tokens of an answer": tokens, **_routed(found), "what compression allows": _allowed(priced, tokens, text)}
        _progress(f"longer answers: {said}")
        return said

    def felt(self, stack: Stack, tokens: int, most: float) -> dict[str, Any]:
        """TTFT and ITL at each offered load, milliseconds."""
        said: dict[str, Any] = {}
        for share in LOADS:
            bodies = [stack.chat([picture], tokens) for picture in stack.pictures(2 * self._count // 3, MIXES[BALANCED].size)]
            done = asyncio.run(load.offered(stack.url, bodies, share * most))
            ttft, gaps = [f.ttft for f in done], [gap for f in done for gap in f.gaps]
            said[load_of := f"offered {share:.0%} of {most:.2f}/s"] = {
                f"{name} {int(100 * p)}": round(1e3 * load.percentile(values, p), 1)
                for name, values in (("TTFT", ttft), ("ITL", gaps)) for p in (0.5, 0.99)
            }  # fmt: skip
            _progress(f"{load_of}: {said[load_of]}")
        return said

    def mixes(self, stack: Stack, tokens: int) -> dict[str, float]:
        """Requests a second, saturated, of other images."""
        return {mix: round(self.mixed(stack, mix, tokens), 3) for mix in MIXES if mix != BALANCED}

    def case(self, stack: Stack, name: str, priced: Costs, tokens: int, text: int) -> dict[str, Any]:
        """For `dvd plan` to be held against: a mix, before and after what its halves do alone."""
        mix = MIXES[name]
        kind = Kind(images=mix.images, tiles=mix.tiles, text=text, output=tokens)
        before = self.mixed(stack, name, tokens)
        alone = asyncio.run(costs.halves_alone(stack, self.shown(stack, name), tokens))
        rate = statistics.mean((before, self.mixed(stack, name, tokens)))
        _progress(f"{name}: {rate:.2f} requests/s; alone, images/s and requests/s: {alone}")
        return costs.case(name, kind, rate, costs.beside(priced, kind, *alone, stack.in_flight), stack.in_flight)


def _fewer(stack: Stack) -> Stack:
    """With fewer in flight: some mixes take long, and costs are told of as many."""
    return replace(stack, in_flight=costs.IN_FLIGHT)


def _progress(said: str) -> None:
    print(said, file=sys.stderr, flush=True)


def _allowed(priced: Costs, tokens: int, text: int) -> float:
    """Requests/s with half of the tiles compressed over without: (V + L) / (V + r L), both cores busy all the time."""
    tiles = MIXES[BALANCED].tiles
    (vision, language), (_, less) = (costs.halves(priced, tiles, text, tokens, share, IN_FLIGHT) for share in (0.0, 0.5))
    return round((vision + language) / (vision + less), 3)


def _routed(found: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "requests/s": {name: round(statistics.median(rates), 3) for name, rates in found.items()},
        "half compressed over not": round(ratio_of(found[ROUTED], found[OURS])[0], 3),
    }


def _result(found: dict[str, list[float]], felt: dict[str, Any], tokens: int, best: str) -> Result:
    ratio, spread = ratio_of(found[OURS], found[best])
    pairs = [round(a / b, 3) for a, b in zip(found[OURS], found[best], strict=True)]
    figures = {
        **_routed(found), "half compressed over colocated's": round(ratio_of(found[ROUTED], found[best])[0], 3),
        "pairs, ours over colocated's": pairs, "colocated's best": best, "tokens of an answer": tokens, "in flight": IN_FLIGHT,
        "felt": felt,
    }  # fmt: skip
    return Result("equal-hardware", ratio, 1.0, spread, figures)
