"""The connections of a process: how many there may be, which of them gives way to a new one, and what is refused on them."""

import contextvars
import heapq
from typing import Protocol

from server.http.middleware import OTHER_ROUTE, log_request
from server.metrics import Metrics
from server.request_stats import RequestStats

_FOUND_AT_ONCE = 256
"""Connections that are looked for at once, to give way one after the other."""


class Connection(Protocol):
    """A connection, as `Connections` sees it."""

    waiting_since: float
    """Monotonic time since when it waits."""

    @property
    def is_waiting_for_request(self) -> bool:
        """Whether its caller has not sent a complete request: it is idle, or sends a head or a body."""

    def give_way(self) -> None:
        """Close the connection at once."""


class Connections:
    """Owner of the number of open connections.

    Beyond the limit the connection is closed that has waited longest for its caller; one that is being served never is.

    Args:
        limit: Maximum number of connections.
        head_timeout: Seconds in which a request's head must arrive, and before it a TLS handshake.
        metrics: Where connections and requests are counted that never reach the application.
    """

    def __init__(self, limit: int, head_timeout: float, metrics: Metrics) -> None:
        self._limit, self.head_timeout, self._metrics = limit, head_timeout, metrics
        self._open: set[Connection] = set()
        self._oldest: list[tuple[float, Connection]] = []  # when each began to wait, the oldest last

    def add(self, connection: Connection) -> bool:
        """Add a connection, if need be in place of another one. Returns False if there is no place for it.

        One that was added at the start of its TLS handshake keeps its place.
        """
        if connection in self._open:
            return True
        if len(self._open) >= self._limit and not self._make_room():
            self._metrics.refused.labels("connections").inc()
            return False
        self._open.add(connection)
        self._export()
        return True

    def remove(self, connection: Connection) -> None:
        """Remove a connection that is closed. One that was refused is not known."""
        self._open.discard(connection)
        self._export()

    def record_error(self, request_id: str, code: str, status: int) -> None:
        """Record a request that was answered with an error before it reached the application."""
        stats = RequestStats(request_id)
        stats.error_code = code
        self._metrics.record_request(stats, OTHER_ROUTE, status)
        contextvars.copy_context().run(log_request, stats, OTHER_ROUTE, status)  # it sets the request's id

    def record_failed_handshake(self, reason: str) -> None:
        """Record a TLS handshake that failed: `timeout`, or `error` for a client that left, or does not speak TLS."""
        self._metrics.failed_handshakes.labels(reason).inc()

    def _make_room(self) -> bool:
        oldest = self._take_oldest() or self._find_oldest()
        if oldest is None:
            return False
        self.remove(oldest)
        oldest.give_way()
        return True

    def _take_oldest(self) -> Connection | None:
        """Return the connection that has waited longest of those that were found last; None if none of them waits any more."""
        while self._oldest:
            since, connection = self._oldest.pop()
            is_open = connection in self._open
            if is_open and connection.waiting_since == since and connection.is_waiting_for_request:
                return connection
        return None

    def _find_oldest(self) -> Connection | None:
        """Look at all connections, and return the one that has waited longest; None if all are served.

        That takes milliseconds if there are thousands, so the next ones are kept: others can only have begun to wait since.
        """
        waiting = ((connection.waiting_since, connection) for connection in self._open if connection.is_waiting_for_request)
        self._oldest = heapq.nsmallest(_FOUND_AT_ONCE, waiting, key=lambda item: item[0])[::-1]
        return self._take_oldest()

    def _export(self) -> None:
        self._metrics.connections.set(len(self._open))
