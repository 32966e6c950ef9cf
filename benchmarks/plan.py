"""Is `dvd plan` right? Its simulation against what the benchmarks of overlap and of equal hardware measured, and table 18.

Those two leave what the halves cost alone and what whole requests did beside it; the plan sees only the former. Table 18 of
InternVL3.5's paper (requests a second of a colocated engine, decoupled, and decoupled with the router) is made again from the
arithmetic of the models and a card's data sheet. Two numbers that the paper does not give, the share of its peak that a card
reaches and what a request costs beside its tiles, are those that fit all nine cells best.
"""

import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

import yaml

from benchmarks import costs
from benchmarks.options import Options
from benchmarks.result import FOLDER, Result
from dvd.plan.command import main as plan
from dvd.plan.model import Costs, Fleet, Kind, LanguageCosts, Load, VisionCosts, work
from dvd.plan.search import simulate_saturated

SOURCES = ("overlap", "equal-hardware")

A100 = 312.0
"""Dense bf16 TFLOP/s."""
CARDS = 8
TILES = {448: 1, 896: 5, 1344: 10}
VISION_TFLOP = 11.94  # InternViT-6B, a tile
PREFILL_TFLOP = {"38B": 16.0, "241B-A28B": 14.3}  # of the 256 tokens of a tile: 2 × parameters in use × 256
KEPT = 0.5  # of visual tokens, by the router
PAPER = {
    "38B": {448: (12.39, 14.69, 18.62), 896: (2.71, 5.06, 10.97), 1344: (1.48, 2.92, 5.14)},
    "241B-A28B": {448: (11.29, 14.05, 20.84), 896: (2.54, 4.73, 8.81), 1344: (1.37, 2.75, 4.27)},
}
SETTINGS = ("colocated", "decoupled", "decoupled, router")


def run(_options: Options) -> Result:
    """The headline: the worst agreement of prediction and measurement, smaller over larger; target 0.85."""
    found = {name: json.loads(file.read_text())["figures"] for name in SOURCES if (file := FOLDER / f"{name}.json").exists()}
    if missing := [name for name in SOURCES if not all("costs" in case for case in found.get(name, {}).get("cases", [{}]))]:
        raise RuntimeError(f"nothing measured to compare with: run {' and '.join(missing)} first")
    cases = {f"{source}, {case['name']}": _compared(case) for source, figures in found.items() for case in figures["cases"]}
    agreements = [case["agreement"] for case in cases.values()]
    figures: dict[str, Any] = {"cases": cases, "table 18": {name: _table(name) for name in PAPER}}
    notes = [_drawn(found["equal-hardware"]["cases"][0])]
    return Result("plan", min(agreements), 0.85, max(agreements) - min(agreements), figures, notes)


def _compared(case: dict[str, Any]) -> dict[str, float]:
    predicted = costs.predicted(Costs.model_validate(case["costs"]), Kind.model_validate(case["kind"]), case["in flight"])
    measured = case["requests/s"]
    return {
        "measured": round(measured, 3), "predicted": round(predicted, 3),
        "agreement": round(min(measured, predicted) / max(measured, predicted), 3),
    }  # fmt: skip


def _drawn(case: dict[str, Any]) -> str:
    """`results/costs.yaml`, what `dvd plan` reads, and its plot."""
    priced, kind = Costs.model_validate(case["costs"]), case["kind"]
    rate = round(0.5 / work(priced, Load(kinds=[Kind.model_validate(kind)]))[1], 3)
    load = {"rate": rate, "kinds": [kind], "limits": {"ttft": 60.0, "itl": 5.0}}
    file, picture = FOLDER / "costs.yaml", FOLDER / "plan.png"
    file.write_text(yaml.safe_dump({"costs": priced.model_dump(), "load": load}, sort_keys=False))
    if plan([str(file), "--vision-workers", "4", "--language-workers", "2", "--plot", str(picture)]):
        raise RuntimeError("dvd plan did not accept what was measured")
    return f"{picture.name}: requests/s against the number of vision workers, from {file.name}"


# The paper's table


def _costs(name: str, reached: float, beside: float) -> Costs:
    """A vision worker is one card, a language worker all eight. `beside`: seconds that a request takes without its tiles."""
    return Costs(
        vision=VisionCosts(prepare=1e-6, tile=VISION_TFLOP / (A100 * reached), batch_tiles=8, network=25e9),
        language=LanguageCosts(request=beside, prefill=PREFILL_TFLOP[name] / 256 / (A100 * CARDS * reached)),
        bytes_per_token=2 * 5120,
    )


def _served(name: str, resolution: int, setting: str, reached: float, beside: float, queues: bool) -> float:
    """Requests a second."""
    priced, kind = _costs(name, reached, beside), Kind(tiles=TILES[resolution], text=1, output=1)
    compressed = (1 - KEPT) / 0.75 if setting.endswith("router") else 0.0  # a compressed tile keeps a quarter
    load = Load(kinds=[kind], compressed=compressed)
    if setting == "colocated":
        priced = priced.model_copy(update={"vision": priced.vision.model_copy(update={"tile": priced.vision.tile / CARDS})})
        fleet = Fleet(vision=0, language=1, deployment="colocated")
    else:
        fleet = Fleet(vision=CARDS, language=1)
    if queues:
        return simulate_saturated(priced, load, fleet).throughput
    vision, language = work(priced, load)
    return 1 / (vision + language) if setting == "colocated" else 1 / max(vision / CARDS, language)


def _cells(name: str) -> Iterator[tuple[int, str, float]]:
    for resolution, rates in PAPER[name].items():
        yield from ((resolution, setting, rate) for setting, rate in zip(SETTINGS, rates, strict=True))


def _fitted(name: str) -> tuple[float, float]:
    """The share of the peak and the seconds of a request without its tiles, by least squares of logarithms."""

    def error(both: tuple[float, float]) -> float:
        return sum(math.log(_served(name, size, how, *both, queues=False) / rate) ** 2 for size, how, rate in _cells(name))

    shares, seconds = (0.08 + 0.005 * i for i in range(60)), [0.002 * i for i in range(30)]
    return min(itertools.product(shares, seconds), key=error)


def _table(name: str) -> dict[str, Any]:
    both = _fitted(name)
    made = {(size, how): _served(name, size, how, *both, queues=True) for size, how, _ in _cells(name)}
    rows = {
        f"{size}, {how}": {
            "paper": rate, "plan": round(made[size, how], 2),
            "gain in the paper": round(rate / PAPER[name][size][0], 2),
            "gain in the plan": round(made[size, how] / made[size, "colocated"], 2),
        }
        for size, how, rate in _cells(name)
    }  # fmt: skip
    return {"share of the peak": round(both[0], 3), "seconds of a request without tiles": round(both[1], 3), **rows}
