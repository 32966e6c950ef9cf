"""Placement of embeddings: every embedding that a request needs is delivered to the sink of its language worker.

The keys are computed, the sink is asked which of them it lacks, and vision workers encode and deliver those.
"""

import re
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

from common import errors
from common.tasks import SingleFlight, gather_or_cancel
from common.tracing import Trace
from protos import vision_pb2 as pb
from protos.embeddings_pb2 import CheckpointDescription, LanguageDescription
from server.apis.request import ImagePart, ParsedRequest, format_path
from server.config import GatewayOptions
from server.keys import EncodeSetting, digest, group_keys, image_keys
from server.media.loader import ImageFile
from server.metrics import Metrics
from server.request_context import RequestContext
from server.request_stats import RequestStats
from server.retry import with_retry
from server.workers.probes import WorkerPools
from server.workers.worker import LanguageWorker, VisionWorker

_MAX_REMEMBERED_ROUTES = 20_000
_LOOKUP_TIMEOUT_SECONDS = 5.0
"""Time that a sink may take to answer which embeddings it has."""
_IMAGE_PARAM = re.compile(r"images\[(\d{1,9})\]")
"""How a vision worker names the image of a call that is invalid."""


@dataclass(frozen=True)
class EncodeGroup:
    """Images that one Encode call encodes: their keys, and the setting that they share."""

    keys: list[str]
    setting: EncodeSetting


@dataclass(frozen=True)
class _KeyedImage:
    """An image file, and where its first occurrence is in the request."""

    data: bytes
    location: str


@dataclass
class ImageReport:
    """What happened to the images of a request; the fields of the `X-DvD-Images` header.

    Each embedding was in the sink (`reused`), in a vision worker's cache (`shared`), or was computed (`encoded`).
    """

    images: int = 0
    tiles: int = 0
    compressed: int = 0
    tokens: int = 0
    reused: int = 0
    shared: int = 0
    encoded: int = 0

    def header(self) -> str:
        """Render the header's value."""
        return "; ".join(f"{name}={value}" for name, value in vars(self).items())


@dataclass
class EngineRequest:
    """A request for vLLM: its language worker, whose sink has all the embeddings, and its body."""

    language: LanguageWorker
    body: bytes
    keys: list[str] = field(default_factory=list)
    report: ImageReport = field(default_factory=ImageReport)


class EmbeddingPlacer:
    """Places embeddings. The only owner of the Encode calls in flight."""

    def __init__(self, options: GatewayOptions, workers: WorkerPools, metrics: Metrics, trace: Trace) -> None:
        self._options, self._workers, self._metrics, self._trace = options, workers, metrics, trace
        self._route_per_request = options.router_scope == "request"
        self._encodes: SingleFlight[pb.EncodeReply] = SingleFlight()
        self._routes: OrderedDict[str, pb.EncodedImage] = OrderedDict()  # the router's last decision by key, for reports only

    async def place(
        self,
        request: ParsedRequest,
        files: Sequence[ImageFile],
        context: RequestContext,
        exclude: Collection[LanguageWorker] = (),
    ) -> EngineRequest:
        """Choose a language worker, and deliver to its sink the embeddings that it lacks.

        The language worker stays in use until `context.resources` closes.

        Raises:
            Unavailable: No worker can serve the request now.
            DvdError: Encoding failed.
        """
        if not files:
            language = self._workers.language.pick(None, exclude)
            context.resources.enter_context(language.in_use())
            return EngineRequest(language, request.with_embeddings([], []))
        language, description = self.choose_language(files, context, exclude)
        context.resources.enter_context(language.in_use())
        embedding_keys, groups = self._keys(request.images, files, context, description)
        with self._stage("lookup", context.stats):
            stored_tokens = dict(zip(embedding_keys, await self._lookup(language, embedding_keys), strict=True))
        missing = [group for group in groups if not all(stored_tokens[key] for key in group.keys)]
        images_by_key = _images_by_key(embedding_keys, request.images, files)
        replies = await self._encode_missing(missing, images_by_key, language, context.stats) if missing else []
        for reply in replies:
            context.stats.add_vision_timings(reply.timings)
        tokens_by_key = stored_tokens | {image.key: image.tokens for reply in replies for image in reply.images}
        tokens = [tokens_by_key[key] for key in embedding_keys]
        cached = {image.key: reply.cached for reply in replies for image in reply.images}
        report = self._report(embedding_keys, tokens, cached, description.checkpoint)
        return EngineRequest(language, request.with_embeddings(embedding_keys, tokens), embedding_keys, report)

    async def lost_embedding(self, request: EngineRequest) -> bool:
        """Return whether the sink lacks an embedding of a placed request; False if the sink does not answer."""
        if not request.keys:
            return False
        try:
            return not all(await request.language.client.has(request.keys, _LOOKUP_TIMEOUT_SECONDS))
        except errors.DvdError:
            return False

    async def route(self, request: ParsedRequest, files: Sequence[ImageFile], context: RequestContext) -> list[pb.EncodedImage]:
        """Return what the router decides for each image. Nothing is delivered, but vision workers cache the embeddings."""
        _, description = self.choose_language(files, context)
        embedding_keys, groups = self._keys(request.images, files, context, description)
        images_by_key = _images_by_key(embedding_keys, request.images, files)
        routes = {key: self._routes[key] for key in embedding_keys if key in self._routes}
        missing = [group for group in groups if not all(key in routes for key in group.keys)]
        with self._stage("vision", context.stats):
            replies = await gather_or_cancel(*(self._encode(group, images_by_key, "") for group in missing))
        routes |= {image.key: image for reply in replies for image in reply.images}
        return [routes[key] for key in embedding_keys]

    def choose_language(
        self, files: Sequence[ImageFile], context: RequestContext, exclude: Collection[LanguageWorker] = ()
    ) -> tuple[LanguageWorker, LanguageDescription]:
        """Return the language worker for these images and its description. Raises `Unavailable`, `CheckpointMismatch`."""
        key = digest(context.caller, files[0].digest).hex() if files else None
        language = self._workers.language.pick(key, exclude)
        assert language.description is not None
        if mismatch := self._workers.mismatch():
            raise errors.CheckpointMismatch(mismatch.summary)
        return language, language.description

    def _keys(
        self,
        images: Sequence[ImagePart],
        files: Sequence[ImageFile],
        context: RequestContext,
        description: LanguageDescription,
    ) -> tuple[list[str], list[EncodeGroup]]:
        """Return a key for each image, and the Encode calls that produce the embeddings of all keys."""
        checkpoint, dtype, max_tiles = description.checkpoint, description.dtype, self._options.max_tiles
        settings = [
            EncodeSetting(checkpoint.fingerprint, image.options.tiling(checkpoint, max_tiles), image.options.router, dtype)
            for image in images
        ]
        digests = [file.digest for file in files]
        if not self._route_per_request or not images:
            embedding_keys = image_keys(context.caller, settings, digests)
            distinct = dict(zip(embedding_keys, settings, strict=True))
            return embedding_keys, [EncodeGroup([key], setting) for key, setting in distinct.items()]
        _check_equal_settings(images, settings)
        embedding_keys = group_keys(context.caller, settings[0], digests)
        return embedding_keys, [EncodeGroup(embedding_keys, settings[0])]

    async def _lookup(self, language: LanguageWorker, embedding_keys: Sequence[str]) -> list[int]:
        """Return the number of visual tokens that the sink has under each key, 0 for none."""
        try:
            return await language.client.has(embedding_keys, _LOOKUP_TIMEOUT_SECONDS)
        except (errors.Unavailable, errors.DeadlineExceeded) as error:
            self._metrics.cache.labels("sink", "errors").inc()
            language.mark_down(f"its sink did not answer a lookup: {error}")
            raise errors.WorkerUnavailable("The language worker does not answer; retry later.", retry_after=1) from None

    async def _encode_missing(
        self,
        groups: Sequence[EncodeGroup],
        images_by_key: Mapping[str, _KeyedImage],
        language: LanguageWorker,
        stats: RequestStats,
    ) -> list[pb.EncodeReply]:
        with self._stage("vision", stats):
            try:
                return await gather_or_cancel(*(self._encode(group, images_by_key, language.address) for group in groups))
            except errors.SinkUnavailable as error:
                language.mark_down(f"a vision worker could not deliver to its sink: {error}")
                raise

    async def _encode(self, group: EncodeGroup, images_by_key: Mapping[str, _KeyedImage], deliver_to: str) -> pb.EncodeReply:
        """Encode a group; a dry run if there is no address to deliver to. Equal calls in flight share one."""
        setting = group.setting
        flight = digest(deliver_to.encode(), *(key.encode() for key in group.keys)).hex()
        self._metrics.joined.inc(len(group.keys) * self._encodes.in_flight(flight))
        request = pb.EncodeRequest(
            images=[pb.Image(key=key, data=images_by_key[key].data) for key in group.keys],
            tiling=setting.tiling,
            router=setting.router,
            dtype=setting.dtype,  # type: ignore[arg-type]  # protobuf's enums are numbers
            deliver_to=deliver_to,
            fingerprint=setting.fingerprint,
            dry_run=not deliver_to,
        )
        try:
            return await self._encodes.run(flight, lambda: self._call_vision(group.keys[0], request))
        except errors.InvalidRequest as error:
            raise _with_location(error, [images_by_key[key].location for key in group.keys]) from None

    async def _call_vision(self, key: str, request: pb.EncodeRequest) -> pb.EncodeReply:
        """Call the key's vision worker, or another one if that is unavailable or fails."""
        tried: list[VisionWorker] = []

        async def attempt(is_last: bool) -> pb.EncodeReply:
            worker = self._workers.vision.pick(key, exclude=tried)
            tried.append(worker)
            # only before a retry: one image on which every worker fails must not take all of them down
            mark_down = nullcontext() if is_last else worker.marking_down_if_gone()
            with worker.track_in_flight(), mark_down:
                self._metrics.encodes.inc()
                async with worker.giving_up_if_hung():
                    return await worker.client.encode(request, self._options.request_timeout)

        reply = await with_retry(attempt, self._may_encode_elsewhere)
        self._record(reply)
        return reply

    def _may_encode_elsewhere(self, error: errors.DvdError) -> bool:
        """Return whether another vision worker may succeed where one failed; a failure inside one needs another one."""
        if isinstance(error, errors.InternalError):
            return len(self._workers.vision.available()) > 1
        return isinstance(error, errors.WorkerUnavailable)

    def _record(self, reply: pb.EncodeReply) -> None:
        for image in reply.images:
            self._routes[image.key] = image
            if not reply.cached:
                self._metrics.image_tiles.observe(len(image.compressed))
                self._metrics.tiles.labels("full").inc(len(image.compressed) - sum(image.compressed))
                self._metrics.tiles.labels("compressed").inc(sum(image.compressed))
        while len(self._routes) > _MAX_REMEMBERED_ROUTES:
            self._routes.popitem(last=False)

    def _report(
        self,
        embedding_keys: Sequence[str],
        tokens: Sequence[int],
        cached: Mapping[str, bool],
        checkpoint: CheckpointDescription,
    ) -> ImageReport:
        """Report a request's images. `cached` maps each key that the sink lacked to whether the vision worker had it."""
        routes = [self._routes[key].compressed for key in embedding_keys if key in self._routes]
        outcomes, compressed = Counter(cached.get(key) for key in embedding_keys), sum(map(sum, routes))
        self._metrics.cache.labels("sink", "hits").inc(outcomes[None])
        self._metrics.cache.labels("sink", "misses").inc(len(embedding_keys) - outcomes[None])
        self._metrics.visual_tokens.inc(sum(tokens))
        self._metrics.saved_tokens.inc(compressed * (checkpoint.tokens_per_tile - checkpoint.compressed_tokens_per_tile))
        return ImageReport(
            images=len(embedding_keys),
            tiles=sum(map(len, routes)),
            compressed=compressed,
            tokens=sum(tokens),
            reused=outcomes[None],
            shared=outcomes[True],
            encoded=outcomes[False],
        )

    @contextmanager
    def _stage(self, name: str, stats: RequestStats) -> Iterator[None]:
        with self._metrics.stage(name, stats), self._trace.span(name):
            yield


def _images_by_key(
    embedding_keys: Sequence[str], images: Sequence[ImagePart], files: Sequence[ImageFile]
) -> dict[str, _KeyedImage]:
    result: dict[str, _KeyedImage] = {}
    locations: dict[bytes, str] = {}  # by digest: with --router-scope=request equal images have several keys
    for key, image, file in zip(embedding_keys, images, files, strict=True):
        location = locations.setdefault(file.digest, format_path(image.path))
        result.setdefault(key, _KeyedImage(file.data, location))
    return result


def _with_location(error: errors.InvalidRequest, locations: Sequence[str]) -> errors.InvalidRequest:
    """Return a vision worker's error about one image of a call with that image's place in the request."""
    match = _IMAGE_PARAM.fullmatch(error.param or "")
    if not match or int(match[1]) >= len(locations):
        return error
    return type(error)(str(error)).at(locations[int(match[1])])


def _check_equal_settings(images: Sequence[ImagePart], settings: Sequence[EncodeSetting]) -> None:
    for image, setting in zip(images, settings, strict=True):
        if setting != settings[0]:
            location = image.options.location
            raise errors.InvalidRequest(
                f"{location} has other options than the first image: with --router-scope=request all images of a request are "
                "routed as one group and must have equal detail, max_dynamic_patch and vir.",
                param=location,
            )
