"""A stream socket on which messages and values travel: each message is its length in four bytes, and then its bytes."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator

from common import errors

_LENGTH_BYTES = 4
_MAX_MESSAGE_BYTES = 64 << 10
"""Metadata, header and grant are far shorter."""
_SEND_BYTES = 1 << 20
_LOW_WATER_BYTES = 256 << 10
"""The event loop is not woken for less, except at the end: a wake-up costs as much as copying so many bytes."""


def frame(message: bytes) -> bytes:
    """Return a message with its length in front."""
    return len(message).to_bytes(_LENGTH_BYTES, "little") + message


class Connection:
    """One end of a connection. A method that is cancelled may lose bytes: close the connection then.

    Attributes:
        eager_bytes: Largest embedding to send through the connection without an offer.
    """

    def __init__(self, connected: socket.socket) -> None:
        """`connected` belongs to this object from now on."""
        self.eager_bytes = 0
        self._socket = connected
        self._is_tcp = connected.family != socket.AF_UNIX
        self._received = b""
        self._sending_from_thread = threading.Lock()
        connected.setblocking(False)
        if self._is_tcp:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def kind(self) -> str:
        """Name of the transport that sends values through this connection: tcp or unix."""
        return "tcp" if self._is_tcp else "unix"

    def close(self) -> None:
        """Close it at once."""
        with self._sending_from_thread:  # the descriptor may become another file's
            self._socket.close()

    def is_idle(self) -> bool:
        """Whether the peer has neither closed the connection nor sent anything that nobody has received."""
        if self._received:
            return False
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    async def send(self, *messages: bytes, seconds: float | None = None) -> None:
        """Send messages. Raises: `OSError`; `TimeoutError`, which is one, if the peer does not take them in so many seconds."""
        data, sent = b"".join(map(frame, messages)), 0
        with contextlib.suppress(BlockingIOError):
            sent = self._socket.send(data)
        if sent < len(data):
            async with asyncio.timeout(seconds):
                await asyncio.get_running_loop().sock_sendall(self._socket, data[sent:])

    def send_if_possible(self, message: bytes) -> None:
        """Send a short message without waiting, from any thread, while nobody else sends; drop it if there is no room for it.

        Raises: `OSError` if the connection is closed.
        """
        with self._sending_from_thread, contextlib.suppress(BlockingIOError):
            self._socket.send(frame(message))  # a Unix socket takes such a message as a whole or not at all

    async def send_values(self, values: memoryview, block_seconds: float) -> None:
        """Send values. Raises: `OSError`; `TimeoutError` if a block of them is not taken in so many seconds."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(None) as timeout:
            for start in range(0, len(values), _SEND_BYTES):
                timeout.reschedule(loop.time() + block_seconds)
                await loop.sock_sendall(self._socket, values[start : start + _SEND_BYTES])

    async def receive(self) -> bytes:
        """Receive a message. Raises: `EOFError` if the connection ends before; `InvalidRequest` if the message is too long."""
        while (message := self._next_message()) is None:
            try:
                part = await asyncio.get_running_loop().sock_recv(self._socket, _MAX_MESSAGE_BYTES)
            except ConnectionError as error:
                raise EOFError from error
            if not part:
                raise EOFError
            self._received += part
        return message

    def _next_message(self) -> bytes | None:
        length = int.from_bytes(self._received[:_LENGTH_BYTES], "little")
        if length > _MAX_MESSAGE_BYTES:
            raise errors.InvalidRequest(f"A message has {length} bytes; expected at most {_MAX_MESSAGE_BYTES}.")
        end = _LENGTH_BYTES + length
        if len(self._received) < end:
            return None
        message, self._received = self._received[_LENGTH_BYTES:end], self._received[end:]
        return message

    @contextlib.contextmanager
    def receiving_values(self, length: int) -> Iterator[None]:
        """Set up the socket to receive so many bytes by `receive_into` inside the block."""
        self._set_low_water(length)
        yield
        self._set_low_water(1)

    async def receive_into(self, values: memoryview, more: int) -> int:
        """Receive a part of the values.

        Args:
            values: Where they belong.
            more: Bytes that are still missing, from `values` on.

        Returns:
            How many bytes were received; 0 if the connection has ended.
        """
        if self._received:  # after the last message
            part, self._received = self._received[: len(values)], self._received[len(values) :]
            values[: len(part)] = part
            return len(part)
        if more < _LOW_WATER_BYTES:
            self._set_low_water(more)
        try:
            with contextlib.suppress(BlockingIOError):
                return self._socket.recv_into(values)
            return await asyncio.get_running_loop().sock_recv_into(self._socket, values)
        except ConnectionError:
            return 0

    def _set_low_water(self, count: int) -> None:
        if self._is_tcp:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, max(1, min(count, _LOW_WATER_BYTES)))
