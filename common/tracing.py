"""Records trace events in the format of Perfetto and Chrome's about:tracing, one JSON object a line.

Times are of the machine's monotonic clock, so that the files of several processes of one machine share a time axis.
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

_BUFFER_LINES = 200


class Trace:
    """Trace events of one process, written to `FOLDER/PROCESS-PID.jsonl`; without a folder, none. Thread-safe.

    If they cannot be written, for example to a full disk, that is logged and tracing ends; the traced work goes on.
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

    def record(self, name: str, begin: float, end: float, **details: Any) -> None:
        """Record an event that lasted from `begin` to `end`, in seconds of `time.monotonic`."""
        if self._file is None:
            return
        event = {
            "name": name, "cat": self._process, "ph": "X", "pid": os.getpid(), "tid": name,
            "ts": round(begin * 1e6), "dur": round((end - begin) * 1e6), "args": details,
        }  # fmt: skip
        with self._lock:
            self._lines.append(json.dumps(event))
            is_full = len(self._lines) >= _BUFFER_LINES
        if is_full:
            self.flush()

    @contextmanager
    def span(self, name: str, **details: Any) -> Iterator[None]:
        """Record the time that a block takes, also if it raises."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.record(name, begin, time.monotonic(), **details)

    def flush(self) -> None:
        """Write the events that are still buffered."""
        if self._file is None:
            return
        with self._lock:
            lines, self._lines = self._lines, []
            try:
                with self._file.open("a", encoding="utf-8") as file:
                    file.writelines(f"{line}\n" for line in lines)
            except OSError as error:
                log.error("tracing ends: cannot write events: %s", error)
                self._file = None


def read_trace(folder: Path) -> list[dict[str, Any]]:
    """Return all events in a folder, sorted by their begin."""
    events = [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]
    return sorted(events, key=lambda event: int(event["ts"]))
