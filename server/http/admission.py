"""Admission: the limit of concurrent requests."""

import contextlib
from collections.abc import Iterator

from common import errors
from server.metrics import Metrics


class Admission:
    """Owner of the number of requests in flight."""

    def __init__(self, max_in_flight: int, metrics: Metrics) -> None:
        self._max_in_flight = max_in_flight
        self._in_flight = 0
        self._metrics = metrics

    @contextlib.contextmanager
    def permit(self) -> Iterator[None]:
        """Hold one permit. Raises `Overloaded` if none is left."""
        if self._in_flight >= self._max_in_flight:
            raise errors.Overloaded(
                f"Server is at capacity ({self._max_in_flight} concurrent requests). Retry after 1 s.", retry_after=1
            )
        self._change(+1)
        try:
            yield
        finally:
            self._change(-1)

    def _change(self, difference: int) -> None:
        self._in_flight += difference
        self._metrics.in_flight.set(self._in_flight)
