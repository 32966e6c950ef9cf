"""Accepts TLS connections: their handshakes count as connections, and have the time of a head.

An event loop that accepts TLS by itself shows a connection to its protocol only after the handshake. A stranger that connects
and sends nothing would be counted nowhere, and could not give way to others.
"""

import asyncio
import errno
import functools
import logging
import socket
import ssl
from collections.abc import Callable, Sequence

from server.http.connections import Connections
from server.http.protocol import BoundedHttpProtocol

log = logging.getLogger(__name__)

_BATCH = 100
"""Connections that are accepted before the event loop does something else."""
_EXHAUSTED_ERRORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_EXHAUSTED_SECONDS = 1.0
"""Time without new connections after the system had no descriptor or memory left for one."""


class TlsListener:
    """Accepts connections on sockets that listen, until it is closed. It needs a running event loop.

    Args:
        sockets: The sockets.
        context: TLS of the server. A certificate that is loaded later is for the next handshakes.
        create_protocol: Makes the protocol of a connection.
        connections: Counts connections, and has the time for a handshake.
    """

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        context: ssl.SSLContext,
        create_protocol: Callable[[], BoundedHttpProtocol],
        connections: Connections,
    ) -> None:
        self._sockets, self._context, self._create_protocol, self._connections = sockets, context, create_protocol, connections
        self._loop = asyncio.get_running_loop()
        self._handshakes: set[asyncio.Task[None]] = set()
        self._is_closed = False
        for listener in sockets:
            listener.setblocking(False)
            self._listen(listener)

    def close(self) -> None:
        """Accept no more connections, and end those that are in their handshake."""
        self._is_closed = True
        for listener in self._sockets:
            self._loop.remove_reader(listener.fileno())
        for task in self._handshakes:
            task.cancel()

    async def wait_closed(self) -> None:
        """Wait until all handshakes have ended."""
        await asyncio.gather(*self._handshakes, return_exceptions=True)

    def _listen(self, listener: socket.socket) -> None:
        if not self._is_closed:
            self._loop.add_reader(listener.fileno(), self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(_BATCH):
            try:
                connection, _ = listener.accept()
            except OSError as error:  # none is left, or a client has left already
                if error.errno in _EXHAUSTED_ERRORS:
                    log.warning("no connection can be accepted: %s", error.strerror)
                    self._loop.remove_reader(listener.fileno())
                    self._loop.call_later(_EXHAUSTED_SECONDS, self._listen, listener)
                return
            self._start_handshake(connection)

    def _start_handshake(self, connection: socket.socket) -> None:
        protocol = self._create_protocol()
        if not self._connections.add(protocol):  # an error could be sent only after a handshake
            connection.close()
            return
        task = self._loop.create_task(self._shake_hands(connection, protocol))
        protocol.start_handshake(task.cancel)
        self._handshakes.add(task)
        task.add_done_callback(functools.partial(self._end_handshake, connection, protocol))

    async def _shake_hands(self, connection: socket.socket, protocol: BoundedHttpProtocol) -> None:
        connection.setblocking(False)
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._loop.connect_accepted_socket(
                lambda: protocol, connection, ssl=self._context, ssl_handshake_timeout=self._connections.head_timeout
            )
        except OSError as error:
            self._connections.record_failed_handshake("timeout" if isinstance(error, ConnectionAbortedError) else "error")

    def _end_handshake(self, connection: socket.socket, protocol: BoundedHttpProtocol, task: "asyncio.Task[None]") -> None:
        self._handshakes.discard(task)
        if protocol.transport is None:
            self._connections.remove(protocol)
            connection.close()  # it may have been cancelled before it had a transport
