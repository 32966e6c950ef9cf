"""The plot of a soak: faults, outcomes, latency and memory over time."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.soak.requests import OUTCOMES, Outcome
from benchmarks.soak.resources import Sample

_BIN_SECONDS = 5.0
_COLOURS = dict(zip(OUTCOMES, ("#2462ad", "#d9a13b", "#b86fc6", "#c5cad1", "#d62728", "#8c1a1a", "#ff7f0e"), strict=True))


def draw(
    outcomes: Sequence[Outcome],
    faults: Sequence[tuple[str, float]],
    samples: Sequence[Sample],
    shared_memory: Sequence[tuple[float, float]],
    started_at: float,
    path: Path,
) -> None:
    """Draw what happened.

    Args:
        outcomes: How each request ended.
        faults: Name and monotonic time of each fault.
        samples: What each process held.
        shared_memory: Monotonic time and size in MiB.
        started_at: Monotonic time of the begin.
        path: File of the plot.
    """
    figure = Figure(figsize=(11, 9), layout="constrained")
    strip, top, middle, bottom = figure.subplots(4, 1, sharex=True, height_ratios=[1, 2, 2, 2])
    _draw_faults(strip, faults, started_at)
    _draw_outcomes(top, outcomes, started_at)
    _draw_latency(middle, outcomes, started_at)
    _draw_memory(bottom, samples, shared_memory, started_at)
    for axes in (strip, top, middle, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (top, middle, bottom):
        for _, at in faults:
            axes.axvline(at - started_at, color="#888888", linewidth=0.4, linestyle=":")
    bottom.set_xlabel("seconds")
    figure.savefig(path, dpi=130)


def _draw_faults(axes: Axes, faults: Sequence[tuple[str, float]], started_at: float) -> None:
    """Draw a row for each kind of fault: there may be hundreds of them, too many for a text each."""
    kinds = sorted({name.rsplit("-", 1)[0] for name, _ in faults}, reverse=True)
    rows = {kind: row for row, kind in enumerate(kinds)}
    times = [at - started_at for _, at in faults]
    axes.scatter(times, [rows[name.rsplit("-", 1)[0]] for name, _ in faults], marker="|", s=30, color="#444444")
    axes.set_yticks(range(len(kinds)), kinds, fontsize=7)


def _draw_outcomes(axes: Axes, outcomes: Sequence[Outcome], started_at: float) -> None:
    counts = Counter((int((outcome.at - started_at) // _BIN_SECONDS), outcome.name) for outcome in outcomes)
    bins = range(max((number for number, _ in counts), default=0) + 1)
    below = [0.0] * len(bins)
    for name in OUTCOMES:
        rates = [counts[number, name] / _BIN_SECONDS for number in bins]
        if any(rates):
            middles = [(n + 0.5) * _BIN_SECONDS for n in bins]
            axes.bar(middles, rates, _BIN_SECONDS, bottom=below, color=_COLOURS[name], label=name)
            below = [a + b for a, b in zip(below, rates, strict=True)]
    axes.set_ylabel("requests per second")
    axes.legend(loc="lower right", fontsize=7, ncols=4)


def _draw_latency(axes: Axes, outcomes: Sequence[Outcome], started_at: float) -> None:
    right = [outcome for outcome in outcomes if outcome.name == "right"]
    axes.scatter([o.at - started_at for o in right], [o.seconds for o in right], s=2, color=_COLOURS["right"])
    axes.set_yscale("log")
    axes.set_ylabel("seconds to a right answer")


def _draw_memory(
    axes: Axes, samples: Sequence[Sample], shared_memory: Sequence[tuple[float, float]], started_at: float
) -> None:
    for name in dict.fromkeys(s.name for s in samples):
        own = [s for s in samples if s.name == name]
        axes.plot([s.at - started_at for s in own], [s.memory_mib for s in own], linewidth=1, label=name)
    times, sizes = [at - started_at for at, _ in shared_memory], [size for _, size in shared_memory]
    axes.plot(times, sizes, "k--", linewidth=1, label="/dev/shm")
    axes.set_yscale("log")
    axes.set_ylabel("memory, MiB")
    axes.legend(loc="lower right", fontsize=7, ncols=4)
