"""The order of the measurements, their budget of time, and the file that they are saved to."""

import importlib.util
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

RESULTS = "gpu.json"


class Skipped(Exception):
    """A measurement cannot be made here; the message says why."""


def require(*packages: str) -> None:
    """Check that packages are installed, without importing them. Raises: Skipped."""
    for package in packages:
        try:
            is_found = importlib.util.find_spec(package) is not None
        except ModuleNotFoundError:
            is_found = False
        if not is_found:
            raise Skipped(f"the package {package} is missing")


@dataclass(frozen=True)
class Measurement:
    """One measurement.

    Attributes:
        name: What it measures; unique.
        seconds: What it takes on an H100, at most. It is not started if less of the budget is left.
        measure: Returns its figures, JSON values. Raises `Skipped`.
    """

    name: str
    seconds: float
    measure: Callable[[], dict[str, Any]]


@dataclass
class Kit:
    """A run: what has been measured and what was skipped.

    Attributes:
        folder: Where results are saved after each measurement, and read from by a run that continues an earlier one.
        budget: Seconds that the run may take.
        device: Where the measurements run.
        dry: Whether shapes are small, so that the figures mean nothing.
    """

    folder: Path
    budget: float
    device: torch.device
    dry: bool
    figures: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    started_at: float = field(default_factory=time.monotonic)

    @property
    def seconds_left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - (time.monotonic() - self.started_at)

    def environment(self) -> dict[str, Any]:
        """Describe device and versions. Figures of another environment are not continued."""
        cuda = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(self.device) if cuda else platform.processor() or platform.machine(),
            "memory_gib": round(torch.cuda.get_device_properties(self.device).total_memory / 2**30, 1) if cuda else None,
            "cores": len(os.sched_getaffinity(0)), "python": platform.python_version(), "torch": torch.__version__,
            "cuda": torch.version.cuda if cuda else None, "dry": self.dry,
        }  # fmt: skip

    def run(self, measurements: Iterator[Measurement]) -> None:
        """Make the measurements in order. Each is saved at once; those of an earlier run are not repeated."""
        self.figures = self._saved()
        for measurement in measurements:
            if measurement.name not in self.figures:
                self._make(measurement)

    def _make(self, measurement: Measurement) -> None:
        started_at = time.monotonic()
        if not self.dry and measurement.seconds > self.seconds_left:
            reason = f"needs {measurement.seconds:.0f} s, {max(0.0, self.seconds_left):.0f} s are left: run again to continue"
            return self._skip(measurement, reason)
        try:
            figures = measurement.measure()
        except Skipped as reason:
            return self._skip(measurement, str(reason))
        except (RuntimeError, ImportError) as error:  # out of memory, a package or a compiler that is missing
            return self._skip(measurement, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}")
        self.figures[measurement.name] = figures
        self.save()
        print(f"{measurement.name}: {_summary(figures)}  [{time.monotonic() - started_at:.1f} s]", flush=True)

    def _skip(self, measurement: Measurement, reason: str) -> None:
        self.skipped[measurement.name] = reason
        self.save()
        print(f"{measurement.name}: skipped, {reason}", flush=True)

    def _saved(self) -> dict[str, Any]:
        """Return the figures that an earlier run in the same environment saved."""
        try:
            content = json.loads((self.folder / RESULTS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return dict(content["figures"]) if content["environment"] == self.environment() else {}

    def save(self) -> None:
        """Write all figures so far."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"environment": self.environment(), "figures": self.figures, "skipped": self.skipped}
        new = self.folder / f"{RESULTS}.new"
        new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(new, self.folder / RESULTS)


def _summary(figures: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in figures.items() if isinstance(value, int | float | str))
