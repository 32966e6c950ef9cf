"""Admission: the limits of concurrent requests, each sequence of them counted, and of the memory that their bodies take."""

import contextlib
from collections import Counter
from collections.abc import Iterator

from common import errors
from server.metrics import Metrics

_RETRY_SECONDS = 1
_RESERVED_SHARE = 8
"""One permit in so many is kept for callers that hold few: one that takes all it can get leaves the others a way in."""


class Admission:
    """Owner of the number of requests in flight, and of the bytes of their bodies.

    A request takes a permit for each sequence that it generates. Requests with images and those without have limits of their
    own: images that wait for vision workers must not keep out text, for which the language workers have time.

    Args:
        max_in_flight: Maximum number of permits for each of the two kinds.
        max_body_bytes: Maximum size of the bodies of all of them in bytes.
        metrics: Where requests in flight and refused ones are counted.
        is_shared: Whether callers can be told from each other.
    """

    def __init__(self, max_in_flight: int, max_body_bytes: int, metrics: Metrics, *, is_shared: bool = True) -> None:
        self._max_in_flight, self._max_body_bytes, self._metrics = max_in_flight, max_body_bytes, metrics
        self._reserved = max_in_flight // _RESERVED_SHARE if is_shared else 0
        self._in_flight = {False: 0, True: 0}  # permits by whether the requests have images
        self._by_caller: Counter[tuple[str, bool]] = Counter()
        self._body_bytes = 0

    def check_any_left(self) -> None:
        """Raise `Overloaded` if no request of any kind could get a permit: then its body need not be read."""
        if min(self._in_flight.values()) >= self._max_in_flight:
            raise self._overloaded(has_images=False)

    @contextlib.contextmanager
    def permits(self, caller: str, sequences: int = 1, *, has_images: bool = False) -> Iterator[None]:
        """Hold the permits of one request.

        Args:
            caller: Who sends it.
            sequences: Number of sequences that it generates. One that exceeds the limit needs all permits.
            has_images: Whether it has images.

        Raises:
            Overloaded: Too few are left, or those that are left are kept for other callers.
        """
        key = caller, has_images
        weight = min(sequences, self._max_in_flight - self._reserved)
        left = self._max_in_flight - self._in_flight[has_images] - weight
        if left < 0 or (left < self._reserved < self._by_caller[key] + weight):
            raise self._overloaded(has_images)
        self._change(key, weight)
        try:
            yield
        finally:
            self._change(key, -weight)

    @contextlib.contextmanager
    def body_memory(self) -> Iterator["BodyMemory"]:
        """Hold the memory of one body, at first none."""
        memory = BodyMemory(self)
        try:
            yield memory
        finally:
            memory.release()

    def reserve_bytes(self, size: int, held: int = 0) -> None:
        """Reserve more memory for a body that holds some already.

        Raises:
            Overloaded: It is not left. A body alone is always admitted: it has a bound of its own.
        """
        if self._body_bytes > held and self._body_bytes + size > self._max_body_bytes:
            self._metrics.refused.labels("bodies").inc()
            raise errors.Overloaded(
                f"Server is at capacity ({self._max_body_bytes} bytes of request bodies and fetched files). "
                f"Retry after {_RETRY_SECONDS} s.",
                retry_after=_RETRY_SECONDS,
            )
        self._change_bytes(size)

    def release_bytes(self, size: int) -> None:
        """Return the memory of a body."""
        self._change_bytes(-size)

    def _overloaded(self, has_images: bool) -> errors.Overloaded:
        self._metrics.refused.labels("requests").inc()
        kind = "concurrent requests with images" if has_images else "concurrent requests"
        return errors.Overloaded(
            f"Server is at capacity ({self._max_in_flight} {kind}, each sequence of n counted). "
            f"Retry after {_RETRY_SECONDS} s.",
            retry_after=_RETRY_SECONDS,
        )

    def _change(self, key: tuple[str, bool], weight: int) -> None:
        self._in_flight[key[1]] += weight
        self._by_caller[key] += weight
        if not self._by_caller[key]:  # there may be any number of callers
            del self._by_caller[key]
        self._metrics.in_flight.set(sum(self._in_flight.values()))

    def _change_bytes(self, size: int) -> None:
        self._body_bytes += size
        self._metrics.body_bytes.set(self._body_bytes)


class BodyMemory:
    """The memory that one body takes: its bytes, and what they are decoded to."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.size = 0

    def add(self, size: int) -> None:
        """Reserve more memory in bytes. Raises `Overloaded`, and reserves nothing then."""
        self._admission.reserve_bytes(size, self.size)
        self.size += size

    def release(self) -> None:
        """Return all of it."""
        self._admission.release_bytes(self.size)
        self.size = 0
