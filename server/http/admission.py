"""Admission: the limits of concurrent requests and of the memory that their bodies take."""

import contextlib
from collections.abc import Iterator

from common import errors
from server.metrics import Metrics

_RETRY_SECONDS = 1


class Admission:
    """Owner of the number of requests in flight, and of the bytes of their bodies.

    Requests with images and those without have limits of their own: images that wait for vision workers must not keep out
    text, for which the language workers have time. A request counts as one without images until its body is known.

    Args:
        max_in_flight: Maximum number of requests of each of the two kinds.
        max_body_bytes: Maximum size of the bodies of all of them in bytes.
        metrics: Where requests in flight and refused ones are counted.
    """

    def __init__(self, max_in_flight: int, max_body_bytes: int, metrics: Metrics) -> None:
        self._max_in_flight, self._max_body_bytes, self._metrics = max_in_flight, max_body_bytes, metrics
        self._in_flight = {False: 0, True: 0}  # by whether they have images
        self._body_bytes = 0

    @contextlib.contextmanager
    def permit(self) -> Iterator["Permit"]:
        """Hold a permit for one request. Raises `Overloaded` if none is left."""
        self._add(has_images=False)
        permit = Permit(self)
        try:
            yield permit
        finally:
            self._remove(permit.has_images)
            permit.release_bytes()

    def move_to_images(self) -> None:
        """Count a request that has images as such from now on. Raises `Overloaded`, and leaves it where it is."""
        self._add(has_images=True)
        self._remove(has_images=False)

    def reserve_bytes(self, size: int) -> None:
        """Reserve memory for a body. Raises `Overloaded` if it is not left; a body alone is always admitted."""
        if self._body_bytes and self._body_bytes + size > self._max_body_bytes:
            self._metrics.refused.labels("bodies").inc()
            raise errors.Overloaded(
                f"Server is at capacity ({self._max_body_bytes} bytes of request bodies). Retry after {_RETRY_SECONDS} s, "
                "or send URLs of images instead of their bytes.",
                retry_after=_RETRY_SECONDS,
            )
        self._body_bytes += size

    def release_bytes(self, size: int) -> None:
        """Return the memory of a body."""
        self._body_bytes -= size

    def _add(self, *, has_images: bool) -> None:
        if self._in_flight[has_images] >= self._max_in_flight:
            self._metrics.refused.labels("requests").inc()
            kind = "concurrent requests with images" if has_images else "concurrent requests"
            raise errors.Overloaded(
                f"Server is at capacity ({self._max_in_flight} {kind}). Retry after {_RETRY_SECONDS} s.",
                retry_after=_RETRY_SECONDS,
            )
        self._in_flight[has_images] += 1
        self._export()

    def _remove(self, has_images: bool) -> None:
        self._in_flight[has_images] -= 1
        self._export()

    def _export(self) -> None:
        self._metrics.in_flight.set(sum(self._in_flight.values()))


class Permit:
    """What one request holds."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.has_images = False
        self.body_bytes = 0

    def add_bytes(self, size: int) -> None:
        """Reserve memory for more of the body. Raises `Overloaded`."""
        self._admission.reserve_bytes(size)
        self.body_bytes += size

    def release_bytes(self) -> None:
        """Return the memory that was reserved."""
        self._admission.release_bytes(self.body_bytes)
        self.body_bytes = 0

    def set_has_images(self) -> None:
        """Record that the request has images. Raises `Overloaded` if there are too many of these."""
        self._admission.move_to_images()
        self.has_images = True
