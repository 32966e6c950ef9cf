"""How long batches take, as measured."""

import time

_SMOOTHING = 0.2
"""Weight of the newest measurement."""

_DECAY = 0.9
"""Factor by which each batch shortens what the longest one has left."""

_VALID_SECONDS = 10.0
"""Time after which an estimate is no longer used: another process may have slowed the device down when it was measured.

Without this limit, an estimate that is too high would drop all groups, and with them the batches that would correct it."""


class BatchTimes:
    """Moving estimates from the batches so far.

    Args:
        max_tiles: tiles of a full batch.
    """

    def __init__(self, max_tiles: int) -> None:
        self._max_tiles = max_tiles
        self._seconds_per_tile: float | None = None
        self._measured = -_VALID_SECONDS
        self.seconds_per_batch = 0.0
        """Of the longest batch of late, that for warming up included; 0 without any."""
        self.latest_tiles_per_second = 0.0
        """Of the last batch or self-test, of any size; 0 without any."""

    def record(self, tiles: int, seconds: float) -> None:
        """Record a batch. A tile takes longer in a small batch than in a full one: small ones only lower its estimate."""
        self.latest_tiles_per_second = tiles / seconds
        self.seconds_per_batch = max(seconds, _DECAY * self.seconds_per_batch)
        previous, current = self.seconds_per_tile, seconds / tiles
        if tiles == self._max_tiles:
            self._seconds_per_tile = current if previous is None else previous + _SMOOTHING * (current - previous)
        elif previous is not None:
            self._seconds_per_tile = min(previous, current)
        else:
            return
        self._measured = time.monotonic()

    @property
    def tiles_per_second(self) -> float:
        """Tiles per second in full batches, however long ago that was measured; 0 until then."""
        return 1 / self._seconds_per_tile if self._seconds_per_tile else 0.0

    @property
    def seconds_per_tile(self) -> float | None:
        """Seconds per tile in full batches. None until measured, and where the measurement is old."""
        return self._seconds_per_tile if time.monotonic() - self._measured < _VALID_SECONDS else None
