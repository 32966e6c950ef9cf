"""Embeddings that were requested before they were delivered, and marks in shared memory of those that vLLM shall wait for."""

import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from common.embedding import validate_key
from lm_worker.shared_memory import mark_expected, unmark_expected

_MAX_KEYS = 1 << 16
"""Keys that are remembered, each with at most one mark; the one requested longest ago is forgotten first."""
_MAX_EXPECT_SECONDS = 86_400.0
"""Longest time for which an embedding is expected."""
_SEARCH_SECONDS = 1.0
"""Time between two searches of all keys for those whose time is up. They are ordered by their last request, not by time."""


@dataclass
class _Pending:
    """A key that was requested, and the monotonic times until which it is remembered, and marked."""

    requests: int
    until: float
    marked_until: float


class PendingDeliveries:
    """Counts requests for embeddings that are not stored, and owns the marks of those that are expected. Not thread-safe."""

    def __init__(self, folder: Path, lease: float) -> None:
        """Remember a request for `lease` seconds, or for as long as its embedding is expected in `folder`."""
        self._folder, self._lease = folder, lease
        self._keys: OrderedDict[str, _Pending] = OrderedDict()
        self._searched_at = time.monotonic()

    def __len__(self) -> int:
        return len(self._keys)

    def record_request(self, key: str, expect_seconds: float) -> None:
        """Count a request for a missing embedding.

        Args:
            key: Key of the embedding.
            expect_seconds: Time for which it is expected, a finite number; more than a day counts as a day, 0 as unknown.

        Raises:
            InvalidRequest: `key` is not a key.
        """
        validate_key(key)
        now = time.monotonic()
        self._forget_expired(now)
        previous = self._keys.pop(key, _Pending(0, now, now))
        if len(self._keys) >= _MAX_KEYS:
            self.forget(next(iter(self._keys)))
        expected_until = now + min(expect_seconds, _MAX_EXPECT_SECONDS)
        until = max(now + self._lease, expected_until, previous.until)
        self._keys[key] = _Pending(previous.requests + 1, until, max(expected_until, previous.marked_until))
        if expected_until > previous.marked_until:
            mark_expected(self._folder, key, expected_until - now)

    def forget(self, key: str) -> int:
        """Remove a key and its mark. Returns the number of requests for it."""
        if (pending := self._keys.pop(key, None)) is None:
            return 0
        unmark_expected(self._folder, key)
        return pending.requests

    def _forget_expired(self, now: float) -> None:
        while self._keys and next(iter(self._keys.values())).until < now:
            self.forget(next(iter(self._keys)))
        if now - self._searched_at > _SEARCH_SECONDS:  # those behind one that is expected for long
            self._searched_at = now
            for key in [key for key, pending in self._keys.items() if pending.until < now]:
                self.forget(key)
