"""The gRPC service of a vision worker: `Describe` and `Encode` of `protos/vision.proto`."""

from __future__ import annotations  # grpc.aio is generic for type checkers only

import asyncio
import functools
import logging
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from common import errors, logs, messages
from common.decoder_processes import Call
from common.embedding import Header
from common.grants import NO_GRANTS, GrantSigner
from common.tasks import SingleFlight, gather_or_cancel
from common.tracing import Trace
from protos import embeddings_pb2, vision_pb2_grpc
from protos import vision_pb2 as pb
from vision_worker.batcher import Batcher
from vision_worker.cache.embedding_cache import EmbeddingCache
from vision_worker.deadline import Deadline
from vision_worker.delivery import SinkChannels
from vision_worker.encode_request import ParsedRequest, parse_request
from vision_worker.encoder import Encoder
from vision_worker.keys import embedding_keys
from vision_worker.liveness import Liveness
from vision_worker.metrics import Metrics
from vision_worker.prepare_threads import PrepareThreads
from vision_worker.preprocessing.image_decoder import ImageDecoder
from vision_worker.preprocessing.tiling import Tiles
from vision_worker.projector import ImageEmbedding
from vision_worker.quantization import EMBEDDING_DTYPES
from vision_worker.tile_group import EncodedGroup

if TYPE_CHECKING:
    import grpc.aio
    import numpy as np
    import numpy.typing as npt

log = logging.getLogger("dvd.encode")


@dataclass(frozen=True)
class _Embeddings:
    """A group's embeddings in order, and how long each stage took. `values[i]` is the payload of `images[i]`.

    The images have the worker's own keys (`keys.py`), since calls with other keys may share the result.
    """

    images: list[pb.EncodedImage]
    values: list[memoryview]
    timings: pb.Timings
    from_cache: bool = False


class Service(vision_pb2_grpc.VisionServicer):
    """Serves Encode calls. Concurrent calls for the same group share one encode.

    Args:
        encoder: the vision tower, used here to tile images.
        decoder: decodes image files.
        batcher: encodes tiles.
        sinks: delivers embeddings.
        cache: embeddings of earlier calls.
        prepare_threads: threads that decode and tile images.
        liveness: whether the threads make progress.
        draining: set when the worker is about to stop.
        metrics: counters and histograms to update.
        trace: where stages are recorded.
        grants: verifies what allows a delivery.
        is_spare: whether the worker has low priority.
    """

    def __init__(
        self,
        *,
        encoder: Encoder,
        decoder: ImageDecoder,
        batcher: Batcher,
        sinks: SinkChannels,
        cache: EmbeddingCache,
        prepare_threads: PrepareThreads,
        liveness: Liveness,
        draining: asyncio.Event,
        metrics: Metrics,
        trace: Trace,
        grants: GrantSigner = NO_GRANTS,
        is_spare: bool = False,
    ) -> None:
        self._encoder, self._decoder, self._batcher, self._sinks, self._cache = encoder, decoder, batcher, sinks, cache
        self._prepare_threads, self._metrics, self._trace = prepare_threads, metrics, trace
        self._liveness, self._draining, self._grants, self._is_spare = liveness, draining, grants, is_spare
        metrics.waiting_images.set_function(lambda: prepare_threads.waiting)
        self._in_flight: SingleFlight[_Embeddings] = SingleFlight()
        # of the groups in flight, by their key; each is referenced by the task that embeds its group, and goes with it
        self._deadlines: weakref.WeakValueDictionary[str, Deadline] = weakref.WeakValueDictionary()
        self._checkpoint = messages.checkpoint_message(encoder.checkpoint)

    async def Describe(  # noqa: N802
        self, request: embeddings_pb2.DescribeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.VisionDescription:
        """Describe the checkpoint, the device and the state of the worker. It waits for no thread."""
        placement, times = self._encoder.placement, self._batcher.times
        return pb.VisionDescription(
            checkpoint=self._checkpoint,
            device=str(placement.device),
            dtype=messages.dtype_to_proto(placement.dtype_name),
            draining=self._draining.is_set(),
            stalled=self._liveness.stalled,
            batch_tiles=self._batcher.max_tiles,
            tiles_per_second=times.latest_tiles_per_second if self._is_spare else times.tiles_per_second,
            embedding_dtypes=map(messages.dtype_to_proto, EMBEDDING_DTYPES),
            spare=self._is_spare,
        )

    async def Encode(  # noqa: N802
        self, request: pb.EncodeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.EncodeReply:
        """Encode a group of images and deliver their embeddings to the caller's sink.

        gRPC cancels this task when the caller disconnects or the deadline passes; every stage then drops its work.
        """
        logs.adopt_request_id(context)
        with self._observe_call(len(request.images)) as log_fields:
            parsed = parse_request(request, self._encoder.checkpoint)
            self._check_grants(parsed)
            keys = await embedding_keys(parsed, self._checkpoint.fingerprint)
            joined, deadline = self._join(keys[0], context.time_remaining())
            if joined:
                self._metrics.images.labels("joined").inc(len(parsed.images))
            result = await self._in_flight.run(keys[0], lambda: self._embed(parsed, keys, deadline))
            log_fields["outcome"] = "joined" if joined else "cached" if result.from_cache else "encoded"
            log_fields["tiles"] = sum(len(image.compressed) for image in result.images)
            log_fields["tokens"] = sum(image.tokens for image in result.images)
            timings = pb.Timings()
            timings.CopyFrom(result.timings)  # the result is shared by all calls that joined
            if parsed.deliver_to:
                timings.deliver = await self._deliver(result, parsed, context.time_remaining())
            images = [_renamed(image, name.key) for image, name in zip(result.images, parsed.images, strict=True)]
            return pb.EncodeReply(images=images, timings=timings, cached=result.from_cache)

    def _check_grants(self, request: ParsedRequest) -> None:
        """Check before any work that each delivery is granted, to the address that the call names. Raises: GrantRefused."""
        if not request.deliver_to or not self._grants.is_demanded:
            return
        for image in request.images:
            if self._grants.verify(image.grant, image.key).address != request.deliver_to:
                raise errors.GrantRefused("the grant of the delivery is for another address than deliver_to")

    def _join(self, group_key: str, seconds: float | None) -> tuple[bool, Deadline]:
        """Return whether a call shares a group in flight, and the group's deadline, which then covers the call's own."""
        deadline = self._deadlines.get(group_key) if self._in_flight.in_flight(group_key) else None
        if deadline is not None and not deadline.missed:
            deadline.extend(seconds)
            return True, deadline
        self._in_flight.forget(group_key)  # a group that has just been dropped: its deadline was earlier than this call's
        self._deadlines[group_key] = deadline = Deadline(seconds)
        return False, deadline

    @contextmanager
    def _observe_call(self, images: int) -> Iterator[dict[str, Any]]:
        """Count a call while it runs and log it when it ends. The yielded dictionary holds the fields of the log record."""
        started, log_fields = time.monotonic(), dict[str, Any](images=images)
        self._metrics.calls.inc()
        try:
            yield log_fields
        except BaseException as error:  # cancellation included
            log_fields["error"] = errors.error_code(error)
            self._metrics.errors.labels(log_fields["error"]).inc()
            raise
        finally:
            self._metrics.calls.dec()
            log.info("encoded", extra=logs.extra_fields(**log_fields, seconds=round(time.monotonic() - started, 4)))

    async def _deliver(self, result: _Embeddings, request: ParsedRequest, seconds: float | None) -> float:
        """Deliver all embeddings at once, within `seconds`. Returns: the seconds that it took."""
        started = time.monotonic()
        named = zip(request.images, result.images, strict=True)
        headers = (self._header(name.key, request.dtype, image.tokens) for name, image in named)
        distinct = dict(zip(headers, result.values, strict=True))  # a request may contain an image twice
        deliver = functools.partial(self._sinks.deliver, request.deliver_to, seconds=seconds)
        grants = {image.key: image.grant for image in request.images}
        size = sum(map(len, distinct.values()))
        with self._trace.span("deliver", bytes=size):
            await gather_or_cancel(*(deliver(header, values, grant=grants[header.key]) for header, values in distinct.items()))
        elapsed = time.monotonic() - started
        self._metrics.observe_delivery(elapsed, size)
        return elapsed

    async def _embed(self, request: ParsedRequest, keys: Sequence[str], deadline: Deadline) -> _Embeddings:
        """The group's embeddings, from the cache or from the tower. `keys` are the worker's own."""
        return await self._look_up(request, keys) or await self._compute(request, keys, deadline)

    async def _look_up(self, request: ParsedRequest, keys: Sequence[str]) -> _Embeddings | None:
        """The group's embeddings from the cache. None unless all are cached, because a group is routed as a whole."""
        headers = [self._header(key, request.dtype, 0) for key in keys]
        entries = await gather_or_cancel(*(self._cache.get(header) for header in headers))
        hits = [entry for entry in entries if entry is not None]
        if len(hits) < len(entries):
            return None
        self._metrics.images.labels("cached").inc(len(hits))
        return _Embeddings([image for image, _ in hits], [values for _, values in hits], pb.Timings(), from_cache=True)

    async def _compute(self, request: ParsedRequest, keys: Sequence[str], deadline: Deadline) -> _Embeddings:
        """Prepare and encode the group, and store its embeddings in the cache."""
        with self._trace.span("prepare", images=len(request.images)):
            prepared = await gather_or_cancel(*(self._prepare(request, i, deadline) for i in range(len(request.images))))
        wait_seconds, tiles = max(waited for waited, _ in prepared), [image.without_pixels() for _, image in prepared]
        encoding = self._batcher.encode(
            [image for _, image in prepared],
            request.policy,
            EMBEDDING_DTYPES[request.dtype],
            request.caller,
            deadline,
            logs.request_id.get(),
        )
        del prepared  # the batcher releases the pixels tile by tile
        group = await encoding
        self._metrics.images.labels("encoded").inc(len(tiles))
        self._metrics.tiles.inc(sum(map(len, tiles)))
        images = list(map(_image_message, keys, tiles, group.images))
        for image, embedding in zip(images, group.images, strict=True):
            self._cache.put(self._header(image.key, request.dtype, image.tokens), image, embedding.data)
        timings = _timings(wait_seconds, tiles, group)
        self._metrics.observe_encode(timings)
        return _Embeddings(images, [embedding.data for embedding in group.images], timings)

    async def _prepare(self, request: ParsedRequest, index: int, deadline: Deadline) -> tuple[float, Tiles]:
        """Decode an image in a process, and tile it in a thread. An error names the image by its index in the call.

        Returns: the seconds it waited for a thread, and its tiles.
        """
        submitted, image = time.monotonic(), request.images[index]

        def prepare(call: Call) -> tuple[float, Tiles]:
            started = time.monotonic()
            # a message makes a copy of its bytes for each use: not before the thread needs them
            return started - submitted, self._decoder.decode(image.data, functools.partial(cut, started), call)

        def cut(started: float, pixels: npt.NDArray[np.uint8]) -> Tiles:
            decode_seconds = time.monotonic() - started
            return replace(self._encoder.prepare(pixels, request.tiling), decode_seconds=decode_seconds)

        def check() -> None:
            if deadline.passes_within(0):
                deadline.missed = True
                raise errors.DeadlineExceeded(f"Deadline exceeded before images[{index}] was decoded; retry later.")

        try:
            return await self._prepare_threads.run(request.caller, prepare, check, logs.request_id.get())
        except errors.InvalidRequest as error:
            raise type(error)(str(error), param=f"images[{index}]") from None

    def _header(self, key: str, dtype: str, rows: int) -> Header:
        return Header(key, self._checkpoint.fingerprint, dtype, rows, self._checkpoint.width)


def _timings(wait_seconds: float, tiles: list[Tiles], group: EncodedGroup) -> pb.Timings:
    """The stages of a group, in seconds; decoding and tiling are those of its slowest image."""
    return pb.Timings(
        wait=wait_seconds,
        decode=max(image.decode_seconds for image in tiles),
        tile=max(image.cut_seconds for image in tiles),
        queue=group.queue_seconds,
        encode=group.encode_seconds,
        route=group.route_seconds,
    )


def _renamed(image: pb.EncodedImage, key: str) -> pb.EncodedImage:
    """A copy of `image` with another key."""
    renamed = pb.EncodedImage()
    renamed.CopyFrom(image)
    renamed.key = key
    return renamed


def _image_message(key: str, tiles: Tiles, embedding: ImageEmbedding) -> pb.EncodedImage:
    return pb.EncodedImage(
        key=key, tokens=embedding.rows, columns=tiles.columns, rows=tiles.rows,
        compressed=embedding.compressed, scores=embedding.scores,
    )  # fmt: skip
