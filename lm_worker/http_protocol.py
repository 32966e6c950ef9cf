"""The HTTP protocol of vLLM's server, with bounds for strangers who reach its port: uvicorn's own has none.

pyproject.toml bounds uvicorn's version: this module subclasses its internals.
"""

import asyncio
import logging

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

log = logging.getLogger(__name__)

HEAD_SECONDS = 20.0
"""Time for a request's line and headers to arrive. Between two requests, uvicorn's own time counts."""
MAX_WAITING = 1024
"""Connections that wait for a head. Those whose requests are served are not bounded: gateways need one for each of them."""


class BoundedProtocol(HttpToolsProtocol):
    """Closes a connection whose head is too slow, and, if there are too many, the one that has waited longest for a head.

    An idle connection waits too.
    """

    _waiting: dict["BoundedProtocol", None] = {}  # noqa: RUF012  # of this process, those that wait longest first
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start to wait for the first head of a connection, if need be in place of the one that has waited longest."""
        super().connection_made(transport)
        if len(self._waiting) >= MAX_WAITING:
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]
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
        """Stop to wait: the connection gets another protocol, and this one is not told of its end."""
        self._stop_waiting()
        super().handle_websocket_upgrade()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop to wait."""
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
