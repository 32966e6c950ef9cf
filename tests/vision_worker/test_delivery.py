"""Channels to sinks: kept while they are used, closed when language workers have gone elsewhere."""

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
from vision_worker.delivery import Sinks

HEADER = Header("key", "f" * 64, "float32", 1, 4)
DATA = memoryview(bytes(16))


class Sink(embeddings_pb2_grpc.EmbeddingSinkServicer):
    def __init__(self) -> None:
        self.free, self.begun = asyncio.Event(), asyncio.Event()
        self.free.set()

    async def Deliver(self, request: AsyncIterator[Any], context: Any) -> embeddings_pb2.DeliverReply:  # noqa: N802
        self.begun.set()
        await self.free.wait()
        await embedding_stream.request_values(context, None)
        assert b"".join([chunk.data async for chunk in request]) == DATA
        return embeddings_pb2.DeliverReply()


@pytest.mark.parametrize(("unused", "kept"), [(-1.0, False), (600.0, True)])
async def test_a_channel_that_nobody_uses_is_closed_when_another_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unused: float, kept: bool
) -> None:
    monkeypatch.setattr(delivery, "UNUSED", unused)
    opened: list[Any] = []
    monkeypatch.setattr(
        delivery.rpc, "open_channel", lambda address, make=rpc.open_channel: opened.append(make(address)) or opened[-1]
    )
    places = [f"unix:{tmp_path}/{i}" for i in range(3)]
    served, sinks, ways = [rpc.create_server(place) for place in places], [Sink() for _ in places], Sinks()
    for server, sink in zip(served, sinks, strict=True):
        embeddings_pb2_grpc.add_EmbeddingSinkServicer_to_server(sink, server)
        await server.start()

    async def deliver(i: int) -> None:
        await ways.deliver(places[i], HEADER, DATA, 20)

    try:
        await deliver(0)
        await deliver(0)
        sinks[1].free.clear()
        busy = asyncio.create_task(deliver(1))  # its channel is in use while the third is opened
        await sinks[1].begun.wait()
        await deliver(2)
        sinks[1].free.set()
        await busy
        closed = [channel.get_state() is grpc.ChannelConnectivity.SHUTDOWN for channel in opened]
        assert closed == [not kept, False, False]
        await deliver(0)
        assert len(opened) == (3 if kept else 4)
    finally:
        await ways.close()
        assert all(channel.get_state() is grpc.ChannelConnectivity.SHUTDOWN for channel in opened)
        for server in served:
            await server.stop(0)
