"""How fast a worker is, measured while it has as much to do as it can take."""

import math

_MEMORY_SECONDS = 20.0
"""Time after which a measurement counts a third: long enough for several batches, short enough for a change of load."""
_LEAST_SECONDS, _LEAST_UNITS = 0.5, 10.0
"""Saturated time, and units finished in it, that an estimate needs."""


class Throughput:
    """A moving estimate in units per second: of tiles for a vision worker, of requests for a language worker.

    A worker with little to do is slow for each unit, since it cannot fill its batches. So only saturated time counts.
    """

    def __init__(self) -> None:
        self._units = 0.0
        self._seconds = 0.0
        self._since: float | None = None

    @property
    def per_second(self) -> float | None:
        """Units per second; None until the worker has been saturated for a while."""
        return self._units / self._seconds if self._seconds >= _LEAST_SECONDS and self._units >= _LEAST_UNITS else None

    def update(self, now: float, finished: float, *, is_saturated: bool) -> None:
        """Record that units have finished, and whether the worker is saturated from now on.

        Args:
            now: Monotonic time in seconds.
            finished: Units that have finished since the last call.
            is_saturated: Whether the worker has as much to do as it can take.
        """
        if self._since is not None:
            seconds = now - self._since
            kept = math.exp(-seconds / _MEMORY_SECONDS)
            self._units, self._seconds = self._units * kept + finished, self._seconds * kept + seconds
        self._since = now if is_saturated else None
