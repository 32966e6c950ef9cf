"""The HTTP protocol of vLLM's server, with bounds for strangers who reach its port: uvicorn's own has none.

pyproject.toml bounds uvicorn's version: this module subclasses its internals.
"""

import asyncio
import logging

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

log = logging.getLogger(__name__)

HEAD_SECONDS = 20.0
"""Time for a request's line and headers to arrive. Between two requests, uvicorn's own time counts."""
MAX_CONNECTIONS = 1024
"""Gateways need one for each request in flight."""


class BoundedProtocol(HttpToolsProtocol):
    """Closes a connection whose head is too slow, and, if there are too many, the one that has waited longest for a head.

    An idle connection waits too.
    """

    _waiting: dict["BoundedProtocol", None] = {}  # noqa: RUF012  # of this process, those that wait longest first
    _count = 0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count a connection, and start to wait for its first head. One for which there is no room is closed."""
        super().connection_made(transport)
        BoundedProtocol._count += 1
        if BoundedProtocol._count > MAX_CONNECTIONS:
            oldest = next(iter(self._waiting), self)
            self._waiting.pop(oldest, None)
            oldest.transport.abort()
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Start to wait for a head, unless these bytes are the rest of a request that is being served."""
        if self.cycle is None or self.cycle.response_complete:
            self._wait_for_head()
        super().data_received(data)

    def on_headers_complete(self) -> None:
        """Stop to wait: the request is served."""
        self._stop_waiting()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """Let an idle connection give way to others."""
        super().on_response_complete()
        if not self.transport.is_closing():
            self._waiting[self] = None

    def handle_websocket_upgrade(self) -> None:
        """Count the connection no more: it gets another protocol, and this one is not told of its end."""
        BoundedProtocol._count -= 1
        self._stop_waiting()
        super().handle_websocket_upgrade()

    def connection_lost(self, exc: Exception | None) -> None:
        """Count the connection no more."""
        BoundedProtocol._count -= 1
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._on_head_timeout)
            self._waiting[self] = None

    def _stop_waiting(self) -> None:
        self._waiting.pop(self, None)
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _on_head_timeout(self) -> None:
        log.debug("a request's head did not arrive within %g s", HEAD_SECONDS)
        self.transport.abort()
