"""Is `dvd plan` right? Compares its simulation with measurements of other benchmarks, and with Table 18 of a paper.

The benchmarks overlap and equal-hardware record what the halves cost alone and what whole requests reached; the plan uses
only the former. Table 18 of the InternVL3.5 paper (requests/s of a colocated engine, decoupled, and decoupled with the
router) is recomputed from the models' arithmetic and the card's data sheet. The paper does not give two numbers: the share of
its peak that a card reaches, and what a request costs besides its tiles. They are fitted to all nine cells.
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

A100_TFLOPS = 312.0
"""Dense bf16 TFLOP/s."""
CARDS = 8
TILES = {448: 1, 896: 5, 1344: 10}
"""Tiles of a square image by its side in pixels."""
VISION_TFLOP_PER_TILE = 11.94  # InternViT-6B
PREFILL_TFLOP_PER_TILE = {"38B": 16.0, "241B-A28B": 14.3}  # 2 × active parameters × 256 tokens
ROUTER_KEEPS = 0.5
"""Share of visual tokens that remain with the router."""
PAPER = {
    "38B": {448: (12.39, 14.69, 18.62), 896: (2.71, 5.06, 10.97), 1344: (1.48, 2.92, 5.14)},
    "241B-A28B": {448: (11.29, 14.05, 20.84), 896: (2.54, 4.73, 8.81), 1344: (1.37, 2.75, 4.27)},
}
"""Requests/s of Table 18 by model and resolution, in the order of `SETTINGS`."""
SETTINGS = ("colocated", "decoupled", "decoupled, router")


def run(_options: Options) -> Result:
    """Compare. The headline is the worst agreement of a prediction with a measurement (smaller over larger); target 0.85.

    Raises `RuntimeError` if the results of overlap or equal-hardware are missing.
    """
    sources = {name: json.loads(file.read_text())["figures"] for name in SOURCES if (file := FOLDER / f"{name}.json").exists()}
    if missing := [name for name in SOURCES if not _has_cases(sources.get(name, {}))]:
        raise RuntimeError(f"no measurements to compare with: run the benchmarks {' and '.join(missing)} first")
    cases = {
        f"{source}, {case['name']}": _compare(case) for source, figures in sources.items() for case in figures["cases"]
    }  # fmt: skip
    agreements = [case["agreement"] for case in cases.values()]
    figures: dict[str, Any] = {"cases": cases, "table 18": {model: _paper_table(model) for model in PAPER}}
    notes = [_draw(sources["equal-hardware"]["cases"][0])]
    return Result("plan", min(agreements), 0.85, max(agreements) - min(agreements), figures, notes)


def _has_cases(figures: dict[str, Any]) -> bool:
    return "cases" in figures and all("costs" in case for case in figures["cases"])


def _compare(case: dict[str, Any]) -> dict[str, float]:
    kind = Kind.model_validate(case["kind"])
    predicted = costs.predict_throughput(Costs.model_validate(case["costs"]), kind, case["in flight"])
    measured = case["requests/s"]
    return {
        "measured": round(measured, 3), "predicted": round(predicted, 3),
        "agreement": round(min(measured, predicted) / max(measured, predicted), 3),
    }  # fmt: skip


def _draw(case: dict[str, Any]) -> str:
    """Write `results/costs.yaml`, an input of `dvd plan`, and its plot `results/plan.png`. Returns a note about them."""
    case_costs, kind = Costs.model_validate(case["costs"]), case["kind"]
    rate = round(0.5 / work(case_costs, Load(kinds=[Kind.model_validate(kind)]))[1], 3)
    load = {"rate": rate, "kinds": [kind], "limits": {"ttft": 60.0, "itl": 5.0}}
    file, plot = FOLDER / "costs.yaml", FOLDER / "plan.png"
    file.write_text(yaml.safe_dump({"costs": case_costs.model_dump(), "load": load}, sort_keys=False))
    if status := plan([str(file), "--vision-workers", "4", "--language-workers", "2", "--plot", str(plot)]):
        raise RuntimeError(f"dvd plan rejected the measured costs in {file} with status {status}")
    return f"{plot.name}: requests/s against the number of vision workers, from {file.name}"


# Table 18


def _paper_costs(model: str, peak_share: float, request_seconds: float) -> Costs:
    """Costs of a fleet whose vision workers are one card each and whose language worker is all eight cards.

    Args:
        model: Name of the model, a key of `PAPER`.
        peak_share: Share of its peak that a card reaches.
        request_seconds: Seconds that a request takes besides its tiles.
    """
    return Costs(
        vision=VisionCosts(prepare=1e-6, tile=VISION_TFLOP_PER_TILE / (A100_TFLOPS * peak_share), batch_tiles=8, network=25e9),
        language=LanguageCosts(
            request=request_seconds, prefill=PREFILL_TFLOP_PER_TILE[model] / 256 / (A100_TFLOPS * CARDS * peak_share)
        ),
        bytes_per_token=2 * 5120,
    )


def _paper_rate(model: str, resolution: int, setting: str, fit: tuple[float, float], simulated: bool) -> float:
    """Requests/s of one cell: simulated with queues, or from the work of a request alone. `fit`: see `_fit`."""
    cell_costs, kind = _paper_costs(model, *fit), Kind(tiles=TILES[resolution], text=1, output=1)
    compressed = (1 - ROUTER_KEEPS) / 0.75 if setting.endswith("router") else 0.0  # a compressed tile keeps a quarter
    load = Load(kinds=[kind], compressed=compressed)
    if setting == "colocated":
        shared_tower = cell_costs.vision.model_copy(update={"tile": cell_costs.vision.tile / CARDS})
        cell_costs = cell_costs.model_copy(update={"vision": shared_tower})
        fleet = Fleet(vision=0, language=1, deployment="colocated")
    else:
        fleet = Fleet(vision=CARDS, language=1)
    if simulated:
        return simulate_saturated(cell_costs, load, fleet).throughput
    vision, language = work(cell_costs, load)
    return 1 / (vision + language) if setting == "colocated" else 1 / max(vision / CARDS, language)


def _cells(model: str) -> Iterator[tuple[int, str, float]]:
    """Resolution, setting and the paper's requests/s of each cell."""
    for resolution, rates in PAPER[model].items():
        yield from ((resolution, setting, rate) for setting, rate in zip(SETTINGS, rates, strict=True))


def _fit(model: str) -> tuple[float, float]:
    """Share of the peak and seconds of a request besides its tiles, by least squares of logarithms on a grid."""

    def error(fit: tuple[float, float]) -> float:
        return sum(
            math.log(_paper_rate(model, resolution, setting, fit, simulated=False) / rate) ** 2
            for resolution, setting, rate in _cells(model)
        )

    peak_shares, seconds = (0.08 + 0.005 * i for i in range(60)), [0.002 * i for i in range(30)]
    return min(itertools.product(peak_shares, seconds), key=error)


def _paper_table(model: str) -> dict[str, Any]:
    fit = _fit(model)
    predicted = {
        (resolution, setting): _paper_rate(model, resolution, setting, fit, simulated=True)
        for resolution, setting, _ in _cells(model)
    }
    rows = {
        f"{resolution}, {setting}": {
            "paper": rate, "plan": round(predicted[resolution, setting], 2),
            "gain in the paper": round(rate / PAPER[model][resolution][0], 2),
            "gain in the plan": round(predicted[resolution, setting] / predicted[resolution, "colocated"], 2),
        }
        for resolution, setting, rate in _cells(model)
    }  # fmt: skip
    return {"share of the peak": round(fit[0], 3), "seconds of a request without tiles": round(fit[1], 3), **rows}
