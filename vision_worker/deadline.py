"""The deadline of work that several calls may share."""

import math
import time


class Deadline:
    """The time until which a result is useful: the latest deadline of the calls that wait for it.

    Args:
        seconds: time until the deadline of the first call; None: no deadline.

    Attributes:
        missed: set once the work was dropped, after which no further call can share it.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._at = _time_after(seconds)
        self.missed = False

    def extend(self, seconds: float | None) -> None:
        """Add a call that waits for the same result."""
        self._at = max(self._at, _time_after(seconds))

    def passes_within(self, seconds: float) -> bool:
        """Return whether the deadline passes within so many seconds; 0: whether it has passed."""
        return time.monotonic() + seconds >= self._at


def _time_after(seconds: float | None) -> float:
    return math.inf if seconds is None else time.monotonic() + seconds
