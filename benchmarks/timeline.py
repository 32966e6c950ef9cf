"""A picture of a trace: which stage worked when."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.result import FOLDER
from common.tracing import read_trace

STAGES = {"prepare": "#7a9e3c", "encode": "#2462ad", "deliver": "#d9730d", "answer": "#8a4fa0"}
SECONDS = 6.0


def draw(traces: Path, name: str, at: float) -> str:
    """`results/NAME-timeline.png`: some seconds around one of the monotonic clock; a sentence about it."""
    events = [event for event in read_trace(traces) if event["name"] in STAGES]
    middle, reach = at * 1e6, SECONDS / 2 * 1e6
    shown = [event for event in events if event["ts"] < middle + reach and event["ts"] + event["dur"] > middle - reach]
    rows = [(stage, spans) for stage in STAGES for spans in _lanes([event for event in shown if event["name"] == stage])]
    figure = Figure(figsize=(9, max(4.0, 0.2 * len(rows))), layout="constrained")
    axes = figure.subplots()
    for row, (stage, spans) in enumerate(rows):
        bars = [((e["ts"] - middle) / 1e6 + SECONDS / 2, e["dur"] / 1e6) for e in spans]
        axes.broken_barh(bars, (row + 0.1, 0.8), color=STAGES[stage])
    firsts = {stage: row for row, (stage, _) in reversed([*enumerate(rows)])}
    axes.set_yticks([row + 0.5 for row in firsts.values()], list(firsts))
    axes.invert_yaxis()
    axes.set_xlim(0, SECONDS)
    axes.set_xlabel("seconds")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(FOLDER / f"{name}-timeline.png", dpi=130)
    return f"{name}-timeline.png: {SECONDS:g} s from the middle of the run, a bar for each span of the trace"


def _lanes(events: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Events that overlap stand on different lanes."""
    lanes: list[list[dict[str, Any]]] = []
    for event in events:
        for lane in lanes:
            if lane[-1]["ts"] + lane[-1]["dur"] <= event["ts"]:
                lane.append(event)
                break
        else:
            lanes.append([event])
    return lanes
