"""All results as a table and as pictures, in `benchmarks/results`: `table.md`, `ratios.png`, `interference.png`, …"""

import json
import textwrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import checkpointed
from benchmarks.result import FOLDER

OURS, THEIRS, PLAIN = "#2462ad", "#d9730d", "#9aa0a6"


def write() -> None:
    """From whatever results are there."""
    files = (file for file in sorted(FOLDER.glob("*.json")) if not file.name.endswith(checkpointed.ENDING))
    found = {file.stem: json.loads(file.read_text()) for file in files}
    if not found:
        return
    (FOLDER / "table.md").write_text(table(found), encoding="utf-8")
    _save(_ratios(found), "ratios")
    if "interference" in found:
        _save(_interference(found["interference"]["figures"]), "interference")
    if "equal-hardware" in found:
        _save(_equal_hardware(found["equal-hardware"]["figures"]), "equal-hardware")


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    rows = ["| benchmark | ratio | target | | spread of repeats | commit |", "|---|---|---|---|---|---|"]
    for name, said in found.items():
        verdict = "met" if said["met"] else "missed"
        figures = f"{said['ratio']:.2f} | {said['target']:g} | {verdict} | {said['spread']:.0%}"
        rows.append(f"| {name} | {figures} | {said['environment']['commit']} |")
    return "\n".join([*rows, ""])


def _save(figure: Figure, name: str) -> None:
    figure.savefig(FOLDER / f"{name}.png", dpi=130)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _ratios(found: dict[str, Any]) -> Figure:
    figure, axes = _axes(7, 0.45 * len(found) + 1)
    names = list(found)
    shares = [found[name]["ratio"] / found[name]["target"] for name in names]
    colours = [OURS if found[name]["met"] else THEIRS for name in names]
    axes.barh(names, shares, color=colours, xerr=[s * found[n]["spread"] / 2 for n, s in zip(names, shares, strict=True)])
    for place, (name, share) in enumerate(zip(names, shares, strict=True)):
        right = max(1.0, share * (1 + found[name]["spread"] / 2))
        label = f"{found[name]['ratio']:.2f} of {found[name]['target']:g}"
        axes.text(1.08 * right, place, label, va="center", fontsize=9)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.margins(x=0.3)
    axes.set_xlabel("ratio over target (whiskers: spread of the repeats)")
    axes.invert_yaxis()
    return figure


def _interference(figures: dict[str, Any]) -> Figure:
    figure, axes = _axes(6, 3.2)
    for place, side in enumerate(("ours", "colocated")):
        for shift, when, colour in ((-0.18, "alone", PLAIN), (0.18, "with images", OURS if side == "ours" else THEIRS)):
            value = figures[side][f"ITL p99 {when}, ms"]
            bar = axes.barh(place + shift, value, height=0.32, color=colour)
            axes.bar_label(bar, [f"{value:.0f} ms, {when}"], padding=4)
    axes.set_yticks([0, 1], ["ours", "colocated"])
    axes.invert_yaxis()
    axes.set_xlabel("inter-token latency of running streams, 99th percentile, ms")
    axes.margins(x=0.35)
    return figure


def _equal_hardware(figures: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    rates, ttft, itl = figure.subplots(1, 3)
    said = figures["requests/s"]
    colours = {name: OURS if name.startswith("ours") else THEIRS for name in said}
    bars = rates.bar(range(len(said)), list(said.values()), color=[colours[name] for name in said])
    rates.bar_label(bars, fmt="%.2f")
    rates.set_xticks(range(len(said)), [textwrap.fill(name, 14) for name in said], fontsize=7)
    rates.set_title("requests/s, saturated", fontsize=10)
    for axes, measure in ((ttft, "TTFT"), (itl, "ITL")):
        for name, felt in figures["felt"].items():
            loads = {load: values for load, values in felt.items() if load.startswith("offered")}
            shares = [float(load.split("%")[0].removeprefix("offered ")) for load in loads]
            style = {"colocated, both cores": "-", "ours": "-", "ours, half compressed": "--"}.get(name, ":")
            axes.plot(
                shares, [v[f"{measure} 99"] for v in loads.values()], style, marker="o", color=colours[name], label=name
            )  # fmt: skip
        axes.set_title(f"{measure}, 99th percentile, ms", fontsize=10)
        axes.set_xlabel("offered, % of colocated's most")
        axes.set_yscale("log")
    itl.legend(frameon=False, fontsize=7)
    for axes in (rates, ttft, itl):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
