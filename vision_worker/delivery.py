"""Delivers embeddings to the sinks of language workers."""

from __future__ import annotations  # grpc.aio is generic for type checkers only

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common import embedding_stream, errors, logs, rpc
from common.embedding import Header

if TYPE_CHECKING:
    import grpc.aio

IDLE_SECONDS = 600.0
"""Time after which a channel without deliveries may be closed."""


@dataclass(eq=False)
class _Connection:
    channel: grpc.aio.Channel
    deliveries: int = 0
    """Deliveries in flight."""
    last_used: float = 0.0


class SinkChannels:
    """One long-lived channel per sink address: `async with SinkChannels() as sinks`. Leaving the context closes them all.

    Language workers come and go, each at an address of its own. Whenever a channel is opened, those that have been idle for
    `IDLE_SECONDS` are closed.
    """

    def __init__(self) -> None:
        self._connections: dict[str, _Connection] = {}

    async def __aenter__(self) -> SinkChannels:
        return self

    async def __aexit__(self, *_: object) -> None:
        for connection in self._connections.values():
            await connection.channel.close()

    async def deliver(self, address: str, header: Header, data: memoryview, seconds: float | None) -> None:
        """Send one embedding to the sink at `address`; return once the sink has stored it.

        Args:
            address: `host:port` or `unix:/path`.
            header: describes `data`, whose length must be `header.length`.
            data: the embedding's values, row by row.
            seconds: deadline of the call; None: no deadline.

        Raises: what the sink raised; SinkUnavailable where it does not answer.
        """
        if is_new := address not in self._connections:
            self._connections[address] = _Connection(rpc.open_channel(address))
        connection = self._connections[address]
        connection.deliveries += 1
        try:
            if is_new:
                await self._close_idle()
            with rpc.translate_errors("language worker's sink"):
                await embedding_stream.deliver(connection.channel, header, data, seconds, logs.request_metadata())
        except errors.WorkerUnavailable as error:  # otherwise the caller would take it for a failure of this vision worker
            raise errors.SinkUnavailable(str(error)) from None
        finally:
            connection.deliveries -= 1
            connection.last_used = time.monotonic()

    async def _close_idle(self) -> None:
        now = time.monotonic()
        for address, connection in list(self._connections.items()):
            if not connection.deliveries and now - connection.last_used > IDLE_SECONDS:
                del self._connections[address]
                await connection.channel.close()
