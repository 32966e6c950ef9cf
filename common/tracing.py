"""What a process did when, as events that Perfetto and Chrome's about:tracing draw: one JSON object a line.

Times are of the machine's monotonic clock, so that files of several processes of one machine fit together.
"""

import atexit
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

log = logging.getLogger(__name__)


class Trace:
    """Events of one process, in `FOLDER/PROCESS-PID.jsonl`; without a folder, nowhere. Any thread.

    Where they cannot be written, a full disk say, that is logged and tracing ends: what is traced must not fail for it.
    """

    def __init__(self, folder: Path | None, process: str) -> None:
        self._lines: list[str] = []
        self._lock = Lock()
        self._file = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = folder / f"{process}-{os.getpid()}.jsonl"
            self._process = process
            atexit.register(self.flush)

    def record(self, name: str, began: float, ended: float, **details: Any) -> None:
        """Something that lasted from `began` to `ended`, seconds of `time.monotonic`."""
        if self._file is None:
            return
        event = {
            "name": name, "cat": self._process, "ph": "X", "pid": os.getpid(), "tid": name,
            "ts": round(began * 1e6), "dur": round((ended - began) * 1e6), "args": details,
        }  # fmt: skip
        with self._lock:
            self._lines.append(json.dumps(event))
            full = len(self._lines) >= 200
        if full:
            self.flush()

    @contextmanager
    def span(self, name: str, **details: Any) -> Iterator[None]:
        """The time that a block takes, also where it fails."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.record(name, began, time.monotonic(), **details)

    def flush(self) -> None:
        """Write what is not written yet."""
        if self._file is None:
            return
        with self._lock:
            lines, self._lines = self._lines, []
            try:
                with self._file.open("a", encoding="utf-8") as file:
                    file.writelines(f"{line}\n" for line in lines)
            except OSError as error:
                log.error("tracing ends: %s", error)
                self._file = None


def read_trace(folder: Path) -> list[dict[str, Any]]:
    """All events of a folder, in order of their beginnings."""
    events = [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]
    return sorted(events, key=lambda event: int(event["ts"]))
