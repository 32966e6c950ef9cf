"""Transport over plain TCP connections, which gRPC calls announce: the sender's side, and the format of messages.

The offer is a port of the sink's host and a token, which names one slot and is good for one use. On a connection, the sender
writes the token and then the values; the sink confirms them with one byte. Then the connection is free for another slot.
There is no TLS: where a cluster has it, values are sent through gRPC.
"""

import asyncio
import contextlib
import secrets
import socket
import time
from collections import deque
from typing import Any, ClassVar

from common.embedding import Header

NAME = "tcp"
TOKEN_BYTES = 32
RECEIVED = b"\1"
_BLOCK_BYTES = 1 << 20
_CONNECT_SECONDS = 2.0
_UNREACHABLE_SECONDS = 300.0
"""Time for which a sink whose port cannot be reached is not tried again."""
_IDLE_SECONDS = 60.0
"""Time after which an unused connection is closed. It must be shorter than the sink's."""


def create_token() -> bytes:
    """Return a new token, which cannot be guessed."""
    return secrets.token_bytes(TOKEN_BYTES)


def format_offer(port: int, token: bytes) -> str:
    """Return the text of an offer."""
    return f"{port}:{token.hex()}"


def parse_offer(offer: str) -> tuple[int, bytes] | None:
    """Return port and token of an offer; None if it is not one."""
    port, _, token = offer.partition(":")
    try:
        parsed = int(port), bytes.fromhex(token)
    except ValueError:
        return None
    return parsed if 0 < parsed[0] < 1 << 16 and len(parsed[1]) == TOKEN_BYTES else None


class TcpTransport:
    """Implements `Transport`. It keeps the connections to one sink."""

    name: ClassVar[str] = NAME

    def __init__(self, address: str) -> None:
        """`address` is the `HOST:PORT` of the sink's gRPC server."""
        self._host = address.rpartition(":")[0].strip("[]")
        self._idle: deque[tuple[float, int, socket.socket]] = deque()  # since when, and to which port; used last is last
        self._unreachable_until = 0.0

    async def place(self, offer: str, header: Header, data: memoryview) -> bool:
        """Send the values, and return once the sink has them."""
        parsed = parse_offer(offer)
        if parsed is None or (connection := await self._connection(parsed[0])) is None:
            return False
        try:
            is_received = await _send(connection, parsed[1], data)
        except OSError:
            is_received = False
        except BaseException:  # cancelled
            connection.close()
            raise
        if is_received:
            self._idle.append((time.monotonic(), parsed[0], connection))
        else:
            connection.close()
        return is_received

    async def close(self) -> None:
        """Close all connections."""
        while self._idle:
            self._idle.pop()[2].close()

    async def _connection(self, port: int) -> socket.socket | None:
        """An idle connection or a new one; None if the port cannot be reached."""
        while self._idle and self._idle[0][0] + _IDLE_SECONDS < time.monotonic():
            self._idle.popleft()[2].close()
        while self._idle:
            _, its_port, connection = self._idle.pop()
            if its_port == port and _is_open(connection):
                return connection
            connection.close()
        if time.monotonic() < self._unreachable_until:
            return None
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                return await _connect(self._host, port)
        except OSError:  # TimeoutError is one
            self._unreachable_until = time.monotonic() + _UNREACHABLE_SECONDS
            return None


async def _connect(host: str, port: int) -> socket.socket:
    """Connect to the first address of the host that can be connected to. Raises: `OSError`."""
    addresses = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for address in addresses[:-1]:
        with contextlib.suppress(OSError):
            return await _connect_to(address)
    return await _connect_to(addresses[-1])


async def _connect_to(address: tuple[Any, ...]) -> socket.socket:
    loop = asyncio.get_running_loop()
    family, kind, protocol, _, target = address
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(socket.socket(family, kind, protocol))
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await loop.sock_connect(connection, target)
        stack.pop_all()
        return connection


async def _send(connection: socket.socket, token: bytes, data: memoryview) -> bool:
    """Send one embedding. Returns whether the sink has confirmed it. Raises: `OSError`."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(connection, token)
    for start in range(0, len(data), _BLOCK_BYTES):
        await loop.sock_sendall(connection, data[start : start + _BLOCK_BYTES])
    return await loop.sock_recv(connection, len(RECEIVED)) == RECEIVED


def _is_open(connection: socket.socket) -> bool:
    """Whether the sink has not closed an idle connection, on which it has nothing to say."""
    try:
        connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False
