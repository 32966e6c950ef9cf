"""Resumable runs: a long benchmark stores each finished measurement and continues after it when started again."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from benchmarks import result

T = TypeVar("T")
SUFFIX = ".parts.json"


class CheckpointedRun:
    """Measurements of one run in `results/NAME.parts.json`, which git ignores.

    Measurements are reused only on the same day, machine and commit and with the same value of `quick`.
    """

    def __init__(self, name: str, quick: bool) -> None:
        self._file = result.FOLDER / f"{name}{SUFFIX}"
        self._run = {"quick": quick, "environment": result.environment()}
        self._measurements = self._load()

    def _load(self) -> dict[str, Any]:
        if not self._file.exists():
            return {}
        stored = json.loads(self._file.read_text(encoding="utf-8"))
        return cast(dict[str, Any], stored["parts"]) if stored["run"] == self._run else {}

    def measure(self, name: str, measure: Callable[[], T]) -> T:
        """Return the stored measurement `name`, or call `measure` and store what it returns, a JSON value."""
        if name not in self._measurements:
            self._measurements[name] = measure()
            _write_atomically(self._file, json.dumps({"run": self._run, "parts": self._measurements}))
        return cast(T, self._measurements[name])

    def finish(self) -> None:
        """Delete the stored measurements: the next run measures everything again."""
        self._file.unlink(missing_ok=True)


def _write_atomically(file: Path, text: str) -> None:
    new = file.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, file)
