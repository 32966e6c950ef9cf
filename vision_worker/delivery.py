"""Embeddings on their way to the sinks of language workers."""

from __future__ import annotations  # grpc.aio is generic for type checkers only

from typing import TYPE_CHECKING

from wire import chunks, errors, rpc
from wire.tensors import Header

if TYPE_CHECKING:
    import grpc.aio


class Sinks:
    """One long-lived channel to each address that was ever asked for."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def deliver(self, address: str, header: Header, data: memoryview, seconds: float | None) -> None:
        """Return once the sink has it all. Raises what the sink raised, or `SinkUnavailable` where none answers."""
        if address not in self._channels:
            self._channels[address] = rpc.channel(address)
        try:
            with rpc.translated("language worker's sink"):
                await chunks.deliver(self._channels[address])(chunks.chunks(header, data), timeout=seconds)
        except errors.Unavailable as error:
            if type(error) is errors.Unavailable:  # ours would look like this vision worker's own absence
                raise errors.SinkUnavailable(str(error)) from None
            raise

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()
