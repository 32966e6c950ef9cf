"""Delivers embeddings to the sinks of language workers."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from common import embedding_stream, errors, logs, rpc
from common.embedding import Header
from common.security import OPEN, Credentials
from common.transport import direct_call
from common.transport.base import Transport
from common.transport.direct_call import DirectCalls, TcpPort
from common.transport.shared_memory import SharedMemoryTransport

IDLE_SECONDS = 600.0
"""Time after which a channel without deliveries may be closed."""


@dataclass(eq=False)
class _Sink:
    connection: rpc.Connection
    transports: Sequence[Transport]
    direct_calls: DirectCalls | None
    deliveries: int = 0
    """Deliveries in flight."""
    last_used: float = 0.0

    async def close(self) -> None:
        await self.connection.close()
        if self.direct_calls is not None:
            await self.direct_calls.close()
        for transport in self.transports:
            await transport.close()


def transports_to(address: str, credentials: Credentials) -> Sequence[Transport]:
    """The transports that a vision worker can use to a sink at `address`, the best first."""
    if address.startswith("unix:"):
        return (SharedMemoryTransport(),)
    return () if credentials.tls else (SharedMemoryTransport(), TcpPort(address))


class SinkChannels:
    """One long-lived channel per sink address: `async with SinkChannels() as sinks`. Leaving the context closes them all.

    Language workers come and go, each at an address of its own. Whenever a channel is opened, those that have been idle for
    `IDLE_SECONDS` are closed.
    """

    def __init__(
        self, credentials: Credentials = OPEN, transports: Callable[[str, Credentials], Sequence[Transport]] = transports_to
    ) -> None:
        """`transports` returns those to a sink, by its address and the credentials."""
        self._credentials, self._transports = credentials, transports
        self._sinks: dict[str, _Sink] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for sink in self._sinks.values():
            await sink.close()

    async def deliver(self, address: str, header: Header, data: memoryview, seconds: float | None, grant: bytes = b"") -> None:
        """Send one embedding to the sink at `address`; return once the sink has stored it.

        Args:
            address: `host:port` or `unix:/path`.
            header: describes `data`, whose length must be `header.length`.
            data: the embedding's values, row by row.
            seconds: deadline of the call; None: no deadline.
            grant: allows the delivery; empty in a cluster without a token.

        Raises: what the sink raised; SinkUnavailable where it does not answer.
        """
        if is_new := address not in self._sinks:
            transports = self._transports(address, self._credentials)
            calls = direct_call.calls_to(address, transports)
            self._sinks[address] = _Sink(rpc.Connection(address, self._credentials), transports, calls)
        sink = self._sinks[address]
        sink.deliveries += 1
        try:
            if is_new:
                await self._close_idle()
            metadata = (*logs.request_metadata(), *self._credentials.metadata)
            started = time.monotonic()
            if (calls := sink.direct_calls) and await calls.deliver(header, data, seconds, metadata, grant, sink.transports):
                return
            if seconds is not None:
                seconds -= time.monotonic() - started
            with rpc.translate_errors("language worker's sink"):
                await embedding_stream.deliver(sink.connection.channel, header, data, seconds, metadata, grant, sink.transports)
        except errors.WorkerUnavailable as error:  # otherwise the caller would take it for a failure of this vision worker
            raise errors.SinkUnavailable(str(error)) from None
        finally:
            sink.deliveries -= 1
            sink.last_used = time.monotonic()

    async def _close_idle(self) -> None:
        now = time.monotonic()
        for address, sink in list(self._sinks.items()):
            if not sink.deliveries and now - sink.last_used > IDLE_SECONDS:
                del self._sinks[address]
                await sink.close()
