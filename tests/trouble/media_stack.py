"""A gateway with a vision worker that really decodes and tiles images, over real sockets; only vLLM is a fake.

The tower is `vision_worker/models/fake.py`: its embeddings are hashes of the tiles, so pixels matter and no weights are read.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from common import embedding_stream, messages, rpc
from common.checkpoint import open_checkpoint
from common.decoder_processes import DecoderProcesses
from common.tiling import Tiling
from common.tracing import Trace
from protos import vision_pb2_grpc
from tests.server.fakes.language_worker import FakeLanguageWorker, FakeSink
from tests.server.fakes.stack import Stack, start_stack
from tests.server.fakes.vision_worker import FakeVisionWorker
from tests.vision_worker.images import start_image_decoder
from vision_worker.batcher import Batcher
from vision_worker.cache.embedding_cache import EmbeddingCache
from vision_worker.delivery import SinkChannels
from vision_worker.encoder import Placement
from vision_worker.metrics import Metrics
from vision_worker.models.fake import Fake
from vision_worker.prepare_threads import PrepareThreads
from vision_worker.preprocessing.tiling import Tiles
from vision_worker.process import watch_threads
from vision_worker.service import Service

DATA = Path(__file__).parents[1] / "data"
TROUBLE = DATA / "trouble"
CHECKPOINT = DATA / "golden/flash-qwen3/checkpoint"


class RecordingEncoder(Fake):
    """Records the tiles of every image."""

    def __init__(self) -> None:
        super().__init__(open_checkpoint(CHECKPOINT), Placement(torch.device("cpu"), torch.float32))
        self.tiles: list[Tiles] = []

    def prepare(self, image: npt.NDArray[np.uint8], options: Tiling) -> Tiles:
        self.tiles.append(super().prepare(image, options))
        return self.tiles[-1]


class DecodingVisionWorker(FakeVisionWorker):
    """A vision worker's real service, with a tower of hashes.

    Attributes:
        encoder: Its `tiles` are those of all images so far.
        metrics: Its metrics.
        threads: The threads that wait for its decoder processes.
        processes: Its decoder processes.
    """

    def __init__(self, address: str, decode_timeout: float = 20, memory_bytes: int = 2 << 30) -> None:
        super().__init__(address)
        self.encoder, self.metrics, self.threads = RecordingEncoder(), Metrics(), PrepareThreads(2)
        self._limits = decode_timeout, memory_bytes
        self.processes: DecoderProcesses
        self._resources = contextlib.AsyncExitStack()

    async def start(self) -> None:
        """Listens at the worker's address."""
        metrics, enter = self.metrics, self._resources.enter_async_context
        batcher = await enter(Batcher(self.encoder, 16, metrics))
        threads = self._resources.enter_context(self.threads)
        timeout, memory_bytes = self._limits
        decoder, self.processes = self._resources.enter_context(
            start_image_decoder(metrics.decoder, timeout, memory_bytes=memory_bytes)
        )
        service = Service(
            encoder=self.encoder,
            decoder=decoder,
            batcher=batcher,
            sinks=await enter(SinkChannels()),
            cache=await enter(EmbeddingCache(None)),
            prepare_threads=threads,
            liveness=watch_threads(batcher, threads, "cpu", 0),
            draining=asyncio.Event(),
            metrics=metrics,
            trace=Trace(None, "vision"),
        )
        self._server = rpc.create_server(self.address)
        vision_pb2_grpc.add_VisionServicer_to_server(service, self._server)
        await self._server.start()

    async def stop(self) -> None:
        """Stops listening and ends the threads."""
        await super().stop()
        await self._resources.aclose()


class _RequestingSink(FakeSink):
    """A sink that requests the values of an embedding, as a real one does."""

    async def Deliver(self, request: Any, context: Any) -> Any:  # noqa: N802
        await embedding_stream.request_values(context, {})
        return await super().Deliver(request, context)


@contextlib.asynccontextmanager
async def start_media_stack(
    folder: Path, vision: DecodingVisionWorker | None = None, **options: Any
) -> AsyncIterator[tuple[Stack, RecordingEncoder]]:
    """Starts a gateway and a decoding vision worker; yields the gateway and the encoder, which has the tiles."""
    vision, language = vision or DecodingVisionWorker(f"unix:{folder}/vision"), FakeLanguageWorker(folder, 0)
    language.sink = _RequestingSink(language.sink.address, language.sink.http)
    language.sink.checkpoint = messages.checkpoint_message(vision.encoder.checkpoint)
    async with start_stack(folder, [vision], [language], **options) as stack:
        yield stack, vision.encoder
