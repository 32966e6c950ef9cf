"""The figures of a run as Markdown."""

from pathlib import Path
from typing import Any

from benchmarks.gpu.kit import Kit
from benchmarks.gpu.shapes import Shape
from benchmarks.gpu.towers import SHARE

FILE = "gpu.md"


def write(kit: Kit, shapes: tuple[Shape, ...]) -> Path:
    """Write the figures, whether towers reach their targets, and what was skipped and why. Returns the file."""
    environment = ", ".join(f"{name} {value}" for name, value in kit.environment().items() if value is not None)
    lines = ["# What a GPU shows", "", environment, "", "| measurement | figures |", "|---|---|"]
    lines += [row for name, figures in kit.figures.items() for row in _rows(name, figures)]
    lines += ["", *(_verdict(kit, shape) for shape in shapes), *_encoder_cores(kit)]
    lines += [f"- {name}: skipped, {reason}" for name, reason in kit.skipped.items()]
    file = kit.folder / FILE
    file.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return file


def _rows(name: str, figures: dict[str, Any]) -> list[str]:
    """Return a row of plain figures, and one for each group of them."""
    plain = {key: value for key, value in figures.items() if not isinstance(value, dict)}
    groups = {key: value for key, value in figures.items() if isinstance(value, dict)}
    return [f"| {name} | {_cell(plain)} |", *(f"| {name}: {key} | {_cell(group)} |" for key, group in groups.items())]


def _cell(figures: dict[str, Any]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in figures.items())


def _best(kit: Kit, shape: Shape, figure: str) -> float | None:
    rows = (row for name, row in kit.figures.items() if name.startswith(f"tower {shape.name},"))
    return max((row[figure] for row in rows if figure in row), default=None)


def _verdict(kit: Kit, shape: Shape) -> str:
    share = _best(kit, shape, SHARE)
    if share is None:
        return f"- {shape.name}: no share, since it is not known how many TFLOP/s this device can reach"
    verdict = "met" if share >= shape.target else "missed"
    return f"- {shape.name}: {share:.0%} of the TFLOP/s that the device can reach, target {shape.target:.0%}, {verdict}"


def _encoder_cores(kit: Kit) -> list[str]:
    """Say how many cores decode and cut as fast as the 300M tower computes."""
    row = next((figures for name, figures in kit.figures.items() if name.startswith("preprocessing")), None)
    towers = [row["tiles/s"] for name, row in kit.figures.items() if name.startswith("tower 300M")]
    if row is None or not towers:
        return []
    best = max(row["tiles/s, a thread per core"], row["tiles/s, a process per core"]) / row["cores"]
    return [f"- The 300M tower at {max(towers):.0f} tiles/s needs {max(towers) / best:.1f} cores that decode and cut."]
