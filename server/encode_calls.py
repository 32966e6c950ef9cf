"""Encode calls to vision workers: equal ones share a call, each waits for its turn, and a failed one goes to another worker."""

import re
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass

from common import errors, messages
from common.digest import digest
from common.embedding import payload_bytes
from common.grants import NO_GRANTS, GrantSigner
from common.tasks import SingleFlight
from protos import vision_pb2 as pb
from protos.embeddings_pb2 import CheckpointDescription
from server.config import GatewayOptions
from server.hedging import Hedging
from server.keys import EncodeSetting
from server.metrics import Metrics
from server.request_context import RequestContext
from server.retry import RetryBudget, with_retry
from server.vision_queue import EncodeJob, VisionQueue
from server.workers.pool import Pool
from server.workers.worker import VisionWorker

_MAX_REMEMBERED_ROUTES = 20_000
_DEADLINE_TOLERANCE_SECONDS = 0.1
_IMAGE_PARAM = re.compile(r"images\[(\d{1,9})\]")
"""How a vision worker names the image of a call that is invalid."""


@dataclass(frozen=True)
class KeyedImage:
    """An image file, its width and height in pixels, and where its first occurrence is in the request."""

    data: bytes
    size: tuple[int, int]
    location: str


@dataclass(frozen=True)
class EncodeGroup:
    """Images that one Encode call encodes: their keys, and the setting that they share."""

    keys: list[str]
    setting: EncodeSetting


@dataclass(frozen=True)
class Sink:
    """Where embeddings are delivered: the sink's address, and its id, which grants name."""

    address: str
    id: str


class EncodeCalls:
    """The only owner of the Encode calls in flight, and of the router's decisions in their replies."""

    def __init__(
        self,
        options: GatewayOptions,
        pool: Pool[VisionWorker],
        queue: VisionQueue,
        budget: RetryBudget,
        metrics: Metrics,
        grants: GrantSigner = NO_GRANTS,
    ) -> None:
        self._grants = grants
        self._options, self._pool, self._queue, self._budget, self._metrics = options, pool, queue, budget, metrics
        self._flights: SingleFlight[pb.EncodeReply] = SingleFlight()
        self._hedging = Hedging(options.hedge_share, metrics)
        self._routes: OrderedDict[str, pb.EncodedImage] = OrderedDict()

    def route(self, key: str) -> pb.EncodedImage | None:
        """Return the router's last decision for a key; None if it is not remembered."""
        return self._routes.get(key)

    async def encode(
        self,
        group: EncodeGroup,
        images: Mapping[str, KeyedImage],
        checkpoint: CheckpointDescription,
        tiles: int,
        sink: Sink | None,
        context: RequestContext,
    ) -> pb.EncodeReply:
        """Encode a group of images. Equal calls in flight share one.

        Args:
            group: Keys and setting.
            images: Image files by key.
            checkpoint: The checkpoint of the language worker.
            tiles: Number of tiles of the group.
            sink: Where the embeddings are delivered; None for a dry run, which delivers nothing.
            context: The request.

        Raises:
            DvdError: What the last vision worker raised; an invalid image is named by its place in the request.
        """
        names = (sink.address, sink.id) if sink else ("", "")
        flight = digest(*(name.encode() for name in (*names, *group.keys))).hex()
        request = _encode_request(group, images, sink, context)
        if sink:
            self._add_grants(request, sink, checkpoint, context.deadline)
        job = EncodeJob(
            key=group.keys[0],
            checkpoint=checkpoint,
            caller=context.flow,
            request=context.stats.request_id,
            tiles=tiles,
            deadline=context.deadline,
            dtype=group.setting.dtype,
        )
        while True:
            joined = self._flights.in_flight(flight)
            self._metrics.joined.inc(len(group.keys) * joined)
            try:
                return await self._flights.run(flight, lambda: self._call(job, request))
            except errors.InvalidRequest as error:
                raise _with_location(error, [images[key].location for key in group.keys]) from None
            except errors.DeadlineExceeded:
                if not joined or time.monotonic() >= context.deadline:
                    raise  # else it was the deadline of the request that has begun the call

    def _add_grants(self, request: pb.EncodeRequest, sink: Sink, checkpoint: CheckpointDescription, deadline: float) -> None:
        """Allow the delivery of each image of a call until the request's deadline."""
        tiles = max(request.tiling.min_tiles, request.tiling.max_tiles, checkpoint.max_tiles) + checkpoint.thumbnail
        dtype = messages.dtype_from_proto(request.dtype)
        size = payload_bytes(dtype, tiles * checkpoint.tokens_per_tile, checkpoint.width)
        seconds = max(deadline - time.monotonic(), 0.0)
        for image in request.images:
            image.grant = self._grants.sign(sink.id, sink.address, image.key, size, seconds)

    async def _call(self, job: EncodeJob, request: pb.EncodeRequest) -> pb.EncodeReply:
        """Call the key's vision worker, or another one if that is unavailable or fails."""
        failed: list[VisionWorker] = []

        async def attempt(_is_last: bool) -> pb.EncodeReply:
            async with self._queue.worker(job, exclude=failed) as worker:
                try:
                    return await self._hedging.run(
                        lambda: self._call_worker(worker, job, request, is_first=not failed),
                        lambda: self._call_another(worker, job, request),
                    )
                except errors.DvdError:
                    failed.append(worker)
                    raise

        def may_retry(error: errors.DvdError) -> bool:
            if isinstance(error, errors.InternalError):  # a failure inside a worker needs another one
                return any(worker not in failed for worker in self._pool.available())
            return isinstance(error, errors.WorkerUnavailable)

        reply = await with_retry(attempt, may_retry, self._budget)
        for worker in failed:  # only now: had all failed, the request would be to blame
            self._pool.record_failure(worker)
        self._record(reply)
        return reply

    async def _call_another(self, worker: VisionWorker, job: EncodeJob, request: pb.EncodeRequest) -> pb.EncodeReply:
        """Call a second worker, since the first one takes long."""
        async with self._queue.worker(job, exclude=[worker]) as other:
            return await self._call_worker(other, job, request, is_first=False)

    async def _call_worker(
        self, worker: VisionWorker, job: EncodeJob, request: pb.EncodeRequest, *, is_first: bool
    ) -> pb.EncodeReply:
        # only the first one: an image on which every worker fails must not take all of them down
        with worker.marking_down_if_gone() if is_first else nullcontext():
            self._metrics.encodes.inc()
            async with worker.giving_up_if_hung(), _noting_deadline(job.deadline):
                reply = await worker.client.encode(request, max(job.deadline - time.monotonic(), 0.001))
        worker.record_served()
        self._pool.check_speed(worker)
        return reply

    def _record(self, reply: pb.EncodeReply) -> None:
        for image in reply.images:
            self._routes[image.key] = image
            if not reply.cached:
                self._metrics.image_tiles.observe(len(image.compressed))
                self._metrics.tiles.labels("full").inc(len(image.compressed) - sum(image.compressed))
                self._metrics.tiles.labels("compressed").inc(sum(image.compressed))
        while len(self._routes) > _MAX_REMEMBERED_ROUTES:
            self._routes.popitem(last=False)


@asynccontextmanager
async def _noting_deadline(deadline: float) -> AsyncIterator[None]:
    """Raise `DeadlineExceeded` for a worker that seems unavailable at the deadline: gRPC may report a cancelled call then."""
    try:
        yield
    except errors.WorkerUnavailable:
        if time.monotonic() < deadline - _DEADLINE_TOLERANCE_SECONDS:
            raise
        raise errors.DeadlineExceeded("The deadline passed while the images were encoded.") from None


def _encode_request(
    group: EncodeGroup, images: Mapping[str, KeyedImage], sink: Sink | None, context: RequestContext
) -> pb.EncodeRequest:
    setting = group.setting
    return pb.EncodeRequest(
        images=[pb.Image(key=key, data=images[key].data) for key in group.keys],
        tiling=setting.tiling,
        router=setting.router,
        dtype=setting.dtype,  # type: ignore[arg-type]  # protobuf's enums are numbers
        deliver_to=sink.address if sink else "",
        fingerprint=setting.fingerprint,
        caller=context.flow,
        scope=context.caller,
        dry_run=sink is None,
    )


def _with_location(error: errors.InvalidRequest, locations: Sequence[str]) -> errors.InvalidRequest:
    """Return a vision worker's error about one image of a call with that image's place in the request."""
    match = _IMAGE_PARAM.fullmatch(error.param or "")
    if not match or int(match[1]) >= len(locations):
        return error
    return type(error)(str(error)).at(locations[int(match[1])])
