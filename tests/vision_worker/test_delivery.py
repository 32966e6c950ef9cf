"""Channels to sinks stay open while they are used and are closed when they have been idle."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from common import embedding_stream, rpc
from common.embedding import Header
from protos import embeddings_pb2, embeddings_pb2_grpc
from vision_worker import delivery
from vision_worker.delivery import SinkChannels

HEADER = Header("key", "f" * 64, "float32", 1, 4)
DATA = memoryview(bytes(16))


class Sink(embeddings_pb2_grpc.EmbeddingSinkServicer):
    """Completes deliveries while `open` is set."""

    def __init__(self) -> None:
        self.open, self.started = asyncio.Event(), asyncio.Event()
        self.open.set()

    async def Deliver(self, request: AsyncIterator[Any], context: Any) -> embeddings_pb2.DeliverReply:  # noqa: N802
        self.started.set()
        await self.open.wait()
        await embedding_stream.request_values(context, {})
        assert b"".join([chunk.data async for chunk in request]) == DATA
        return embeddings_pb2.DeliverReply()


@pytest.mark.parametrize(("idle_seconds", "stays_open"), [(-1.0, False), (600.0, True)])
async def test_an_idle_channel_is_closed_when_another_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, idle_seconds: float, stays_open: bool
) -> None:
    monkeypatch.setattr(delivery, "IDLE_SECONDS", idle_seconds)
    channels: list[Any] = []
    open_channel = rpc.open_channel

    def record_channel(*arguments: Any) -> Any:
        channels.append(open_channel(*arguments))
        return channels[-1]

    monkeypatch.setattr(rpc, "open_channel", record_channel)
    addresses = [f"unix:{tmp_path}/{i}" for i in range(3)]
    servers, sinks = [rpc.create_server(address) for address in addresses], [Sink() for _ in addresses]
    for server, sink in zip(servers, sinks, strict=True):
        embeddings_pb2_grpc.add_EmbeddingSinkServicer_to_server(sink, server)
        await server.start()

    async with SinkChannels() as sink_channels:

        async def deliver(i: int) -> None:
            await sink_channels.deliver(addresses[i], HEADER, DATA, 20)

        await deliver(0)
        await deliver(0)
        sinks[1].open.clear()
        busy = asyncio.create_task(deliver(1))  # its channel is in use while the third is opened
        await sinks[1].started.wait()
        await deliver(2)
        sinks[1].open.set()
        await busy
        closed = [channel.get_state() is grpc.ChannelConnectivity.SHUTDOWN for channel in channels]
        assert closed == [not stays_open, False, False]
        await deliver(0)
        assert len(channels) == (3 if stays_open else 4)
    assert all(channel.get_state() is grpc.ChannelConnectivity.SHUTDOWN for channel in channels)
    for server in servers:
        await server.stop(0)
