"""Deliver calls without gRPC, through a Unix socket next to the sink's own: the sender's side, and the format of messages.

gRPC's Python API takes longer for a call than a copy of two megabytes. On one machine, where the values are placed in shared
memory, a delivery needs only four short messages. Each is a length of four bytes and then

1. from the sender: the metadata of a gRPC call as JSON, then, as a second message, the header as in gRPC
   (`embedding_stream.header_message`);
2. from the sink: JSON with `offers` of transports by name, or `already_here`, or an `error` with its `message`;
3. from the sender: that the values are placed, as in gRPC (`embedding_stream.placed_message`);
4. from the sink: as 2, without `offers`.

A connection serves one call after another. Who gives up a call closes the connection.
"""

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import Sequence
from typing import Any

from common import embedding_stream, errors
from common.embedding import Header
from common.transport import base

_SUFFIX = ".deliver"
_LENGTH_BYTES = 4
_MAX_MESSAGE_BYTES = 64 << 10
"""Metadata, header and grant are far shorter."""

_ANSWER_SECONDS = 30.0
"""Time for each answer of the sink: as long as gRPC waits for a peer that hangs."""

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def socket_path(address: str) -> str | None:
    """Path of the socket for the calls to a sink at `address`; None if it does not listen on a Unix socket."""
    return address.removeprefix("unix:") + _SUFFIX if address.startswith("unix:") else None


def frame(message: bytes) -> bytes:
    """Return a message with its length in front."""
    return len(message).to_bytes(_LENGTH_BYTES, "little") + message


async def read_message(reader: asyncio.StreamReader) -> bytes:
    """Read one message. Raises `EOFError` if the connection ends before, `InvalidRequest` if it is too long."""
    try:
        length = int.from_bytes(await reader.readexactly(_LENGTH_BYTES), "little")
        if length > _MAX_MESSAGE_BYTES:
            raise errors.InvalidRequest(f"A message has {length} bytes; expected at most {_MAX_MESSAGE_BYTES}.")
        return await reader.readexactly(length)
    except ConnectionError as error:
        raise EOFError from error


class LocalCalls:
    """The sender's connections to one sink on this machine."""

    def __init__(self, path: str) -> None:
        """`path` is that of `socket_path`."""
        self._path = path
        self._idle: deque[Connection] = deque()

    async def close(self) -> None:
        """Close all connections."""
        while self._idle:
            await _close(self._idle.pop())

    async def deliver(
        self,
        header: Header,
        data: memoryview,
        timeout: float | None,
        metadata: tuple[tuple[str, str], ...],
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
                async with contextlib.AsyncExitStack() as stack:
                    stack.push_async_callback(_close, connection)
                    call = _Call(connection, header, data, transports)
                    is_delivered = await call.run((*metadata, *base.supported_metadata(transports)), grant)
                    if is_delivered or call.error is not None:  # otherwise the sink may still wait for the values
                        stack.pop_all()
                        self._idle.append(connection)
        except TimeoutError:
            raise errors.DeadlineExceeded("the language worker's sink did not answer in time; try again") from None
        except (OSError, EOFError):
            return False
        if call.error is not None:
            raise call.error
        return is_delivered

    async def _connection(self) -> Connection | None:
        while self._idle:
            reader, writer = self._idle.pop()
            if not (reader.at_eof() or writer.is_closing()):
                return reader, writer
            await _close((reader, writer))
        try:
            return await asyncio.open_unix_connection(self._path)
        except OSError:
            return None


class _Call:
    """One call on a connection.

    Attributes:
        error: What the sink has answered if it refused the delivery.
    """

    def __init__(self, connection: Connection, header: Header, data: memoryview, transports: Sequence[base.Transport]) -> None:
        self.error: errors.DvdError | None = None
        self._reader, self._writer = connection
        self._header, self._data, self._transports = header, data, transports

    async def run(self, metadata: tuple[tuple[str, str], ...], grant: bytes) -> bool:
        """Return whether the sink has the embedding. Raises: `OSError`, `EOFError` if the connection fails."""
        header = embedding_stream.header_message(self._header, grant)
        answer = await self._exchange(frame(json.dumps(metadata).encode()) + frame(header))
        if "offers" in answer:
            name = await base.place(self._transports, answer["offers"], self._header, self._data)
            if name is None:
                return False
            answer = await self._exchange(frame(embedding_stream.placed_message(name, len(self._data))))
        if "error" in answer:
            cls = errors.error_class(answer["error"]) or errors.InternalError
            self.error = cls(answer.get("message") or cls.code)
            return False
        return "already_here" in answer

    async def _exchange(self, messages: bytes) -> dict[str, Any]:
        self._writer.write(messages)
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                message = await read_message(self._reader)
        except TimeoutError:
            raise errors.SinkUnavailable(f"the language worker's sink has not answered for {_ANSWER_SECONDS:g} s") from None
        answer: dict[str, Any] = json.loads(message)
        return answer


async def _close(connection: Connection) -> None:
    _, writer = connection
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
