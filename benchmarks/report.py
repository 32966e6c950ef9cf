"""Draws all results in `benchmarks/results`: `table.md`, `ratios.png`, `interference.png` and `equal-hardware.png`.

`python -m benchmarks.report` draws them again without measuring anything.
"""

import json
import textwrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import checkpointed
from benchmarks.result import FOLDER

OURS, COLOCATED, BASE = "#2462ad", "#d9730d", "#9aa0a6"
_HEAD = "| benchmark | ratio | target | | spread of repeats | commit |\n|---|---|---|---|---|---|"


def write() -> None:
    """Write the table and the plots from all results that exist."""
    files = (file for file in sorted(FOLDER.glob("*.json")) if not file.name.endswith(checkpointed.SUFFIX))
    results = {file.stem: json.loads(file.read_text()) for file in files}
    if not results:
        return
    (FOLDER / "table.md").write_text(table(results), encoding="utf-8")
    _save(_draw_ratios(results), "ratios")
    if "interference" in results:
        _save(_draw_interference(results["interference"]["figures"]), "interference")
    if "equal-hardware" in results:
        _save(_draw_equal_hardware(results["equal-hardware"]["figures"]), "equal-hardware")


def table(results: dict[str, Any]) -> str:
    """A Markdown table of results by name."""
    rows = [_HEAD]
    for name, result in results.items():
        verdict = "met" if result["met"] else "missed"
        figures = f"{result['ratio']:.2f} | {result['target']:g} | {verdict} | {result['spread']:.0%}"
        rows.append(f"| {name} | {figures} | {result['environment']['commit']} |")
    return "\n".join([*rows, ""])


def _save(figure: Figure, name: str) -> None:
    figure.savefig(FOLDER / f"{name}.png", dpi=130)


def _single_plot(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of (width, height) inches with one plot."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _draw_ratios(results: dict[str, Any]) -> Figure:
    figure, axes = _single_plot(7, 0.45 * len(results) + 1.2)
    shares = {name: result["ratio"] / result["target"] for name, result in results.items()}
    colours = [OURS if result["met"] else COLOCATED for result in results.values()]
    whiskers = [shares[name] * result["spread"] / 2 for name, result in results.items()]
    axes.barh(list(shares), list(shares.values()), color=colours, xerr=whiskers)
    for row, ((name, share), whisker) in enumerate(zip(shares.items(), whiskers, strict=True)):
        label = f"{results[name]['ratio']:.2f} (target {results[name]['target']:g})"
        axes.text(1.08 * max(1.0, share + whisker), row, label, va="center", fontsize=9)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.4)
    axes.set_title("Which targets are met? Blue: met, orange: missed", fontsize=10)
    axes.set_xlabel("ratio / target (whiskers: spread of the repeats)")
    axes.invert_yaxis()
    return figure


def _draw_interference(figures: dict[str, Any]) -> Figure:
    figure, axes = _single_plot(6.5, 3.2)
    for row, side in enumerate(("ours", "colocated")):
        for shift, condition, colour in ((-0.18, "alone", BASE), (0.18, "with images", OURS if side == "ours" else COLOCATED)):
            value = figures[side][f"ITL p99 {condition}, ms"]
            bar = axes.barh(row + shift, value, height=0.32, color=colour)
            axes.bar_label(bar, [f"{value:.0f} ms, {condition}"], padding=4)
    axes.set_yticks([0, 1], ["decoupled\n(ours)", "colocated\n(stock vLLM)"])
    axes.invert_yaxis()
    axes.set_title("How much do image requests slow running streams?", fontsize=10)
    axes.set_xlabel("inter-token latency of running streams, 99th percentile, ms")
    axes.margins(x=0.35)
    return figure


def _draw_equal_hardware(figures: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    figure.suptitle("Decoupled workers (ours) and stock vLLM (colocated) on the same two cores", fontsize=10)
    rates, ttft, itl = figure.subplots(1, 3)
    rates_by_name = figures["requests/s"]
    colours = {name: OURS if name.startswith("ours") else COLOCATED for name in rates_by_name}
    bars = rates.bar(range(len(rates_by_name)), list(rates_by_name.values()), color=list(colours.values()))
    rates.bar_label(bars, fmt="%.2f")
    rates.margins(y=0.1)
    rates.set_xticks(range(len(rates_by_name)), [textwrap.fill(name, 14) for name in rates_by_name], fontsize=7)
    rates.set_title("requests/s at saturation", fontsize=10)
    _draw_latency(ttft, figures["latency, ms"], "TTFT", colours)
    _draw_latency(itl, figures["latency, ms"], "ITL", colours)
    itl.legend(frameon=False, fontsize=7)
    for axes in (rates, ttft, itl):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_latency(axes: Axes, latency: dict[str, Any], measure: str, colours: dict[str, str]) -> None:
    """99th percentiles against the offered load, whose share is in the key: `offered 40% of 1.78/s`."""
    for name, by_load in latency.items():
        percents = [float(load.split("%")[0].removeprefix("offered ")) for load in by_load]
        style = "--" if name.endswith("compressed") else "-"
        milliseconds = [values[f"{measure} 99"] for values in by_load.values()]
        axes.plot(percents, milliseconds, style, marker="o", color=colours[name], label=name)
    axes.set_title(f"{measure}, 99th percentile, ms", fontsize=10)
    axes.set_xlabel("offered load, % of colocated's maximum")
    axes.set_ylim(bottom=0)


if __name__ == "__main__":
    write()
