"""Degradation: under load images are compressed more and cut into fewer tiles, before requests are refused.

Off by default. What is done to an image is part of its embedding's key, so that a degraded embedding is never taken for another
one, and is reported in the response.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from protos import vision_pb2 as pb
from protos.embeddings_pb2 import CheckpointDescription
from server.config import GatewayOptions
from server.keys import EncodeSetting
from server.metrics import Metrics

MAX_LEVEL = 4
"""1 and 2 compress more tiles, halfway to the bound and then up to it; 3 and 4 cut half as many tiles, and then the fewest."""
_RISE_SECONDS = 0.5
"""Time between two levels up: the queue has to show what the last one did."""
_FALL_SECONDS = 5.0
"""Time for which the load must be low until the level falls by one."""
_FALL_SHARE = 0.5
"""Share of the wait at which a level began, below which the load counts as low."""


@dataclass(frozen=True)
class Degraded:
    """What was done to the images of a request. Fields are None where the operator's or the caller's setting stands."""

    level: int
    relative_threshold: float | None = None
    max_tiles: int | None = None

    def header(self) -> str:
        """Render the value of the `X-DvD-Degraded` header."""
        return "; ".join(f"{name}={value:g}" for name, value in vars(self).items() if value is not None)


class Degradation:
    """The only owner of the level. It rises while requests wait long, and falls slowly once they do not."""

    def __init__(self, options: GatewayOptions, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._after = options.degrade_after
        self._threshold, self._min_tiles = options.degrade_threshold, options.degrade_tiles
        self._metrics, self._clock = metrics, clock
        self._level = 0
        self._changed_at = self._low_since = clock()

    @property
    def level(self) -> int:
        """Current level, 0 (nothing is degraded) to `MAX_LEVEL`."""
        return self._level

    def update(self, wait_seconds: float) -> None:
        """Adapt the level to the estimated time that a request waits now."""
        if self._after is None:
            return
        now = self._clock()
        is_high = wait_seconds >= self._after * (self._level + 1)
        if is_high and self._level < MAX_LEVEL and now - self._changed_at >= _RISE_SECONDS:
            self._set_level(self._level + 1, now)
        if wait_seconds >= self._after * self._level * _FALL_SHARE:
            self._low_since = now
        elif self._level and now - max(self._low_since, self._changed_at) >= _FALL_SECONDS:
            self._set_level(self._level - 1, now)

    def apply(self, setting: EncodeSetting, checkpoint: CheckpointDescription) -> tuple[EncodeSetting, Degraded | None]:
        """Return a setting as the level requires it, and what was changed; None if nothing was."""
        threshold = self._relative_threshold(setting.router, checkpoint)
        max_tiles = self._max_tiles(setting.tiling)
        if threshold is None and max_tiles is None:
            return setting, None
        router, tiling = pb.Router(), pb.Tiling()
        router.CopyFrom(setting.router)
        tiling.CopyFrom(setting.tiling)
        if threshold is not None:
            router.relative_threshold = threshold
        if max_tiles is not None:
            tiling.max_tiles = max_tiles
            tiling.min_tiles = min(tiling.min_tiles, max_tiles)
        self._metrics.degraded_images.inc()
        return replace(setting, router=router, tiling=tiling), Degraded(self._level, threshold, max_tiles)

    def _relative_threshold(self, router: pb.Router, checkpoint: CheckpointDescription) -> float | None:
        """Return the lower threshold that compresses more tiles; None if it stays, as where the caller fixed the routes."""
        if not self._level or not checkpoint.compressed_tokens_per_tile or router.mode != pb.Router.AUTO:
            return None
        usual = router.relative_threshold if router.HasField("relative_threshold") else checkpoint.relative_threshold
        lowest = min(self._threshold, usual)
        threshold = (usual + lowest) / 2 if self._level == 1 else lowest
        return threshold if threshold < usual else None

    def _max_tiles(self, tiling: pb.Tiling) -> int | None:
        """Return the smaller number of tiles; None if it stays."""
        if self._level < MAX_LEVEL - 1:
            return None
        wanted = tiling.max_tiles // 2 if self._level == MAX_LEVEL - 1 else self._min_tiles
        max_tiles = max(wanted, self._min_tiles)
        return max_tiles if max_tiles < tiling.max_tiles else None

    def _set_level(self, level: int, now: float) -> None:
        self._level, self._changed_at, self._low_since = level, now, now
        self._metrics.degradation_level.set(level)
