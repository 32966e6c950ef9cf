"""The phases of a start, for the operator: what a process does now, why that takes long, and how long each phase took."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_REMINDER_SECONDS = 20.0


class Phases:
    """Logs each phase of a start when it begins, and again while it is slow.

    Args:
        log: logger of the process.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log, self._started = log, time.monotonic()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, why_slow: str = "") -> Iterator[None]:
        """Run a phase.

        Args:
            name: what the process does, such as `reading weights`.
            why_slow: what takes the time, for the reminder.
        """
        self._log.info("%s", name)
        started, done = time.monotonic(), threading.Event()
        threading.Thread(target=self._remind, args=(name, why_slow, started, done), daemon=True).start()
        try:
            yield
        finally:
            done.set()
        self._seconds[name] = time.monotonic() - started

    def summary(self) -> str:
        """Return the seconds of the start so far, and of each phase: `12.0 s (reading weights 8.1 s, warming up 3.5 s)`."""
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self._seconds.items())
        return f"{time.monotonic() - self._started:.1f} s ({parts})"

    def _remind(self, name: str, why_slow: str, started: float, done: threading.Event) -> None:
        reason = f": {why_slow}" if why_slow else ""
        while not done.wait(_REMINDER_SECONDS):
            self._log.info("still %s after %.0f s%s", name, time.monotonic() - started, reason)
