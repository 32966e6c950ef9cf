"""What a long run has measured so far, in a file: one that was broken off goes on where it was."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from benchmarks import result

T = TypeVar("T")
ENDING = ".parts.json"


class Kept:
    """`results/NAME.parts.json`, ignored by git. From what another commit, day or machine measured no run goes on."""

    def __init__(self, name: str, quick: bool) -> None:
        self._file = result.FOLDER / f"{name}{ENDING}"
        self._run = {"quick": quick, "environment": result.environment()}
        self._parts = self._found()

    def _found(self) -> dict[str, Any]:
        if not self._file.exists():
            return {}
        said = json.loads(self._file.read_text(encoding="utf-8"))
        return cast(dict[str, Any], said["parts"]) if said["run"] == self._run else {}

    def part(self, name: str, measure: Callable[[], T]) -> T:
        """What `measure` returns, something that JSON can say; not measured again if it is there from before."""
        if name not in self._parts:
            self._parts[name] = measure()
            _replace(self._file, json.dumps({"run": self._run, "parts": self._parts}))
        return cast(T, self._parts[name])

    def done(self) -> None:
        """The next run measures everything anew."""
        self._file.unlink(missing_ok=True)


def _replace(file: Path, text: str) -> None:
    """Written in full or not at all."""
    new = file.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, file)
