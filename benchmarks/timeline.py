"""Draws a trace as a timeline: which stage was active when."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.result import FOLDER
from common.tracing import read_trace

STAGES = {"prepare": "#7a9e3c", "encode": "#2462ad", "deliver": "#d9730d", "answer": "#8a4fa0"}
"""Colours of the spans that are drawn, by name, from top to bottom."""
WINDOW_SECONDS = 6.0


def draw(traces: Path, name: str, middle: float) -> str:
    """Draw the spans around `middle`, in seconds of the monotonic clock, to `results/NAME-timeline.png`.

    Returns a note about the plot.
    """
    events = [event for event in read_trace(traces) if event["name"] in STAGES]
    centre_us, reach_us = middle * 1e6, WINDOW_SECONDS / 2 * 1e6
    start_us, end_us = centre_us - reach_us, centre_us + reach_us
    visible = [event for event in events if event["ts"] < end_us and event["ts"] + event["dur"] > start_us]
    rows = [(stage, lane) for stage in STAGES for lane in _lanes([e for e in visible if e["name"] == stage])]
    figure = Figure(figsize=(9, max(4.0, 0.2 * len(rows))), layout="constrained")
    axes = figure.subplots()
    for row, (stage, spans) in enumerate(rows):
        bars = [((event["ts"] - start_us) / 1e6, event["dur"] / 1e6) for event in spans]
        axes.broken_barh(bars, (row + 0.1, 0.8), color=STAGES[stage])
    first_rows = {stage: row for row, (stage, _) in reversed([*enumerate(rows)])}
    axes.set_yticks([row + 0.5 for row in first_rows.values()], list(first_rows))
    axes.invert_yaxis()
    axes.set_xlim(0, WINDOW_SECONDS)
    axes.set_xlabel("seconds")
    axes.set_title("Which stage is active when? One bar per span of the trace", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(FOLDER / f"{name}-timeline.png", dpi=130)
    return f"{name}-timeline.png: {WINDOW_SECONDS:g} s from the middle of the run, a bar for each span of the trace"


def _lanes(events: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Distribute events over lanes so that those in a lane do not overlap."""
    lanes: list[list[dict[str, Any]]] = []
    for event in events:
        for lane in lanes:
            if lane[-1]["ts"] + lane[-1]["dur"] <= event["ts"]:
                lane.append(event)
                break
        else:
            lanes.append([event])
    return lanes
