"""A language worker over real sockets: an embedding sink (gRPC) and vLLM's HTTP server."""

from __future__ import annotations  # grpc.aio is generic for type checkers only

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from common import errors, rpc
from common.security import OPEN, Credentials
from protos import embeddings_pb2 as pb
from protos import embeddings_pb2_grpc
from tests.server.fakes.vision_worker import checkpoint_description
from tests.server.fakes.vllm import FakeVLLM


class FakeSink(embeddings_pb2_grpc.EmbeddingSinkServicer):
    """An embedding sink that stores the number of rows of each embedding.

    Attributes:
        http: The address of vLLM's HTTP server that Describe returns.
        checkpoint: The description that Describe returns.
        rows: Number of rows by key of the embedding. A test removes a key to lose an embedding.
        dtype: The dtype of embeddings that Describe returns.
        model_dtype: The language model's dtype that Describe returns; 0, as of an older version: it is `dtype`.
        draining: What Describe returns.
        responsive: Describe waits for this event; it is set at first.
        error: Deliver raises it unless it is None.
        expect_seconds: How long each Has call expected the embeddings that are missing.
    """

    def __init__(self, address: str, http: str, credentials: Credentials = OPEN) -> None:
        self._credentials = credentials
        self.address, self.http = address, http
        self.checkpoint = checkpoint_description()
        self.rows: dict[str, int] = {}
        self.dtype: int = pb.FLOAT32
        self.model_dtype: int = pb.DTYPE_UNSPECIFIED
        self.draining = False
        self.responsive = asyncio.Event()
        self.responsive.set()
        self.error: Exception | None = None
        self.expect_seconds: list[float] = []
        self._server: Any = None

    async def start(self) -> None:
        """Listens at the sink's address."""
        self._server = rpc.create_server(self.address, credentials=self._credentials)
        embeddings_pb2_grpc.add_EmbeddingSinkServicer_to_server(self, self._server)
        await self._server.start()

    async def stop(self) -> None:
        """Cancels all calls and stops listening; does nothing where the sink is stopped."""
        if self._server:
            await self._server.stop(0)
            self._server = None

    async def Describe(self, request: Any, context: Any) -> pb.LanguageDescription:  # noqa: N802
        await self.responsive.wait()
        dtypes: Any = {"dtype": self.dtype, "model_dtype": self.model_dtype}  # protobuf's enums are numbers
        return pb.LanguageDescription(checkpoint=self.checkpoint, http=self.http, draining=self.draining, **dtypes)

    async def Has(self, request: pb.HasRequest, context: Any) -> pb.HasReply:  # noqa: N802
        self.expect_seconds.append(request.expect_seconds)
        return pb.HasReply(tokens=[self.rows.get(key, 0) for key in request.keys])

    async def Deliver(self, request: AsyncIterator[pb.DeliverChunk], context: Any) -> pb.DeliverReply:  # noqa: N802
        if self.error is not None:
            raise self.error
        chunks = [chunk async for chunk in request]
        header, data = chunks[0].header, b"".join(chunk.data for chunk in chunks[1:])
        if len(data) != header.length:
            raise errors.InvalidRequest(f"received {len(data)} bytes, expected {header.length}")
        self.rows[header.key] = header.rows
        return pb.DeliverReply()


class FakeLanguageWorker:
    """A language worker: an embedding sink and vLLM's HTTP server, on Unix sockets unless addresses are given."""

    def __init__(self, folder: Path, index: int, sink: str = "", http: str = "", credentials: Credentials = OPEN) -> None:
        self.engine = FakeVLLM(http or f"unix:{folder}/http-{index}", credentials)
        self.sink = FakeSink(sink or f"unix:{folder}/sink-{index}", self.engine.address, credentials)

    async def start(self) -> None:
        """Starts the HTTP server and the sink."""
        await self.engine.start()
        await self.sink.start()

    async def stop(self) -> None:
        """Stops the sink and the HTTP server."""
        await self.sink.stop()
        await self.engine.stop()
