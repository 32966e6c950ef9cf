"""What a vision worker can be asked over gRPC: `Describe` and `Encode` of `protos/vision.proto`."""

from __future__ import annotations  # grpc.aio is generic for type checkers only

import asyncio
import functools
import logging
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common import errors, logs, messages
from common.embedding import Header
from common.layouts.base import Description, Thresholds
from common.tasks import SingleFlight, gather_or_cancel
from common.tiling import MAX_TILES, Tiling, resolve_tile_bounds
from common.tracing import Trace
from protos import embeddings_pb2, vision_pb2_grpc
from protos import vision_pb2 as pb
from vision_worker.batcher import Batcher, Encoded
from vision_worker.cache.embedding_cache import EmbeddingCache
from vision_worker.delivery import Sinks
from vision_worker.encoder import Encoder
from vision_worker.metrics import Metrics
from vision_worker.models import vir
from vision_worker.preprocessing.tiling import Tiles
from vision_worker.weights import DTYPES

if TYPE_CHECKING:
    import grpc.aio

log = logging.getLogger("dvd.encode")


@dataclass(frozen=True)
class _Asked:
    """An Encode call, checked."""

    images: Sequence[pb.Image]
    tiling: Tiling
    policy: vir.Policy
    dtype: str
    deliver_to: str  # empty for a dry run

    @property
    def flight(self) -> str:
        """The same for calls that make the same: keys are digests of all that decides an embedding."""
        return "/".join(image.key for image in self.images)


@dataclass(frozen=True)
class _Made:
    """A call's embeddings in order, and the seconds that making them took."""

    images: list[pb.EncodedImage]
    values: list[memoryview]
    timings: pb.Timings
    cached: bool = False


class Service(vision_pb2_grpc.VisionServicer):
    """Owner of the calls under way: who asks for what is being made waits for it."""

    def __init__(
        self,
        encoder: Encoder,
        batcher: Batcher,
        sinks: Sinks,
        cache: EmbeddingCache,
        preparing: ThreadPoolExecutor,
        max_pixels: int,
        metrics: Metrics,
        trace: Trace,
    ) -> None:
        self._encoder, self._batcher, self._sinks, self._cache = encoder, batcher, sinks, cache
        self._preparing, self._max_pixels, self._metrics, self._trace = preparing, max_pixels, metrics, trace
        self._flights: SingleFlight[_Made] = SingleFlight()
        self._checkpoint = messages.checkpoint_message(encoder.checkpoint)

    async def Describe(  # noqa: N802
        self, request: embeddings_pb2.DescribeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.VisionDescription:
        place = self._encoder.placement
        return pb.VisionDescription(
            checkpoint=self._checkpoint, device=str(place.device), dtype=messages.dtype_to_proto(place.dtype_name)
        )

    async def Encode(  # noqa: N802
        self, request: pb.EncodeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.EncodeReply:
        """gRPC cancels this task when the caller leaves or the deadline passes; every stage below drops its work then."""
        logs.adopt_request_id(context)
        with self._call(len(request.images)) as line:
            asked = self._check(request)
            joined = self._flights.in_flight(asked.flight)
            if joined:
                self._metrics.images.labels("joined").inc(len(asked.images))
            made = await self._flights.run(asked.flight, lambda: self._make(asked))
            line["outcome"] = "joined" if joined else "cached" if made.cached else "encoded"
            line["tiles"] = sum(len(image.compressed) for image in made.images)
            line["tokens"] = sum(image.tokens for image in made.images)
            timings = pb.Timings()
            timings.CopyFrom(made.timings)
            if asked.deliver_to:
                timings.deliver = await self._deliver(made, asked, context.time_remaining())
            return pb.EncodeReply(images=made.images, timings=timings, cached=made.cached)

    @contextmanager
    def _call(self, images: int) -> Iterator[dict[str, Any]]:
        """An Encode call is being served: counted, and a line in the log when it ends."""
        began, line = time.monotonic(), dict[str, Any](images=images)
        self._metrics.calls.inc()
        try:
            yield line
        except BaseException as error:  # also of who has left
            line["error"] = errors.error_code(error)
            self._metrics.errors.labels(line["error"]).inc()
            raise
        finally:
            self._metrics.calls.dec()
            log.info("encoded", extra=logs.extra_fields(**line, seconds=round(time.monotonic() - began, 4)))

    async def _deliver(self, made: _Made, asked: _Asked, seconds: float | None) -> float:
        """The seconds that it took, of at most so many."""
        began = time.monotonic()
        headers = (self._header(image.key, asked.dtype, image.tokens) for image in made.images)
        distinct = dict(zip(headers, made.values, strict=True))  # an image may be there twice
        deliver = functools.partial(self._sinks.deliver, asked.deliver_to, seconds=seconds)
        size = sum(map(len, distinct.values()))
        with self._trace.span("deliver", bytes=size):
            await gather_or_cancel(*(deliver(header, values) for header, values in distinct.items()))
        took = time.monotonic() - began
        self._metrics.sent(took, size)
        return took

    async def _make(self, asked: _Asked) -> _Made:
        """From the cache, or by the tower."""
        found = await gather_or_cancel(*(self._cache.get(self._header(image.key, asked.dtype, 0)) for image in asked.images))
        kept = [one for one in found if one is not None]
        if len(kept) == len(found):  # a group is routed as one: a part of it is of no use
            self._metrics.images.labels("cached").inc(len(kept))
            return _Made([image for image, _ in kept], [values for _, values in kept], pb.Timings(), cached=True)
        with self._trace.span("prepare", images=len(asked.images)):
            prepared = await gather_or_cancel(*(self._prepare(image.data, asked.tiling) for image in asked.images))
        tiles = [cut for _, cut in prepared]
        answer = await self._batcher.encode(tiles, asked.policy, DTYPES[asked.dtype])
        self._metrics.images.labels("encoded").inc(len(tiles))
        self._metrics.tiles.inc(sum(map(len, tiles)))
        keys = [image.key for image in asked.images]
        images = list(map(_reported, keys, tiles, answer.images))
        for image, encoded in zip(images, answer.images, strict=True):
            self._cache.put(self._header(image.key, asked.dtype, image.tokens), image, encoded.data)
        timings = pb.Timings(
            wait=max(waited for waited, _ in prepared),
            decode=max(cut.decoding for cut in tiles),
            tile=max(cut.cutting for cut in tiles),
            queue=answer.queue,
            encode=answer.encode,
            route=answer.route,
        )
        self._metrics.made(timings)
        return _Made(images, [encoded.data for encoded in answer.images], timings)

    def _check(self, request: pb.EncodeRequest) -> _Asked:
        said = self._encoder.checkpoint.description
        ours = self._checkpoint.fingerprint
        if request.fingerprint and request.fingerprint != ours:
            raise errors.CheckpointMismatch(
                f"the caller expects checkpoint {request.fingerprint}, this vision worker serves {ours}: "
                "start all workers from the same checkpoint"
            )
        if not request.images or not all(image.key for image in request.images):
            raise errors.InvalidRequest("Encode needs at least one image and a key for each")
        if bool(request.deliver_to) == request.dry_run:
            raise errors.InvalidRequest("Encode needs deliver_to, or dry_run, and not both")
        return _Asked(
            images=request.images,
            tiling=_tiling(request.tiling, said, self._max_pixels),
            policy=_policy(request.router, said.thresholds),
            dtype=messages.dtype_from_proto(request.dtype),
            deliver_to=request.deliver_to,
        )

    async def _prepare(self, data: bytes, tiling: Tiling) -> tuple[float, Tiles]:
        """An image's tiles, and the seconds that it waited for a thread."""
        asked, waiting = time.monotonic(), self._metrics.waiting_images

        def prepare() -> tuple[float, Tiles]:
            waiting.dec()
            waited = time.monotonic() - asked
            return waited, self._encoder.prepare(data, tiling)

        waiting.inc()
        work = self._preparing.submit(prepare)
        try:
            return await asyncio.wrap_future(work)
        finally:
            if work.cancel():  # its caller has left before a thread was free
                waiting.dec()

    def _header(self, key: str, dtype: str, rows: int) -> Header:
        return Header(key, self._checkpoint.fingerprint, dtype, rows, self._checkpoint.width)


def _tiling(asked: pb.Tiling, said: Description, max_pixels: int) -> Tiling:
    least, most = resolve_tile_bounds(asked.min_tiles, asked.max_tiles, said.min_tiles, said.max_tiles)
    if least > most or most > MAX_TILES:
        raise errors.InvalidRequest(f"min_tiles {least} and max_tiles {most} must be ordered and at most {MAX_TILES}")
    return Tiling(least, most, said.thumbnail, said.tower.image_size, max_pixels)


def _policy(asked: pb.Router, own: Thresholds | None) -> vir.Policy:
    if asked.mode not in pb.Router.Mode.values():
        raise errors.InvalidRequest(f"router mode {asked.mode}; known: {', '.join(pb.Router.Mode.keys())}")
    if own is None:
        if asked.mode == pb.Router.ALL:
            raise errors.InvalidRequest("this checkpoint has no router and cannot compress: use a Flash checkpoint, or off")
        return vir.policy(asked.mode, None)
    thresholds = Thresholds(
        relative=asked.relative_threshold if asked.HasField("relative_threshold") else own.relative,
        absolute=asked.absolute_threshold if asked.HasField("absolute_threshold") else own.absolute,
    )
    for name, value in (("relative_threshold", thresholds.relative), ("absolute_threshold", thresholds.absolute)):
        if not (math.isfinite(value) and 0 <= value <= 1):
            raise errors.InvalidRequest(f"{name} {value} is not between 0 and 1")
    return vir.policy(asked.mode, thresholds)


def _reported(key: str, tiles: Tiles, image: Encoded) -> pb.EncodedImage:
    return pb.EncodedImage(
        key=key, tokens=image.rows, columns=tiles.columns, rows=tiles.rows,
        compressed=image.compressed, scores=image.scores,
    )  # fmt: skip
