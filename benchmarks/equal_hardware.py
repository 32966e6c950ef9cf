"""The same two cores for both: requests/s at saturation, TTFT and inter-token latency at several offered loads.

Colocated: stock vLLM over both cores, and the better of two bindings. Ours: a core for vision, a core for language, the
gateway on whichever is free; without the router for the comparison, and with half of all tiles compressed beside it. The
mix: two tiles and a thumbnail an image, an answer as long as makes both halves cost about the same.
"""

import asyncio
import itertools
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks import checkpoint, colocated, costs, load, processes
from benchmarks.costs import IN_FLIGHT, TEXT, Stack
from benchmarks.options import Options
from benchmarks.result import Result
from server.planning.model import Costs, Kind

MIXES = {"one tile": (448, 448), "three tiles": (896, 448), "five tiles": (896, 896), "thirteen tiles": (1792, 1344)}
TILES = {"one tile": 1, "three tiles": 3, "five tiles": 5, "thirteen tiles": 13}
BALANCED = "three tiles"
LOADS = (0.4, 0.7, 0.9)
"""Offered, as shares of what colocated does at most."""
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
        priced, text = run.priced(plain)
        return run.compared(plain, flash, priced, text)


class _Run:
    def __init__(self, options: Options, folder: Path, stock: Path) -> None:
        self._options, self._folder, self._stock = options, folder, stock
        self._numbers = itertools.count()
        self._count = 32 if options.quick else 96

    @contextmanager
    def ours(self, model: Path, flags: Sequence[str] = (), engine: Sequence[str] = ()) -> Iterator[str]:
        """`flags` are the gateway's, `engine` are vLLM's."""
        cores = processes.cores()
        with ExitStack() as held:
            held.enter_context(
                processes.vision(self._folder, model, cores[:1], "--cache=none", f"--max-batch-tiles={costs.BATCH}")
            )
            held.enter_context(processes.language(self._folder, model, cores[-1:], "--dtype=float32", *engine))
            server, url = processes.gateway(self._folder, cores, *flags)
            held.enter_context(server)
            yield url

    @contextmanager
    def colocated(self, reserve: int) -> Iterator[str]:
        """`reserve`: cores that vLLM leaves to its front end."""
        assert self._options.baseline is not None
        cores = processes.cores()
        server, url = processes.colocated(
            self._folder, self._options.baseline, self._stock, cores[reserve:] or cores, "--dtype=float32"
        )
        server.cores = cores
        with server:
            yield url

    def bodies(self, model: str, mix: str, tokens: int, count: int, images: int = 1) -> list[bytes]:
        return [
            load.chat(model, TEXT, [load.picture(next(self._numbers), *MIXES[mix]) for _ in range(images)], tokens)
            for _ in range(count)
        ]

    def saturated(self, url: str, model: str, mix: str, tokens: int, images: int = 1) -> float:
        count = max(3 * IN_FLIGHT, self._count // images)
        return load.throughput(asyncio.run(load.closed(url, self.bodies(model, mix, tokens, count, images), IN_FLIGHT)))

    def priced(self, model: Path) -> tuple[Costs, int]:
        """What stages cost, and tokens of a prompt without images."""
        with self.ours(model, engine=("--no-enable-prefix-caching",)) as url:
            stack = Stack(self._folder, url, model, self._numbers)
            found = asyncio.run(costs.measured(stack, MIXES[BALANCED], TILES[BALANCED], self._count))
            return found, asyncio.run(costs.prompt(stack))

    def compared(self, plain: Path, flash: Path, priced: Costs, text: int) -> Result:
        tokens = costs.balanced(priced, TILES[BALANCED], text)
        found: dict[str, list[float]] = {}
        felt: dict[str, Any] = {}
        for repeat in range(self._options.repeats(3)):
            for name, serving, model in (
                ("colocated, both cores", self.colocated(0), self._stock.name),
                ("colocated, one for its front end", self.colocated(1), self._stock.name),
                ("ours", self.ours(plain), plain.name),
                ("ours, half compressed", self.ours(flash, HALF), flash.name),
            ):
                with serving as url:
                    self.saturated(url, model, BALANCED, tokens)
                    rate = self.saturated(url, model, BALANCED, tokens)
                    found.setdefault(name, []).append(rate)
                    if repeat == 0:
                        felt[name] = self.felt(url, model, tokens, found["colocated, both cores"][0])
                        felt[name]["mixes, requests/s"] = {
                            mix: round(self.saturated(url, model, mix, tokens), 3) for mix in MIXES if mix != BALANCED
                        }
                        felt[name]["four images, requests/s"] = round(self.saturated(url, model, "one tile", tokens, 4), 3)
        found_here = _result(found, felt, tokens)
        found_here.figures["what compression allows"] = round(_allowed(priced, tokens, text), 3)
        found_here.figures["costs"] = priced.model_dump()
        found_here.figures["cases"] = _cases(found_here.figures, tokens, text)
        return found_here

    def felt(self, url: str, model: str, tokens: int, most: float) -> dict[str, Any]:
        """TTFT and ITL at each offered load, milliseconds."""
        said: dict[str, Any] = {}
        for share in LOADS:
            bodies = self.bodies(model, BALANCED, tokens, self._count // 2)
            done = asyncio.run(load.offered(url, bodies, share * most))
            ttft, gaps = [f.ttft for f in done], [gap for f in done for gap in f.gaps]
            said[f"offered {share:.0%} of {most:.2f}/s"] = {
                f"{name} {int(100 * p)}": round(1e3 * load.percentile(values, p), 1)
                for name, values in (("TTFT", ttft), ("ITL", gaps)) for p in (0.5, 0.99)
            }  # fmt: skip
        return said


def _allowed(priced: Costs, tokens: int, text: int) -> float:
    """Requests/s with half of the tiles compressed over without: (V + L) / (V + r L), both cores busy all the time."""
    kept = (1 + priced.compressed_tokens_per_tile / priced.tokens_per_tile) / 2
    tiles, engine = TILES[BALANCED], priced.language
    vision, read = tiles * priced.vision.tile, tiles * priced.tokens_per_tile * engine.prefill
    rest = engine.request + text * engine.prefill + tokens * (engine.decode + engine.step / IN_FLIGHT)
    return (vision + read + rest) / (vision + kept * read + rest)


def _cases(figures: dict[str, Any], tokens: int, text: int) -> list[dict[str, Any]]:
    """What ours did, for `dvd plan` to be held against."""
    measured = {BALANCED: figures["requests/s"]["ours"], **figures["felt"]["ours"]["mixes, requests/s"]}
    cases = [costs.case(mix, Kind(tiles=TILES[mix], text=text, output=tokens), rate) for mix, rate in measured.items()]
    four = Kind(images=4, tiles=1, text=text, output=tokens)
    return [*cases, costs.case("four images", four, figures["felt"]["ours"]["four images, requests/s"])]


def _result(found: dict[str, list[float]], felt: dict[str, Any], tokens: int) -> Result:
    best = max(("colocated, both cores", "colocated, one for its front end"), key=lambda name: statistics.median(found[name]))
    ratios = [ours / theirs for ours, theirs in zip(found["ours"], found[best], strict=True)]
    ratio = statistics.median(ratios)
    figures = {
        "requests/s": {name: round(statistics.median(rates), 3) for name, rates in found.items()},
        "colocated's best": best, "tokens of an answer": tokens, "in flight": IN_FLIGHT, "felt": felt,
    }  # fmt: skip
    return Result("equal-hardware", ratio, 1.0, (max(ratios) - min(ratios)) / ratio, figures)
