"""Whether a worker is left out although it answers probes: it fails requests that another worker then serves.

Envoy has the name outlier ejection for it. `docs/decisions/0032-admission-and-fairness.md` has the reasons for the numbers.
"""

_MAX_FAILURES = 5
"""Failures in a row after which a worker is ejected."""
_MIN_OUTCOMES = 20
"""Recent outcomes from which on the share of failures counts."""
_MAX_FAILURE_SHARE = 0.5
_MEMORY = 0.95
"""Weight of all earlier outcomes at the next one: about twenty count."""
_EJECTION_SECONDS = 2.0
_MAX_EJECTION_SECONDS = 30.0
_SLOW_START_SECONDS = 5.0


class Breaker:
    """The outcomes of one worker's recent requests, and whether it is ejected.

    After its ejection a worker gets one request at a time. The first success admits it, with a slow start; a failure ejects it
    again, for twice as long.
    """

    def __init__(self) -> None:
        self._failures_in_row = 0
        self._failed_share = 0.0
        self._outcomes = 0
        self._ejections = 0
        self._ejected_until: float | None = None
        self._admitted_at: float | None = None

    @property
    def is_suspect(self) -> bool:
        """Whether the worker fails so often that it should be ejected."""
        share = self._failed_share if self._outcomes >= _MIN_OUTCOMES else 0.0
        return self._failures_in_row >= _MAX_FAILURES or share > _MAX_FAILURE_SHARE

    def record_success(self, now: float) -> None:
        """Record a request that the worker has served."""
        if self._ejected_until is not None:
            self._ejected_until, self._admitted_at = None, now
            self._outcomes, self._failed_share = 0, 0.0
        self._failures_in_row = 0
        self._add_outcome(0.0)
        if self._admitted_at is not None and now - self._admitted_at > _MAX_EJECTION_SECONDS:
            self._ejections = 0  # it has been well for long enough

    def record_failure(self, now: float) -> None:
        """Record a request that the worker failed and another one served."""
        self._failures_in_row += 1
        self._add_outcome(1.0)
        if self._ejected_until is not None:
            self.eject(now)

    def eject(self, now: float) -> float:
        """Eject the worker. Returns for how many seconds it gets no request at all."""
        seconds: float = min(_EJECTION_SECONDS * 2**self._ejections, _MAX_EJECTION_SECONDS)
        self._ejections += 1
        self._ejected_until = now + seconds
        return seconds

    def is_ejected(self) -> bool:
        """Return whether the worker was ejected and has served no request since."""
        return self._ejected_until is not None

    def admits(self, now: float, in_flight: int) -> bool:
        """Return whether the worker may get a request: after an ejection one at a time."""
        return self._ejected_until is None or (now >= self._ejected_until and in_flight == 0)

    def share(self, now: float) -> float:
        """Return the share (0 to 1) of its usual load that the worker gets: it rises slowly after an ejection."""
        if self._admitted_at is None:
            return 1.0
        return min(1.0, max(0.1, (now - self._admitted_at) / _SLOW_START_SECONDS))

    def _add_outcome(self, failed: float) -> None:
        self._outcomes += 1
        self._failed_share = _MEMORY * self._failed_share + (1 - _MEMORY) * failed if self._outcomes > 1 else failed
