"""Embeddings on their way to the sinks of language workers."""

from __future__ import annotations  # grpc.aio is generic for type checkers only

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common import embedding_stream, errors, logs, rpc
from common.embedding import Header

if TYPE_CHECKING:
    import grpc.aio

UNUSED = 600.0
"""Seconds after which a channel that nobody used may be closed."""


@dataclass(eq=False)
class _Road:
    channel: grpc.aio.Channel
    users: int = 0
    used: float = 0.0


class Sinks:
    """One long-lived channel to each address that is asked for. Language workers come and go, each at an address of its own:
    whenever a channel is opened, those that were not used for `UNUSED` seconds are closed."""

    def __init__(self) -> None:
        self._roads: dict[str, _Road] = {}

    async def deliver(self, address: str, header: Header, data: memoryview, seconds: float | None) -> None:
        """Return once the sink has it all. Raises what the sink raised, or `SinkUnavailable` where none answers."""
        if opened := address not in self._roads:
            self._roads[address] = _Road(rpc.open_channel(address))
        road = self._roads[address]
        road.users += 1
        try:
            if opened:
                await self._close_unused()
            with rpc.translate_errors("language worker's sink"):
                await embedding_stream.deliver(road.channel, header, data, seconds, logs.request_metadata())
        except errors.WorkerUnavailable as error:  # unchanged it would look like this vision worker's own absence
            raise errors.SinkUnavailable(str(error)) from None
        finally:
            road.users -= 1
            road.used = time.monotonic()

    async def _close_unused(self) -> None:
        now = time.monotonic()
        for address, road in list(self._roads.items()):
            if not road.users and now - road.used > UNUSED:
                del self._roads[address]
                await road.channel.close()

    async def close(self) -> None:
        for road in self._roads.values():
            await road.channel.close()
