"""The sink's side of Deliver calls without gRPC (`common/transport/direct_call.py`)."""

import asyncio
import contextlib
import functools
import json
import logging
import os
import secrets
import socket
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from common import embedding_stream, errors, logs, rpc
from common.embedding import HEADER_SIZE
from common.security import HEADER, TOKEN_REJECTED, Credentials
from common.transport import base
from common.transport.connection import Connection
from common.transport.direct_call import EAGER_KEY, SINK_KEY, TCP
from protos import embeddings_pb2 as pb

log = logging.getLogger("dvd.sink")

_MAX_STRANGERS = 64
"""Connections that have not shown the cluster token yet; the oldest one is closed for another."""
_MAX_IDLE = 256
"""Connections of senders between two embeddings; the one that has been idle for longest is closed for another."""
_STRANGER_SECONDS = 2.0
_IDLE_SECONDS = 600.0
_SEND_SECONDS = 5.0
"""Time for a sender to take an answer, which is short."""
_DISCARD_SECONDS = 20.0
"""Time for a sender to send values that are not needed."""
_ACCEPT_RETRY_SECONDS = 0.1
_RECEIVE_BYTES = 512 << 10
"""Values are checked in such parts after they were received: they are still in the processor's own cache."""
_EAGER_BYTES = 4 << 20
"""Largest embedding that is taken without an offer: one that is refused has to be received, too."""
_PAUSE_BYTES = 1 << 20
"""Other tasks of the event loop have their turn at least after so many bytes."""


class _Servicer(Protocol):
    async def Deliver(self, request: AsyncIterator[bytes], context: Any) -> pb.DeliverReply: ...  # noqa: N802


class _ConnectionOffer:
    """The connection of a call, through which the values come once they are announced. Implements `base.Offer`."""

    text = ""

    def __init__(self, receiver: "_ConnectionReceiver", slot: base.Slot, on_progress: Callable[[], None]) -> None:
        self._receiver, self._connection = receiver, receiver.connection
        self._slot, self._on_progress = slot, on_progress

    async def received(self) -> None:
        """Receive the values into the slot: all of them, also after a wrong one, since the sender reads no answer before."""
        length, start, error = self._slot.header.length, 0, None
        with self._slot.map() as whole, self._connection.receiving_values(length):
            while start < length:
                with whole[HEADER_SIZE + start : HEADER_SIZE + min(length, start + _RECEIVE_BYTES)] as part:
                    count = await self._connection.receive_into(part, length - start)
                if not count:
                    raise errors.InvalidRequest(f"The connection ended after {start} of {length} bytes of values.")
                error = error or self._check(start + count)
                if start // _PAUSE_BYTES != (start := start + count) // _PAUSE_BYTES:
                    self._on_progress()
                    await asyncio.sleep(0)
        self._receiver.has_received = True
        if error is not None:
            raise error

    def _check(self, count: int) -> errors.InvalidRequest | None:
        try:
            self._slot.mark_placed(count)
            self._slot.check_placed()
        except errors.InvalidRequest as error:
            return error.with_traceback(None)  # it would keep the view
        return None


class _ConnectionReceiver:
    """Implements `base.Receiver` for one call.

    Attributes:
        has_received: Whether all values have come through the connection.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.name = connection.kind
        self.has_received = False

    @contextlib.contextmanager
    def offer(self, slot: base.Slot, on_progress: Callable[[], None]) -> Iterator[_ConnectionOffer]:
        """Offer the connection of the call."""
        yield _ConnectionOffer(self, slot, on_progress)


class _PortOffer:
    """A port for direct calls, offered in a gRPC call. Implements `base.Offer`."""

    def __init__(self, port: int, sink_id: str) -> None:
        self.text = f"{port} {sink_id}"

    async def received(self) -> None:
        """Refuse: the values of a gRPC call do not come through the port."""
        raise errors.InvalidRequest("The values of a gRPC call cannot be placed by TCP; expected a direct call.")


class _Context:
    """What a sink uses of the context of a gRPC call, and the receiver of the call's own connection.

    Attributes:
        receivers: Receivers of this call alone.
        is_eager: Whether the values come without an offer.
        has_offered: Whether the values have been requested.
    """

    def __init__(self, metadata: Mapping[str, str], connection: Connection) -> None:
        self.receivers = (_ConnectionReceiver(connection),)
        self.is_eager = EAGER_KEY in metadata
        self.has_offered = False
        self._metadata, self._connection = metadata, connection

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return tuple(self._metadata.items())

    async def send_initial_metadata(self, metadata: tuple[tuple[str, str], ...]) -> None:
        self.has_offered = True
        if self.is_eager:
            return
        try:
            await _send(self._connection, {"offers": base.parse_offers(metadata), "progress": True})
        except OSError as error:  # TimeoutError is one
            raise EOFError from error


def listen_on_path(path: str) -> socket.socket | None:
    """Listen on a Unix socket. Without, senders use gRPC: a path that is too long is only logged."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        try:
            if Path(path).is_socket():  # of a killed predecessor
                os.unlink(path)
            listener.bind(path)
            listener.listen(_MAX_STRANGERS)
        except OSError as error:
            log.warning("no direct calls, senders use gRPC: %s", error)
            return None
        stack.pop_all()
        return listener


def listen_on_port(host: str, port: int) -> socket.socket:
    """Listen at `host`, an address; 0 chooses a free port. Raises: `OSError`, with a message."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    rpc.ensure_free(f"[{host}]:{port}" if family == socket.AF_INET6 else f"{host}:{port}", "--delivery-port")
    dual = host == "::" and socket.has_dualstack_ipv6()  # as gRPC at this address
    return socket.create_server((host, port), family=family, backlog=_MAX_STRANGERS, dualstack_ipv6=dual)


class DirectCallServer:
    """Serves the calls of one sink at a listening socket. They need the cluster token.

    It is a `base.Receiver` of gRPC calls, too, whose offer is the port, if it has one, with the sink's id. A stranger can hold
    one of a few connections for two seconds, and for five if it takes no answer.

    Attributes:
        sink_id: Tells this sink from one that gets its port later.
    """

    name: ClassVar[str] = TCP

    def __init__(self, listener: socket.socket, credentials: Credentials, on_refused: Callable[[], None]) -> None:
        """`listener` belongs to this object from now on. `on_refused` is called for each call without the token."""
        self._listener, self._credentials, self._on_refused = listener, credentials, on_refused
        self.sink_id = secrets.token_hex(8)
        listener.setblocking(False)
        self._strangers: OrderedDict[asyncio.Task[None], None] = OrderedDict()
        self._idle: OrderedDict[asyncio.Task[None], None] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def port(self) -> int:
        """The port, of a TCP socket."""
        port: int = self._listener.getsockname()[1]
        return port

    @contextlib.contextmanager
    def offer(self, slot: base.Slot, on_progress: Callable[[], None]) -> Iterator[_PortOffer]:
        """Offer the port for further embeddings of this sender."""
        yield _PortOffer(self.port, self.sink_id)

    def start(self, sink: _Servicer) -> None:
        """Serve the calls of a sink from now on."""
        self._sink = sink
        self._start_task(self._accept())

    def _start_task(self, work: Any) -> asyncio.Task[None]:
        self._tasks.add(task := asyncio.create_task(work))
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """Remove the socket and close all connections; calls in flight end."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._listener.family == socket.AF_UNIX:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._listener.getsockname())
        self._listener.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connected, _ = await loop.sock_accept(self._listener)
            except OSError:  # no descriptor is left, or the connection is gone already
                await asyncio.sleep(_ACCEPT_RETRY_SECONDS)
                continue
            if len(self._strangers) >= _MAX_STRANGERS:
                self._strangers.popitem(last=False)[0].cancel()
            connection = Connection(connected)
            task = self._start_task(self._serve(connection))
            task.add_done_callback(functools.partial(_close, connection))  # also that of a task which never started
            self._strangers[task] = None

    async def _serve(self, connection: Connection) -> None:
        """Serve one call after another until the connection ends, or one leaves it in an unknown state."""
        task = asyncio.current_task()
        assert task is not None
        waiting, seconds = self._strangers, _STRANGER_SECONDS
        try:
            with contextlib.suppress(OSError, EOFError, errors.InvalidRequest):  # TimeoutError is an OSError
                while True:
                    async with asyncio.timeout(seconds):
                        metadata = _parse_metadata(await connection.receive())
                        first = await connection.receive()
                    if not self._credentials.accepts(metadata.get(HEADER)):
                        await self._refuse(connection)
                        return
                    if metadata.get(SINK_KEY, self.sink_id) != self.sink_id:
                        return
                    waiting.pop(task, None)
                    if not await self._serve_call(metadata, first, connection):
                        return
                    waiting, seconds = self._idle, _IDLE_SECONDS
                    if len(waiting) >= _MAX_IDLE:
                        waiting.popitem(last=False)[0].cancel()
                    waiting[task] = None
                    # a sender that is never waited for would keep the event loop
                    await asyncio.sleep(0)
        finally:
            waiting.pop(task, None)

    async def _refuse(self, connection: Connection) -> None:
        """Tell a stranger that the token is wrong. The connection is to be closed: another call would have more time."""
        self._on_refused()
        await _send(connection, {"error": errors.Unauthorized.code, "message": TOKEN_REJECTED})

    async def _serve_call(self, metadata: Mapping[str, str], first: bytes, connection: Connection) -> bool:
        """Serve a call. Returns whether another may follow."""
        logs.request_id.set("")  # that of the call before
        context = _Context(metadata, connection)
        answer = await self._answer(_Messages(first, connection), context)
        if context.is_eager and not context.has_offered:
            await _discard_values(connection)
        await _send(connection, {**answer, "eager": _EAGER_BYTES})
        return "error" not in answer or not context.has_offered or context.receivers[0].has_received

    async def _answer(self, messages: AsyncIterator[bytes], context: _Context) -> dict[str, Any]:
        try:
            reply = await self._sink.Deliver(messages, context)
        except errors.DvdError as error:
            return {"error": error.code, "message": str(error)}
        except EOFError:
            raise
        except Exception:
            log.exception("unexpected error in a direct call")
            return {"error": errors.InternalError.code, "message": "internal error; see this worker's log"}
        return {"already_here": reply.already_here}


def call_receivers(context: Any) -> Sequence[base.Receiver]:
    """Receivers that belong to one call: the connection of a direct call. A gRPC call has none."""
    return getattr(context, "receivers", ())


async def _discard_values(connection: Connection) -> None:
    """Receive the values of a call that does not need them. Raises: `InvalidRequest` if they are too many, `TimeoutError`."""
    async with asyncio.timeout(_DISCARD_SECONDS):
        message = embedding_stream.parse_message(await connection.receive())
        length = 0 if isinstance(message, memoryview) else message.placed.length
        if not 0 < length <= _EAGER_BYTES:
            raise errors.InvalidRequest(f"{length} bytes of values come without an offer; expected 1 to {_EAGER_BYTES}.")
        buffer = memoryview(bytearray(min(length, _RECEIVE_BYTES)))
        with connection.receiving_values(length):
            while length:
                if not (count := await connection.receive_into(buffer[:length], length)):
                    raise EOFError
                length -= count


async def _send(connection: Connection, answer: Mapping[str, Any]) -> None:
    """Send an answer. Raises: `TimeoutError` if the peer does not take it; `OSError`."""
    await connection.send(json.dumps(answer).encode(), seconds=_SEND_SECONDS)


def _close(connection: Connection, _task: asyncio.Task[None]) -> None:
    connection.close()


def _parse_metadata(message: bytes) -> dict[str, str]:
    """Return the metadata of a call. Raises `InvalidRequest` if the message is not metadata."""
    try:
        metadata = dict(json.loads(message))
    except (ValueError, TypeError, RecursionError):
        metadata = {"": None}
    if not all(isinstance(part, str) for item in metadata.items() for part in item):
        raise errors.InvalidRequest("invalid metadata of a direct call: expected a list of pairs of texts")
    return metadata


class _Messages:
    """The messages of a call. They end early if the sender closes the connection: its delivery is then incomplete.

    No generator: one that is not run to its end costs the event loop a task.
    """

    def __init__(self, first: bytes, connection: Connection) -> None:
        self._first: bytes | None = first
        self._connection = connection

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if (message := self._first) is not None:
            self._first = None
            return message
        try:
            return await self._connection.receive()
        except EOFError:
            raise StopAsyncIteration from None
