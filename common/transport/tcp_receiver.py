"""The sink's side of the transport over TCP: a port on which only the holder of an offer's token is listened to."""

import asyncio
import contextlib
import functools
import socket
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import ClassVar

from common import errors, rpc
from common.embedding import HEADER_SIZE
from common.transport import tcp
from common.transport.base import Slot

_MAX_STRANGERS = 64
"""Connections that have not shown a token yet; the oldest one is closed for another."""
_MAX_IDLE = 256
"""Connections of senders between two embeddings; the one that has been idle for longest is closed for another."""
_TOKEN_SECONDS = 2.0
_IDLE_SECONDS = 600.0
_ACCEPT_RETRY_SECONDS = 0.1
_LOW_WATER_BYTES = 256 << 10
"""The event loop is not woken for less, except at the end: a wake-up costs as much as copying so many bytes."""
_BLOCK_BYTES = 1 << 20


class _TcpOffer:
    """A slot that waits for the connection that shows its token. Implements `Offer`."""

    def __init__(self, port: int, slot: Slot, on_progress: Callable[[], None]) -> None:
        self.token = tcp.create_token()
        self.text = tcp.format_offer(port, self.token)
        self._slot, self._on_progress = slot, on_progress
        self._is_complete = False

    async def received(self) -> None:
        """Return if all values have arrived. The sender reports that it placed them only after this sink has confirmed it."""
        if not self._is_complete:
            raise errors.InvalidRequest("The values of the delivery have not arrived by TCP.")

    async def receive(self, connection: socket.socket) -> bool:
        """Receive the values into the slot. Returns whether all came."""
        with self._slot.map() as mapping, memoryview(mapping) as whole, whole[HEADER_SIZE:] as values:
            self._is_complete = await _receive_into(connection, values, self._on_progress)
        return self._is_complete


async def _receive_into(connection: socket.socket, values: memoryview, on_progress: Callable[[], None]) -> bool:
    """Fill a buffer from a connection. Returns whether it was filled before the connection ended."""
    loop, start = asyncio.get_running_loop(), 0
    while start < len(values):
        missing = len(values) - start
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, min(missing, _LOW_WATER_BYTES))
        with values[start : start + _BLOCK_BYTES] as block:
            count = await loop.sock_recv_into(connection, block)
        if not count:
            return False
        start += count
        on_progress()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
    return True


def _close(connection: socket.socket, _task: asyncio.Task[None]) -> None:
    connection.close()


class TcpReceiver:
    """Implements `Receiver`.

    A stranger can hold one of a few connections for two seconds, and gets no byte.
    """

    name: ClassVar[str] = tcp.NAME

    def __init__(self, host: str, port: int = 0) -> None:
        """Listen at `host`, an address; 0 chooses a free port. Raises: `OSError`, with a message."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        rpc.ensure_free(f"[{host}]:{port}" if family == socket.AF_INET6 else f"{host}:{port}", "--delivery-port")
        dual = host == "::" and socket.has_dualstack_ipv6()  # as gRPC at this address
        self._listener = socket.create_server((host, port), family=family, backlog=_MAX_STRANGERS, dualstack_ipv6=dual)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._offers: dict[bytes, _TcpOffer] = {}
        self._strangers: OrderedDict[asyncio.Task[None], None] = OrderedDict()
        self._idle: OrderedDict[asyncio.Task[None], None] = OrderedDict()
        self._receiving: dict[_TcpOffer, asyncio.Task[None]] = {}
        self._accepting: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Accept connections from now on."""
        self._accepting = asyncio.create_task(self._accept())

    async def close(self) -> None:
        """Close the port and all connections."""
        tasks = [*self._strangers, *self._idle, *self._receiving.values()]
        if self._accepting is not None:
            tasks.append(self._accepting)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._listener.close()

    @contextlib.contextmanager
    def offer(self, slot: Slot, on_progress: Callable[[], None]) -> Iterator[_TcpOffer]:
        """Offer the slot to whoever shows its token. A connection that is still sending at the end is closed."""
        offer = _TcpOffer(self.port, slot, on_progress)
        self._offers[offer.token] = offer
        try:
            yield offer
        finally:
            self._offers.pop(offer.token, None)
            if (task := self._receiving.get(offer)) is not None:
                task.cancel()  # from now on it reads nothing: the event loop reads for it, and does not for a cancelled task

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._listener)
            except OSError:  # no descriptor is left, or the connection is gone already
                await asyncio.sleep(_ACCEPT_RETRY_SECONDS)
                continue
            if len(self._strangers) >= _MAX_STRANGERS:
                self._strangers.popitem(last=False)[0].cancel()
            task = asyncio.create_task(self._serve(connection))
            task.add_done_callback(functools.partial(_close, connection))  # also that of a task which never started
            self._strangers[task] = None

    async def _serve(self, connection: socket.socket) -> None:
        """Receive embeddings from one connection until it ends, or what it sends is not a token."""
        task = asyncio.current_task()
        assert task is not None
        waiting = self._strangers
        try:
            with contextlib.suppress(OSError):
                connection.setblocking(False)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while (offer := await self._next_offer(connection, waiting is self._strangers)) is not None:
                    waiting.pop(task, None)
                    if not await self._receive(offer, connection, task):
                        return
                    waiting = self._idle
                    if len(waiting) >= _MAX_IDLE:
                        waiting.popitem(last=False)[0].cancel()
                    waiting[task] = None
        finally:
            waiting.pop(task, None)

    async def _next_offer(self, connection: socket.socket, is_stranger: bool) -> _TcpOffer | None:
        """Wait for a token. None if none comes in time, or it is not that of an offer. A token is good for one use."""
        loop, token = asyncio.get_running_loop(), b""
        async with asyncio.timeout(_TOKEN_SECONDS if is_stranger else _IDLE_SECONDS):  # TimeoutError is an OSError
            while len(token) < tcp.TOKEN_BYTES:
                part = await loop.sock_recv(connection, tcp.TOKEN_BYTES - len(token))
                if not part:
                    return None
                token += part
        return self._offers.pop(token, None)

    async def _receive(self, offer: _TcpOffer, connection: socket.socket, task: asyncio.Task[None]) -> bool:
        self._receiving[offer] = task
        try:
            is_complete = await offer.receive(connection)
        finally:
            del self._receiving[offer]
        if is_complete:
            await asyncio.get_running_loop().sock_sendall(connection, tcp.RECEIVED)
        return is_complete
