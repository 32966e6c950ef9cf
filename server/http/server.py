"""The HTTP server of one process, and how it stops.

Draining begins with `drain`. For the delay the process is not ready, but still accepts connections, until load balancers have
noticed. Then it accepts none, and closes idle ones. When the grace is over, what still runs ends with an error, and
connections whose callers do not read it are cut.
"""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from common.security import TlsClock, TlsFiles
from server.http.connections import Connections
from server.http.tls import TlsListener
from server.shutdown import Shutdown

log = logging.getLogger(__name__)

_ERROR_DELIVERY_SECONDS = 1.0
"""Time for errors at the end of the grace to reach their callers."""
_ABORT_SECONDS = 2.0
"""Time for requests to end after their connections were cut; then uvicorn cancels their tasks."""


class GracefulServer(uvicorn.Server):
    """Drains when a method is called. Its process handles signals: uvicorn's server would end by the signal that it got."""

    def __init__(
        self,
        config: uvicorn.Config,
        connections: Connections,
        shutdown: Shutdown,
        delay: float,
        grace: float,
        tls: TlsFiles | None = None,
    ) -> None:
        super().__init__(config)
        self._connections = connections
        self._tls_clock = TlsClock(tls)
        self._shutdown, self._delay, self._grace = shutdown, min(delay, grace), grace
        self._grace_over = asyncio.Event()
        self._deadline = 0.0

    @property
    def is_draining(self) -> bool:
        """Whether the server is on its way to its end."""
        return self._shutdown.is_draining

    def status(self) -> dict[str, Any]:
        """Return what the admin listener answers. Any thread may call it."""
        return {"status": "draining" if self.is_draining else "serving", "processes": [os.getpid()]}

    def drain(self) -> None:
        """Start to drain. Further calls have no effect."""
        if self.is_draining:
            return
        log.info("draining: running requests have %g s to end", self._grace)
        self._shutdown.start_draining()
        loop = asyncio.get_running_loop()
        self._deadline = loop.time() + self._grace
        loop.call_later(self._delay, self._stop_accepting)
        loop.call_later(self._grace, self._end_grace)

    def end_now(self) -> None:
        """Drain without waiting any longer: running requests end with an error."""
        self.drain()
        self._deadline = asyncio.get_running_loop().time()
        self._stop_accepting()
        self._end_grace()

    def _stop_accepting(self) -> None:
        self.should_exit = True  # uvicorn's main loop looks at it every 0.1 s, and calls shutdown

    def _end_grace(self) -> None:
        if not self._grace_over.is_set():
            self._grace_over.set()
            if self.server_state.tasks:
                log.warning("the grace is over: %d running requests end with an error", len(self.server_state.tasks))
            self._shutdown.end_grace()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the process. uvicorn calls this method."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen on the sockets. uvicorn calls this method; with TLS, it shall not accept connections itself."""
        if self.config.ssl is None or not sockets:
            await super().startup(sockets)
            return
        await super().startup([])
        listener: Any = TlsListener(sockets, self.config.ssl, self._create_protocol, self._connections)
        self.servers.append(listener)  # uvicorn closes all of them

    def _create_protocol(self) -> Any:
        protocol: Any = self.config.http_protocol_class
        return protocol(config=self.config, server_state=self.server_state, app_state=self.lifespan.state, _loop=None)

    async def on_tick(self, counter: int) -> bool:
        """Read the certificate again once it has been replaced. uvicorn calls this method ten times a second."""
        if self._tls_clock.has_changed() and self.config.ssl and self.config.ssl_certfile:
            try:
                self.config.ssl.load_cert_chain(self.config.ssl_certfile, self.config.ssl_keyfile)
            except OSError as error:
                log.warning("the new TLS files cannot be read: %s", error)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, and wait for running requests. uvicorn calls this method at the end of its main loop."""
        self.drain()
        remaining = max(0.0, self._deadline - asyncio.get_running_loop().time())
        limit: Any = remaining + _ERROR_DELIVERY_SECONDS + _ABORT_SECONDS
        self.config.timeout_graceful_shutdown = limit
        aborting = asyncio.create_task(self._abort_after_grace())
        await super().shutdown(sockets)
        aborting.cancel()

    async def _abort_after_grace(self) -> None:
        await self._grace_over.wait()
        await asyncio.sleep(_ERROR_DELIVERY_SECONDS)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
