"""A vision worker that serves the gRPC interface over a real socket and encodes every image to zeros."""

from __future__ import annotations  # grpc.aio is generic for type checkers only

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from common import rpc
from common.security import OPEN, Credentials
from protos import embeddings_pb2 as pb
from protos import embeddings_pb2_grpc, vision_pb2, vision_pb2_grpc

_EMBEDDING_WIDTH = 4
_BYTES_PER_TOKEN = _EMBEDDING_WIDTH * 4


def checkpoint_description(**changes: Any) -> pb.CheckpointDescription:
    """Returns the description of the checkpoint that all fake workers serve, with some fields changed."""
    fields: dict[str, Any] = {
        "fingerprint": "f" * 64, "family": "InternVL", "width": _EMBEDDING_WIDTH, "tile_size": 448, "tokens_per_tile": 256,
        "compressed_tokens_per_tile": 64, "min_tiles": 1, "max_tiles": 12, "thumbnail": True,
    }  # fmt: skip
    return pb.CheckpointDescription(**{**fields, **changes})


def visual_token_count(image: bytes) -> int:
    """Returns the number of visual tokens of an image file. It differs between files, so that a mix-up is noticed."""
    return 64 + sum(image) % 1000


class FakeVisionWorker(vision_pb2_grpc.VisionServicer):
    """A vision worker that encodes to zeros and delivers them to the sink that the request names.

    Attributes:
        checkpoint: What Describe returns.
        description: Further fields of what Describe returns.
        delay: Seconds that a call takes, one after the other.
        deadlines: Seconds that each call of Encode had left.
        calls: All requests of Encode, in order of arrival.
        cancelled: Number of Encode calls that the caller cancelled.
        error: Encode raises it unless it is None.
        failures: Encode raises the first of them and removes it.
        cached: Whether Encode reports a cache hit.
        may_encode: Encode waits for this event; it is set at first.
        may_encode_image: Encode waits for the event of an image file that is in here.
        error_of_image: Encode raises the error of an image file that is in here.
        tokens: Visual tokens of every image; None: they differ between files.
        responsive: Describe waits for this event; it is set at first.
        waiting_probes: Number of Describe calls that wait for it.
    """

    def __init__(self, address: str, credentials: Credentials = OPEN) -> None:
        self.address, self._credentials = address, credentials
        self.checkpoint = checkpoint_description()
        self.description: dict[str, Any] = {}
        self.delay = 0.0
        self._tower = asyncio.Lock()
        self.deadlines: list[float] = []
        self.calls: list[vision_pb2.EncodeRequest] = []
        self.cancelled = 0
        self.error: Exception | None = None
        self.failures: list[Exception] = []
        self.cached = False
        self.may_encode = asyncio.Event()
        self.may_encode.set()
        self.may_encode_image: dict[bytes, asyncio.Event] = {}
        self.error_of_image: dict[bytes, Exception] = {}
        self.tokens: int | None = None
        self.responsive = asyncio.Event()
        self.responsive.set()
        self.waiting_probes = 0
        self._server: Any = None

    async def start(self) -> None:
        """Listens at the worker's address."""
        self._server = rpc.create_server(self.address, credentials=self._credentials)
        vision_pb2_grpc.add_VisionServicer_to_server(self, self._server)
        await self._server.start()

    async def stop(self) -> None:
        """Cancels all calls and stops listening; does nothing where the worker is stopped."""
        if self._server:
            await self._server.stop(0)
            self._server = None

    async def Describe(self, request: Any, context: Any) -> vision_pb2.VisionDescription:  # noqa: N802
        self.waiting_probes += 1
        try:
            await self.responsive.wait()
        finally:
            self.waiting_probes -= 1
        return vision_pb2.VisionDescription(checkpoint=self.checkpoint, device="cpu", dtype=pb.FLOAT32, **self.description)

    async def Encode(self, request: vision_pb2.EncodeRequest, context: Any) -> vision_pb2.EncodeReply:  # noqa: N802
        self.calls.append(request)
        self.deadlines.append(context.time_remaining())
        try:
            await self.may_encode.wait()
            for image in request.images:
                if event := self.may_encode_image.get(image.data):
                    await event.wait()
            if self.delay:
                async with self._tower:
                    await asyncio.sleep(self.delay)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.failures:
            raise self.failures.pop(0)
        if self.error is not None:
            raise self.error
        for image in request.images:
            if image.data in self.error_of_image:
                raise self.error_of_image[image.data]
        if not request.dry_run:
            await asyncio.gather(*(self._deliver(request, image) for image in request.images))
        images = [_encode(image, request.router.mode, self._rows(image)) for image in request.images]
        return vision_pb2.EncodeReply(images=images, cached=self.cached)

    async def _deliver(self, request: vision_pb2.EncodeRequest, image: vision_pb2.Image) -> None:
        rows = self._rows(image)
        header = pb.EmbeddingHeader(
            key=image.key,
            fingerprint=request.fingerprint,
            dtype=request.dtype,
            rows=rows,
            width=_EMBEDDING_WIDTH,
            length=rows * _BYTES_PER_TOKEN,
        )

        async def chunks() -> AsyncIterator[pb.DeliverChunk]:
            yield pb.DeliverChunk(header=header)
            yield pb.DeliverChunk(data=bytes(header.length))

        channel = rpc.open_channel(request.deliver_to, self._credentials)
        with rpc.translate_errors("sink"):
            await embeddings_pb2_grpc.EmbeddingSinkStub(channel).Deliver(chunks(), metadata=self._credentials.metadata)
        await channel.close()

    def _rows(self, image: vision_pb2.Image) -> int:
        return self.tokens or visual_token_count(image.data)

    @property
    def images(self) -> list[bytes]:
        """The files of all images in all calls, in order of the calls."""
        return [image.data for call in self.calls for image in call.images]


def _encode(image: vision_pb2.Image, mode: int, tokens: int) -> vision_pb2.EncodedImage:
    compressed = [mode == vision_pb2.Router.ALL, mode != vision_pb2.Router.OFF]
    return vision_pb2.EncodedImage(key=image.key, tokens=tokens, columns=1, rows=1, compressed=compressed, scores=[0.1, 0.9])
