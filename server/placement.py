"""Placement of embeddings: every embedding that a request needs is delivered to the sink of its language worker.

The keys are computed, the sink is asked which of them it lacks, and vision workers encode and deliver those.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

from common import errors
from common.digest import digest
from common.grants import NO_GRANTS, GrantSigner
from common.tasks import gather_or_cancel
from common.tracing import Trace
from protos import vision_pb2 as pb
from protos.embeddings_pb2 import CheckpointDescription, LanguageDescription
from server.apis.request import ImagePart, ParsedRequest, format_path
from server.config import GatewayOptions
from server.degradation import Degradation, Degraded
from server.encode_calls import EncodeCalls, EncodeGroup, KeyedImage, Sink
from server.encoding import Encoding
from server.keys import EncodeSetting, group_keys, image_keys
from server.media.image_file import ImageFile
from server.metrics import Metrics
from server.request_context import RequestContext
from server.request_stats import RequestStats
from server.retry import RetryBudget
from server.token_counts import fixed_tokens_per_tile, tile_count
from server.vision_queue import VisionQueue
from server.workers.probes import WorkerPools
from server.workers.worker import LanguageWorker

log = logging.getLogger(__name__)

_LOOKUP_TIMEOUT_SECONDS = 5.0
"""Time that a sink may take to answer which embeddings it has."""
_MAX_EXPECT_SECONDS = 86_400.0
"""Longest time for which a sink expects embeddings; without --request-timeout it would be infinite."""


@dataclass(frozen=True)
class _Keys:
    """A key for each image of a request, the Encode calls that produce all of them, and what degradation changed."""

    by_image: list[str]
    groups: list[EncodeGroup]
    degraded: Degraded | None


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
    """A request for vLLM: its language worker, whose sink has or gets all the embeddings, and its body.

    Attributes:
        language: The language worker.
        body: The body for vLLM.
        keys: Key of each image.
        image_tokens: Visual tokens of all images.
        report: What happened to the images; None until all are encoded.
        degraded: What degradation changed.
    """

    language: LanguageWorker
    body: bytes
    keys: list[str] = field(default_factory=list)
    image_tokens: int = 0
    report: ImageReport | None = None
    degraded: Degraded | None = None
    _encoding: Encoding[ImageReport] | None = None
    _first_is_ready: asyncio.Event | None = None

    def encoding(self) -> AbstractAsyncContextManager[None]:
        """Return the block in which the request must be served: it raises the error of an image that is still encoded."""
        return self._encoding.supervise() if self._encoding else nullcontext()

    async def wait_until_useful(self) -> None:
        """Wait until vLLM could prefill an image."""
        if self._first_is_ready:
            await self._first_is_ready.wait()

    async def wait_until_encoded(self) -> None:
        """Wait until all images are encoded, and `report` is known."""
        if self._encoding:
            self.report = await self._encoding.result()

    def headers(self) -> dict[str, str]:
        """Return the headers of the response that tell what happened to the images, as far as it is known."""
        images = {"X-DvD-Images": self.report.header()} if self.report else {}
        degraded = {"X-DvD-Degraded": self.degraded.header()} if self.degraded else {}
        return {**images, **degraded}


@dataclass(frozen=True)
class _Placing:
    """What is known of a request when its missing embeddings begin to be encoded.

    Attributes:
        keys: Its keys.
        missing: The groups that the sink lacks, at least in part.
        tiles: Number of tiles by key, of the images of `missing`.
        images: Image files by key.
        stored_tokens: Visual tokens by key that the sink has, 0 for none.
        language: The language worker.
        description: Its description.
        context: The context of the request.
    """

    keys: _Keys
    missing: list[EncodeGroup]
    tiles: Mapping[str, int]
    images: Mapping[str, KeyedImage]
    stored_tokens: Mapping[str, int]
    language: LanguageWorker
    description: LanguageDescription
    context: RequestContext

    def counted_tokens(self) -> list[int] | None:
        """Return the visual tokens of each image as counted before it is encoded.

        None if the router decides about one, or if nothing is left to encode once the first image is there.
        """
        if all(self.keys.by_image[0] in group.keys for group in self.missing):
            return None
        counts = dict(self.stored_tokens)
        for group in self.missing:
            per_tile = fixed_tokens_per_tile(group.setting.router, self.description.checkpoint)
            if per_tile is None:
                return None
            counts |= {key: self.tiles[key] * per_tile for key in group.keys}
        return [counts[key] for key in self.keys.by_image]


class EmbeddingPlacer:
    """Places embeddings: computes their keys, looks them up, and has the missing ones encoded."""

    def __init__(
        self,
        options: GatewayOptions,
        workers: WorkerPools,
        queue: VisionQueue,
        budget: RetryBudget,
        metrics: Metrics,
        trace: Trace,
        grants: GrantSigner = NO_GRANTS,
    ) -> None:
        self._options, self._workers, self._queue, self._metrics, self._trace = options, workers, queue, metrics, trace
        self._route_per_request = options.router_scope == "request"
        self._encodes = EncodeCalls(options, workers.vision, queue, budget, metrics, grants)
        self._degradation = Degradation(options, metrics)

    async def place(
        self,
        request: ParsedRequest,
        files: Sequence[ImageFile],
        context: RequestContext,
        exclude: list[LanguageWorker],
        *,
        is_retry: bool = False,
    ) -> EngineRequest:
        """Choose a language worker, and deliver to its sink the embeddings that it lacks.

        With `--early-prefill` a request whose visual tokens can be counted is returned at once, unless it is a retry; its
        images are encoded in the block of `EngineRequest.encoding`. The language worker stays in use until
        `context.resources` closes.

        Args:
            request: The request.
            files: Its image files.
            context: Its context.
            exclude: Language workers that must not be chosen; one whose sink is full is added.
            is_retry: Whether the request has been admitted by an earlier call.

        Raises:
            Unavailable: No worker can serve the request now.
            Overloaded: The images would wait too long.
            DvdError: Encoding failed.
        """
        if not files:
            language = self._workers.language.pick(None, exclude)
            context.resources.enter_context(language.in_use())
            return EngineRequest(language, request.with_embeddings([], [], context.cache_salt))
        language, description = self.choose_language(files, context, exclude)
        context.resources.enter_context(language.in_use())
        keys = self._keys(request.images, files, context, description)
        with self._stage("lookup", context.stats):
            stored_tokens = dict(zip(keys.by_image, await self._lookup(language, keys.by_image, context), strict=True))
        missing = [group for group in keys.groups if not all(stored_tokens[key] for key in group.keys)]
        images = _images_by_key(keys.by_image, request.images, files)
        tiles = _count_tiles(missing, images, description.checkpoint)
        if missing and not is_retry:
            self._queue.admit(context.flow, sum(tiles.values()), context.deadline)
        placing = _Placing(keys, missing, tiles, images, stored_tokens, language, description, context)
        counted = placing.counted_tokens() if self._options.early_prefill and not is_retry else None
        if counted is None:
            tokens, report = await self._encode_missing(placing, exclude)
            body = request.with_embeddings(keys.by_image, tokens, context.cache_salt)
            return EngineRequest(language, body, keys.by_image, sum(tokens), report, keys.degraded)
        body = request.with_embeddings(keys.by_image, counted, context.cache_salt)
        first_is_ready = asyncio.Event()
        encoding = Encoding(self._encode_as_counted(placing, exclude, counted, first_is_ready))
        return EngineRequest(
            language, body, keys.by_image, sum(counted), None, keys.degraded, encoding, first_is_ready
        )  # fmt: skip

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
        keys = self._keys(request.images, files, context, description)
        images = _images_by_key(keys.by_image, request.images, files)
        routes = {key: route for key in keys.by_image if (route := self._encodes.route(key))}
        missing = [group for group in keys.groups if not all(key in routes for key in group.keys)]
        tiles = _count_tiles(missing, images, description.checkpoint)
        self._queue.admit(context.flow, sum(tiles.values()), context.deadline)
        with self._stage("vision", context.stats):
            replies = await gather_or_cancel(
                *(self._encodes.encode(group, images, description.checkpoint, _tiles_of(group, tiles), None, context)
                  for group in missing)
            )  # fmt: skip
        routes |= {image.key: image for reply in replies for image in reply.images}
        return [routes[key] for key in keys.by_image]

    def choose_language(
        self, files: Sequence[ImageFile], context: RequestContext, exclude: Collection[LanguageWorker] = ()
    ) -> tuple[LanguageWorker, LanguageDescription]:
        """Return the language worker for these images and its description. Raises `Unavailable`, `CheckpointMismatch`."""
        key = digest(context.caller, files[0].digest).hex() if files else None
        if mismatch := self._workers.mismatch():
            raise errors.CheckpointMismatch(mismatch.summary)
        language = self._workers.language.pick(key, [*exclude, *self._workers.unpaired()])
        assert language.description is not None
        return language, language.description

    def _keys(
        self,
        images: Sequence[ImagePart],
        files: Sequence[ImageFile],
        context: RequestContext,
        description: LanguageDescription,
    ) -> _Keys:
        """Return the keys of all images, and the Encode calls that produce their embeddings."""
        self._degradation.update(self._queue.total_wait_seconds)
        checkpoint, dtype, max_tiles = description.checkpoint, description.dtype, self._options.max_tiles
        wanted = [
            EncodeSetting(checkpoint.fingerprint, image.options.tiling(checkpoint, max_tiles), image.options.router, dtype)
            for image in images
        ]
        applied = [self._degradation.apply(setting, checkpoint) for setting in wanted]
        settings = [setting for setting, _ in applied]
        degraded = next((change for _, change in applied if change), None)
        digests = [file.digest for file in files]
        if not self._route_per_request or not images:
            keys = image_keys(context.caller, settings, digests)
            distinct = dict(zip(keys, settings, strict=True))
            return _Keys(keys, [EncodeGroup([key], setting) for key, setting in distinct.items()], degraded)
        _check_equal_settings(images, wanted)
        keys = group_keys(context.caller, settings[0], digests)
        return _Keys(keys, [EncodeGroup(keys, settings[0])], degraded)

    async def _lookup(self, language: LanguageWorker, embedding_keys: Sequence[str], context: RequestContext) -> list[int]:
        """Return the number of visual tokens that the sink has under each key, 0 for none.

        What is missing is expected there until the deadline of the request.
        """
        left = min(max(context.deadline - time.monotonic(), 0.0), _MAX_EXPECT_SECONDS)
        try:
            return await language.client.has(embedding_keys, _LOOKUP_TIMEOUT_SECONDS, expect_seconds=left)
        except (errors.Unavailable, errors.DeadlineExceeded) as error:
            self._metrics.cache.labels("sink", "errors").inc()
            if isinstance(error, errors.Unavailable):  # a late one may only be busy: the probes decide
                language.mark_down(f"its sink did not answer a lookup: {error}")
            raise errors.WorkerUnavailable("The language worker does not answer; retry later.", retry_after=1) from None

    async def _encode_as_counted(
        self, placing: _Placing, exclude: list[LanguageWorker], counted: list[int], first_is_ready: asyncio.Event
    ) -> ImageReport:
        """Encode the missing images of a request that vLLM gets with these numbers of visual tokens.

        Raises:
            EmbeddingLost: An image has another number of visual tokens, so that vLLM rejects its embedding.
        """
        tokens, report = await self._encode_missing(placing, exclude, first_is_ready)
        if tokens != counted:
            log.warning("images have %s visual tokens, but %s were counted from their headers", tokens, counted)
            raise errors.EmbeddingLost("The visual tokens of an image were counted wrong; retry.")
        return report

    async def _encode_missing(
        self, placing: _Placing, exclude: list[LanguageWorker], first_is_ready: asyncio.Event | None = None
    ) -> tuple[list[int], ImageReport]:
        """Encode and deliver what the sink lacks. Returns the visual tokens of each image, and what happened to them."""
        keys, stats = placing.keys, placing.context.stats
        try:
            replies = await self._encode_groups(placing, first_is_ready or asyncio.Event()) if placing.missing else []
        except errors.SinkFull:
            exclude.append(placing.language)
            raise
        for reply in replies:
            stats.add_vision_timings(reply.timings)
        tokens_by_key = {**placing.stored_tokens, **{image.key: image.tokens for reply in replies for image in reply.images}}
        tokens = [tokens_by_key[key] for key in keys.by_image]
        cached = {image.key: reply.cached for reply in replies for image in reply.images}
        return tokens, self._report(keys.by_image, tokens, cached, placing.description.checkpoint)

    async def _encode_groups(self, placing: _Placing, first_is_ready: asyncio.Event) -> list[pb.EncodeReply]:
        """Encode the missing groups. Sets `first_is_ready` as soon as the sink has the first image of the prompt."""
        language, checkpoint, first_key = placing.language, placing.description.checkpoint, placing.keys.by_image[0]
        sink = Sink(language.address, placing.description.sink)
        if placing.stored_tokens[first_key]:
            first_is_ready.set()

        async def encode(group: EncodeGroup) -> pb.EncodeReply:
            tiles = _tiles_of(group, placing.tiles)
            reply = await self._encodes.encode(group, placing.images, checkpoint, tiles, sink, placing.context)
            if first_key in group.keys:
                first_is_ready.set()
            return reply

        with self._stage("vision", placing.context.stats):
            try:
                async with language.giving_up_if_hung():  # else a delivery to a sink that hangs lasts until the deadline
                    return await gather_or_cancel(*map(encode, placing.missing))
            except errors.SinkUnavailable as error:
                language.mark_down(f"a vision worker could not deliver to its sink: {error}")
                raise

    def _report(
        self,
        embedding_keys: Sequence[str],
        tokens: Sequence[int],
        cached: Mapping[str, bool],
        checkpoint: CheckpointDescription,
    ) -> ImageReport:
        """Report a request's images. `cached` maps each key that the sink lacked to whether the vision worker had it."""
        routes = [route.compressed for key in embedding_keys if (route := self._encodes.route(key))]
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
) -> dict[str, KeyedImage]:
    result: dict[str, KeyedImage] = {}
    locations: dict[bytes, str] = {}  # by digest: with --router-scope=request equal images have several keys
    for key, image, file in zip(embedding_keys, images, files, strict=True):
        location = locations.setdefault(file.digest, format_path(image.path))
        result.setdefault(key, KeyedImage(file.data, file.size, location))
    return result


def _count_tiles(
    groups: Sequence[EncodeGroup], images: Mapping[str, KeyedImage], checkpoint: CheckpointDescription
) -> dict[str, int]:
    """Return the number of tiles of each image, by key."""
    return {key: tile_count(images[key].size, group.setting.tiling, checkpoint) for group in groups for key in group.keys}


def _tiles_of(group: EncodeGroup, tiles: Mapping[str, int]) -> int:
    return sum(tiles[key] for key in group.keys)


def _check_equal_settings(images: Sequence[ImagePart], settings: Sequence[EncodeSetting]) -> None:
    for image, setting in zip(images, settings, strict=True):
        if setting != settings[0]:
            location = image.options.location
            raise errors.InvalidRequest(
                f"{location} has other options than the first image: with --router-scope=request all images of a request are "
                "routed as one group and must have equal detail, max_dynamic_patch and vir.",
                param=location,
            )
