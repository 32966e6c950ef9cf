"""Plots of the scores."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demo.evaluation.plan import ABSOLUTE_THRESHOLDS, RELATIVE_THRESHOLDS, ROUTER_MODES
from demo.evaluation.scores import score
from demo.text.questions import TASKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Json = dict[str, Any]
_BLUE, _ORANGE, _TEXT, _GRID = "#2462ad", "#d9730d", "#333333", "#dddddd"
_STYLE_LABELS = {"trained": "fonts and textures of training", "held out": "held-out fonts and textures"}
_ACCURACY_LABEL = "accuracy (%)"


def plot_accuracy(scores: Json, file: Path) -> None:
    """Write a bar chart of `accuracy_scores`: two bars per task, with their intervals."""
    figure, axes = _create_axes(8, 3.6)
    for offset, colour, (name, label) in zip((-0.2, 0.2), (_BLUE, _ORANGE), _STYLE_LABELS.items(), strict=True):
        task_scores = [scores["styles"][name].get(task, score([])) for task in TASKS]
        heights = [100 * (s["accuracy"] or 0) for s in task_scores]
        errors = [[max(0.0, h - 100 * s["interval"][0]) for h, s in zip(heights, task_scores, strict=True)],
                  [max(0.0, 100 * s["interval"][1] - h) for h, s in zip(heights, task_scores, strict=True)]]  # fmt: skip
        positions = [i + offset for i in range(len(TASKS))]
        axes.bar(positions, heights, 0.36, color=colour, label=label, yerr=errors, ecolor=_TEXT, error_kw={"linewidth": 1})
        for position, height in zip(positions, heights, strict=True):
            axes.text(position, 2, f"{height:.0f}", color="white", ha="center", fontsize=8)
    axes.set_xticks(range(len(TASKS)), TASKS)
    axes.set_ylim(0, 100)
    axes.set_ylabel(_ACCURACY_LABEL, color=_TEXT)
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    _save(figure, file)


def plot_token_curve(scores: Json, file: Path) -> None:
    """Write a line chart of `setting_scores`: accuracy over visual tokens, for varying thresholds and the three modes."""
    figure, axes = _create_axes(8, 4.4)
    by_name = {setting["setting"]: setting for setting in scores["settings"]}
    accuracies: list[float] = []
    for task, colour, label in (("all", _BLUE, "all questions"), ("number", _ORANGE, "numbers")):
        for settings, line, threshold in ((ABSOLUTE_THRESHOLDS, "-", "absolute"), (RELATIVE_THRESHOLDS, "--", "relative")):
            points = sorted(_point(by_name[setting.name], task) for setting in settings)
            xs, ys = zip(*points, strict=True)
            line_label = f"{label}, varying {threshold} threshold"
            axes.plot(xs, ys, line, color=colour, marker="o", markersize=3.5, linewidth=1.5, label=line_label)
            accuracies += ys
        for setting, marker in zip(ROUTER_MODES, "s*D", strict=True):
            x, y = _point(by_name[setting.name], task)
            axes.plot(x, y, marker, color=colour, markersize=13 if marker == "*" else 8, markeredgecolor="white")
            if not math.isnan(y):
                axes.annotate(setting.name, (x, y), (0, 9), textcoords="offset points", ha="center", color=_TEXT, fontsize=9)
            accuracies.append(y)
    known = [y for y in accuracies if not math.isnan(y)]
    axes.set_ylim(max(0.0, min(known, default=0) - 6), min(106.0, max(known, default=100) + 6))
    axes.set_xlim(20, 105)
    axes.set_xlabel("visual tokens (% of those without compression)", color=_TEXT)
    axes.set_ylabel(_ACCURACY_LABEL, color=_TEXT)
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    _save(figure, file)


def _create_axes(width_inches: float, height_inches: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure  # matplotlib takes long to import

    figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.tick_params(colors=_TEXT, length=0)
    return figure, axes


def _save(figure: "Figure", file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150, metadata={"Software": None})


def _point(setting: Json, task: str) -> tuple[float, float]:
    accuracy = setting["tasks"].get(task, score([]))["accuracy"]
    return 100 * setting["token_share"], math.nan if accuracy is None else 100 * accuracy
