"""Progress of an evaluation, on a terminal or in a log."""

import math
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from demo.evaluation.answers import AnswerRecord

_TERMINAL_INTERVAL_SECONDS, _LOG_INTERVAL_SECONDS = 0.2, 15.0


class Progress:
    """Shows requests done, accuracy so far and time left: in one line of a terminal, else a line now and then."""

    def __init__(self, part: str, total: int, records: Sequence[AnswerRecord], stream: TextIO | None = None) -> None:
        """Start the clock.

        Args:
            part: Name of the part of the evaluation.
            total: Number of requests, those already answered included.
            records: Answers that are already there.
            stream: Where to write, by default stderr.
        """
        self._part, self._total, self._stream = part, total, stream or sys.stderr
        self._done_before = self._done = len(records)
        self._correct = sum(record.is_correct for record in records)
        self._start = time.monotonic()
        self._last_shown = -math.inf

    def step(self, correct: bool) -> None:
        """Count one more answer."""
        self._done += 1
        self._correct += correct
        now, terminal = time.monotonic(), self._stream.isatty()
        interval = _TERMINAL_INTERVAL_SECONDS if terminal else _LOG_INTERVAL_SECONDS
        if now - self._last_shown >= interval or self._done == self._total:
            self._last_shown = now
            prefix, end = ("\r\x1b[K", "") if terminal else ("", "\n")
            print(prefix + self._line(now), end=end, file=self._stream, flush=True)

    def end(self) -> None:
        """End the line of a terminal."""
        if self._stream.isatty():
            print(file=self._stream)

    def _line(self, now: float) -> str:
        request_seconds = (now - self._start) / max(1, self._done - self._done_before)
        left = format_seconds(request_seconds * (self._total - self._done))
        accuracy = self._correct / max(1, self._done)
        return f"{self._part} {self._done}/{self._total}  {left} left  {accuracy:.1%} correct"


def format_seconds(seconds: float) -> str:
    """Return, for example, "5 s" or "10 min"."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
