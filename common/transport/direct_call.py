"""Deliver calls without gRPC, through a socket of the sink: the sender's side, and the format of messages.

gRPC's Python API takes longer for a call than a copy of two megabytes. A direct call has four short messages:

1. from the sender: the metadata of a gRPC call as JSON, then, as a second message, the header as in gRPC
   (`embedding_stream.header_message`);
2. from the sink: JSON with `offers` of transports by name, or `already_here`, or an `error` with its `message`;
3. from the sender: that the values are placed, as in gRPC (`embedding_stream.placed_message`). If the transport is the
   connection itself, `tcp` or `unix`, the values follow. Before, if the offers came with `progress`, there may be
   messages with the bytes that have been placed so far;
4. from the sink: as 2, without `offers`.

The round trip for an offer takes longer than sending a small embedding. The last answer of a call has the largest length in
bytes, `eager`, that the sink takes without it: the sender of such a call names `EAGER_KEY` in its metadata and sends 3 at
once, by the connection. It does so where the sink has offered no transport that the sender knows but the connection. If the
sink does not want the values, it reads them in spite of that, and then answers 4.

A connection serves one call after another. Who gives up a call closes the connection.

A sink that listens on a Unix socket has a second one for these calls. One on a network without TLS has a port, which it offers
in calls through gRPC as the transport `tcp`: the values of that first embedding are sent through gRPC.
"""

import asyncio
import contextlib
import json
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, ClassVar, Protocol

from common import embedding_stream, errors
from common.embedding import Header
from common.transport import base
from common.transport.connection import Connection

TCP = "tcp"
"""Name of the transport by a TCP connection."""
SINK_KEY = "dvd-sink"
"""Metadata of a call through a port: the id of the sink that offered the port. Another sink that has it by now closes."""
EAGER_KEY = "dvd-eager"
"""Metadata of a call whose values come without an offer, through the connection."""
_DEFAULTS: tuple[tuple[str, Any], ...] = ("offers", {}), ("eager", 0)
"""Fields of answers that must have a certain type."""
_SUFFIX = ".deliver"
_ANSWER_SECONDS = 30.0
"""Time for each answer of the sink, and to take each block of values: as long as gRPC waits for a peer that hangs."""
_LARGE_BYTES = 4 << 20
_LARGE_AT_ONCE = 2
"""Embeddings above `_LARGE_BYTES` whose values are sent through connections to one sink at the same time. What more of them put
into the buffers of their sockets would have left the processor's cache before the sink receives it."""
_TURN_SECONDS = 1.0
"""Longest wait of a large embedding for others: they may be slow for reasons of their own, and its slot is taken already."""
_CONNECT_SECONDS = 2.0
_UNREACHABLE_SECONDS = 300.0
"""Time for which a port that cannot be reached is not tried again."""
_IDLE_SECONDS = 60.0
"""Time after which an unused connection is closed. It must be shorter than the sink's."""

Metadata = tuple[tuple[str, str], ...]


def socket_path(address: str) -> str | None:
    """Path of the socket for the calls to a sink at `address`; None if it does not listen on a Unix socket."""
    return address.removeprefix("unix:") + _SUFFIX if address.startswith("unix:") else None


class _Sockets(Protocol):
    @property
    def metadata(self) -> Metadata: ...

    async def connect(self) -> socket.socket | None: ...


class UnixSockets:
    """The Unix socket of a sink for direct calls."""

    def __init__(self, path: str) -> None:
        """`path` is that of `socket_path`."""
        self._path = path

    @property
    def metadata(self) -> Metadata:
        """Nothing: no other sink has the path."""
        return ()

    async def connect(self) -> socket.socket | None:
        """Return a new connection; None if nobody listens."""
        try:
            return await _connect(socket.AF_UNIX, self._path)
        except OSError:
            return None


class TcpPort:
    """The port of a sink for direct calls, and a `Transport` of gRPC calls, in which the sink offers it."""

    name: ClassVar[str] = TCP

    def __init__(self, address: str) -> None:
        """`address` is the `HOST:PORT` of the sink's gRPC server."""
        self._host = address.rpartition(":")[0].strip("[]")
        self._port: int | None = None
        self._sink_id = ""
        self._unreachable_until = 0.0

    @property
    def metadata(self) -> Metadata:
        """The id of the sink that offered the port."""
        return ((SINK_KEY, self._sink_id),)

    async def place(self, offer: str, header: Header, data: memoryview, on_progress: base.OnProgress | None = None) -> bool:
        """Note the port for the next embedding, and place nothing."""
        port, _, sink_id = offer.partition(" ")
        if port.isdecimal() and 0 < int(port[:6]) < 1 << 16 and sink_id:
            self._port, self._sink_id = int(port), sink_id
        return False

    async def close(self) -> None:
        """Do nothing: no connection stays open."""

    async def connect(self) -> socket.socket | None:
        """Return a new connection; None if the port is not known, or cannot be reached."""
        if self._port is None or time.monotonic() < self._unreachable_until:
            return None
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                return await self._connect_to_first(self._port)
        except ConnectionRefusedError:  # the sink has been restarted: the next gRPC call has its port
            self._port = None
        except OSError:  # TimeoutError is one
            self._unreachable_until = time.monotonic() + _UNREACHABLE_SECONDS
        return None

    async def _connect_to_first(self, port: int) -> socket.socket:
        """Connect to the first address of the host that can be connected to. Raises: `OSError`."""
        addresses = await asyncio.get_running_loop().getaddrinfo(self._host, port, type=socket.SOCK_STREAM)
        for family, _, _, _, target in addresses[:-1]:
            with contextlib.suppress(OSError):
                return await _connect(family, target)
        return await _connect(addresses[-1][0], addresses[-1][4])


async def _connect(family: int, target: Any) -> socket.socket:
    with contextlib.ExitStack() as stack:
        connecting = stack.enter_context(socket.socket(family))
        connecting.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connecting, target)
        stack.pop_all()
        return connecting


def calls_to(address: str, transports: Sequence[base.Transport]) -> "DirectCalls | None":
    """Return direct calls to a sink at `address`, by its second Unix socket or a `TcpPort`; None if it has neither."""
    if not transports:
        return None
    if (path := socket_path(address)) is not None:
        return DirectCalls(UnixSockets(path))
    port = next((transport for transport in transports if isinstance(transport, TcpPort)), None)
    return None if port is None else DirectCalls(port)


class DirectCalls:
    """The sender's connections to one sink."""

    def __init__(self, sockets: _Sockets) -> None:
        """`sockets` opens new connections."""
        self._sockets = sockets
        self._idle: deque[tuple[float, Connection]] = deque()  # since when; used last is last
        self._large = asyncio.Semaphore(_LARGE_AT_ONCE)

    async def close(self) -> None:
        """Close all connections."""
        while self._idle:
            self._idle.pop()[1].close()

    async def deliver(
        self,
        header: Header,
        data: memoryview,
        timeout: float | None,
        metadata: Metadata,
        grant: bytes,
        transports: Sequence[base.Transport],
    ) -> bool:
        """Deliver an embedding, whose arguments are those of `embedding_stream.deliver`.

        Returns:
            Whether the sink has it. If not, the sink cannot be reached like this, or no transport works: use gRPC.

        Raises: what the sink raised; DeadlineExceeded; SinkUnavailable if it hangs.
        """
        try:
            async with asyncio.timeout(timeout):
                if (connection := await self._connection()) is None:
                    return False
                call = _Call(connection, header, data, transports, self._large)
                try:
                    is_delivered = await call.run((*metadata, *self._sockets.metadata), grant)
                finally:
                    if call.is_over:  # otherwise the sink may still wait for the values
                        self._idle.append((time.monotonic(), connection))
                    else:
                        connection.close()
        except TimeoutError:
            raise errors.DeadlineExceeded("the language worker's sink did not answer in time; try again") from None
        except (OSError, EOFError):
            return False
        if call.error is not None:
            raise call.error
        return is_delivered

    async def _connection(self) -> Connection | None:
        while self._idle and self._idle[0][0] + _IDLE_SECONDS < time.monotonic():
            self._idle.popleft()[1].close()
        while self._idle:
            _, connection = self._idle.pop()
            if connection.is_idle():
                return connection
            connection.close()
        connected = await self._sockets.connect()
        return None if connected is None else Connection(connected)


class _Call:
    """One call on a connection.

    Attributes:
        error: What the sink has answered if it refused the delivery.
        is_over: Whether both sides expect another call on this connection.
    """

    def __init__(
        self,
        connection: Connection,
        header: Header,
        data: memoryview,
        transports: Sequence[base.Transport],
        large: asyncio.Semaphore,
    ) -> None:
        self.error: errors.DvdError | None = None
        self.is_over = False
        self._has_reported = False
        self._large = large
        self._connection = connection
        self._header, self._data = header, data
        self._transports = [transport for transport in transports if not isinstance(transport, TcpPort)]

    async def run(self, metadata: Metadata, grant: bytes) -> bool:
        """Return whether the sink has the embedding. Raises: `OSError`, `EOFError` if the connection fails."""
        is_eager = 0 < len(self._data) <= self._connection.eager_bytes
        answer = await self._begin(metadata, grant, is_eager)
        if has_offers := "offers" in answer:
            if is_eager:
                raise EOFError
            offers = answer["offers"]
            if not await self._place(offers, bool(answer.get("progress"))):
                return False
            answer = await self._answer()
            if not any(transport.name in offers for transport in self._transports):
                self._connection.eager_bytes = answer.get("eager", 0)
        if "error" in answer:
            cls = errors.error_class(answer["error"]) or errors.InternalError
            self.error = cls(answer.get("message") or cls.code)
        self.is_over = self.error is None or not has_offers
        return "already_here" in answer

    async def _begin(self, metadata: Metadata, grant: bytes, is_eager: bool) -> dict[str, Any]:
        names = [self._connection.kind] if is_eager else [*(each.name for each in self._transports), self._connection.kind]
        metadata = (*metadata, *base.supported_metadata(names), *(((EAGER_KEY, ""),) if is_eager else ()))
        messages = json.dumps(metadata).encode(), embedding_stream.header_message(self._header, grant)
        await (self._send_values(*messages) if is_eager else self._connection.send(*messages))
        return await self._answer()

    async def _place(self, offers: dict[str, str], takes_progress: bool) -> bool:
        """Place the values, or send them through the connection. Returns False if the sink takes them in neither way."""
        on_progress = self._send_progress if takes_progress else None
        name = await base.place(self._transports, offers, self._header, self._data, on_progress)
        if name is not None:
            await self._connection.send(embedding_stream.placed_message(name, len(self._data)))
            return True
        if self._has_reported or self._connection.kind not in offers:
            return False
        await self._send_values()
        return True

    async def _send_values(self, *before: bytes) -> None:
        """Send messages, and then the values, through the connection."""
        placed = embedding_stream.placed_message(self._connection.kind, len(self._data))
        async with _turn(self._large) if len(self._data) > _LARGE_BYTES else contextlib.nullcontext():
            await self._connection.send(*before, placed)
            with _hanging_sink():
                await self._connection.send_values(self._data, _ANSWER_SECONDS)

    def _send_progress(self, name: str, count: int) -> None:
        self._has_reported = True
        self._connection.send_if_possible(embedding_stream.placed_message(name, count, partial=True))

    async def _answer(self) -> dict[str, Any]:
        with _hanging_sink():
            async with asyncio.timeout(_ANSWER_SECONDS):
                try:
                    message = await self._connection.receive()
                except errors.InvalidRequest as error:
                    raise EOFError from error
        return _parse_answer(message)


def _parse_answer(message: bytes) -> dict[str, Any]:
    """Return the sink's answer. Raises: `EOFError` if it is none: another server may have the port by now."""
    try:
        answer = json.loads(message)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict) or any(type(answer.get(name, default)) is not type(default) for name, default in _DEFAULTS):
        raise EOFError
    return answer


@contextlib.asynccontextmanager
async def _turn(turns: asyncio.Semaphore) -> AsyncIterator[None]:
    """Have one of the turns inside the block, or none after a wait of `_TURN_SECONDS`."""
    has_turn = False
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_TURN_SECONDS):
            has_turn = await turns.acquire()
    try:
        yield
    finally:
        if has_turn:
            turns.release()


@contextlib.contextmanager
def _hanging_sink() -> Iterator[None]:
    """Report that the sink hangs if the block runs into its own timeout."""
    try:
        yield
    except TimeoutError:
        raise errors.SinkUnavailable(f"the language worker's sink has not answered for {_ANSWER_SECONDS:g} s") from None
