"""The road of a request's images: bytes → keys → what the language worker lacks → encoded and delivered → the engine's body."""

import asyncio
import hashlib
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from common import errors
from common.tasks import SingleFlight, gather_or_cancel
from common.tracing import Trace
from protos import embeddings_pb2
from protos import vision_pb2 as pb
from protos.embeddings_pb2 import CheckpointDescription
from server import keys
from server.apis.request import Asked, Image
from server.config import GatewayOptions
from server.media.fetch import Fetcher
from server.metrics import Metrics
from server.request_stats import Account, Caller
from server.workers.pool import Language, Vision, Workers

_REMEMBERED = 20_000
_FETCHES = 8
_ASKING = 5.0
"""Seconds that a sink may take to say what it has."""


@dataclass(frozen=True)
class Loaded:
    """An image's file and its digest."""

    data: bytes
    digest: bytes


@dataclass(frozen=True)
class Group:
    """Images that are encoded by one call: their keys, and the setting of them all."""

    names: list[str]
    setting: keys.Setting


@dataclass
class Report:
    """What happened to a request's images. Each one's embedding was the sink's already (`reused`), in the vision worker's
    cache (`shared`), or had to be made (`encoded`)."""

    images: int = 0
    tiles: int = 0
    compressed: int = 0
    tokens: int = 0
    reused: int = 0
    shared: int = 0
    encoded: int = 0

    def header(self) -> str:
        return "; ".join(f"{name}={value}" for name, value in vars(self).items())


@dataclass
class Prepared:
    """A request ready for the engine; `language` has all its embeddings."""

    language: Language
    body: bytes
    names: list[str] = field(default_factory=list)
    report: Report = field(default_factory=Report)


class Pipeline:
    """Owner of the encodes in flight."""

    def __init__(self, options: GatewayOptions, workers: Workers, fetcher: Fetcher, metrics: Metrics, trace: Trace) -> None:
        self._options, self._workers, self._fetcher, self._metrics = options, workers, fetcher, metrics
        self._trace = trace
        self._together = options.router_scope == "request"
        self._flights: SingleFlight[pb.EncodeReply] = SingleFlight()
        self._routes: OrderedDict[str, pb.EncodedImage] = OrderedDict()  # for reports only: what the router did last time

    async def fetch(self, asked: Asked, caller: Caller) -> tuple[Asked, list[Loaded]]:
        """Each image's file, and the request with the frames of its videos as images. An equal URL is loaded once."""
        with self._stage("fetch", caller.account):
            wanted = list(dict.fromkeys((image.url, image.frames) for image in asked.images))
            loaded = dict(zip(wanted, await self._load(wanted), strict=True))
        files = [loaded[image.url, image.frames] for image in asked.images]
        images = [shown for image, those in zip(asked.images, files, strict=True) for shown in _shown(image, len(those))]
        self._metrics.images.inc(len(images))
        return replace(asked, images=images), [file for those in files for file in those]

    async def _load(self, wanted: Sequence[tuple[str, int]]) -> list[list[Loaded]]:
        """Of each URL its image, or so many frames of its video. A few at a time, and not more bytes than a body may have."""
        slots, left = asyncio.Semaphore(_FETCHES), self._options.max_body_bytes

        async def one(url: str, frames: int) -> list[Loaded]:
            nonlocal left
            async with slots:
                files = await self._fetcher.load_frames(url, frames) if frames else [await self._fetcher.load(url)]
            left -= sum(map(len, files))
            if left < 0:
                raise errors.ImageTooLarge(f"the images have more than {self._options.max_body_bytes} bytes together")
            # in a thread: a digest of megabytes would hold up everybody's streams
            return await asyncio.to_thread(lambda: [Loaded(file, hashlib.sha256(file).digest()) for file in files])

        return await gather_or_cancel(*(one(url, frames) for url, frames in wanted))

    async def prepare(
        self, asked: Asked, images: Sequence[Loaded], caller: Caller, without: Collection[Language] = ()
    ) -> Prepared:
        """Choose a language worker, the caller's until its `held` closes, and see that it has every embedding.

        Raises `Unavailable` and what encoding raises.
        """
        if not images:
            language = self._workers.language.pick(None, without)
            caller.held.enter_context(language.held())
            return Prepared(language, asked.replaced([], []))
        language, said = self.choose(images, caller, without)
        caller.held.enter_context(language.held())
        names, groups = self._named(asked.images, images, caller, said)
        with self._stage("lookup", caller.account):
            there = dict(zip(names, await self._has(language, names), strict=True))
        missing = [group for group in groups if not all(there[name] for name in group.names)]
        content = {name: image.data for name, image in zip(names, images, strict=True)}
        replies = await self._encoded(missing, content, language, caller.account) if missing else []
        for reply in replies:
            caller.account.encoded(reply.timings)
        there |= {image.key: image.tokens for reply in replies for image in reply.images}
        tokens = [there[name] for name in names]
        cached = {image.key: reply.cached for reply in replies for image in reply.images}
        report = self._report(names, tokens, cached, said.checkpoint)
        return Prepared(language, asked.replaced(names, tokens), names, report)

    async def _encoded(
        self, groups: Sequence[Group], content: dict[str, bytes], language: Language, account: Account
    ) -> list[pb.EncodeReply]:
        with self._stage("vision", account):
            try:
                return await gather_or_cancel(*(self._encode(group, content, language.client.address) for group in groups))
            except errors.SinkUnavailable:
                language.said = None  # until it answers the next probe
                raise

    async def route(self, asked: Asked, images: Sequence[Loaded], caller: Caller) -> list[pb.EncodedImage]:
        """What the router does with each image; nothing is delivered, and a request that follows finds the work done."""
        _, said = self.choose(images, caller)
        names, groups = self._named(asked.images, images, caller, said)
        content = {name: image.data for name, image in zip(names, images, strict=True)}
        routes = {name: self._routes[name] for name in names if name in self._routes}
        missing = [group for group in groups if not all(name in routes for name in group.names)]
        with self._stage("vision", caller.account):
            replies = await gather_or_cancel(*(self._encode(group, content, "") for group in missing))
        routes |= {image.key: image for reply in replies for image in reply.images}
        return [routes[name] for name in names]

    def choose(
        self, images: Sequence[Loaded], caller: Caller, without: Collection[Language] = ()
    ) -> tuple[Language, embeddings_pb2.LanguageDescription]:
        """The language worker for these images, and what it says. Raises `Unavailable`, `CheckpointMismatch`."""
        key = keys.digest(caller.digest, images[0].digest).hex() if images else None
        language = self._workers.language.pick(key, without)
        assert language.said is not None
        if mismatch := self._workers.mismatch():
            raise errors.CheckpointMismatch(mismatch.in_short)
        return language, language.said

    def _named(
        self, asked: Sequence[Image], images: Sequence[Loaded], caller: Caller, said: embeddings_pb2.LanguageDescription
    ) -> tuple[list[str], list[Group]]:
        """A key for each image, and the calls that make what is under the keys."""
        own, dtype, most = said.checkpoint, said.dtype, self._options.max_tiles
        settings = [keys.Setting(own.fingerprint, one.dial.tiling(own, most), one.dial.router, dtype) for one in asked]
        digests = [image.digest for image in images]
        if not self._together or not asked:
            names = keys.keys_alone(caller.digest, settings, digests)
            return names, [Group([name], setting) for name, setting in dict(zip(names, settings, strict=True)).items()]
        for one, setting in zip(asked, settings, strict=True):
            if setting != settings[0]:
                raise errors.InvalidRequest(
                    f"{one.dial.where} is set in another way than the first image: this server routes all images of a "
                    "request as one group, with one setting of detail, max_dynamic_patch and vir",
                    param=one.dial.where,
                )
        names = keys.keys_together(caller.digest, settings[0], digests)
        return names, [Group(names, settings[0])]

    async def _has(self, language: Language, names: Sequence[str]) -> list[int]:
        try:
            return await language.client.has(names, _ASKING)
        except (errors.Unavailable, errors.DeadlineExceeded):
            self._metrics.cache.labels("sink", "errors").inc()
            language.said = None  # until it answers the next probe
            raise errors.Unavailable("the language worker does not answer; try again", retry_after=1) from None

    async def lost(self, prepared: Prepared) -> bool:
        """Whether an embedding of a request that failed is no longer with its language worker."""
        if not prepared.names:
            return False
        try:
            return not all(await prepared.language.client.has(prepared.names, _ASKING))
        except errors.DvdError:
            return False

    async def _encode(self, group: Group, content: dict[str, bytes], deliver_to: str) -> pb.EncodeReply:
        """Without an address to deliver to, a dry run."""
        names, setting = group.names, group.setting
        flight = keys.digest(deliver_to.encode(), *(name.encode() for name in names)).hex()
        self._metrics.joined.inc(len(names) * self._flights.in_flight(flight))
        request = pb.EncodeRequest(
            images=[pb.Image(key=name, data=content[name]) for name in names],
            tiling=setting.tiling,
            router=setting.router,
            dtype=setting.dtype,  # type: ignore[arg-type]  # a number is what enums are on the wire
            deliver_to=deliver_to,
            fingerprint=setting.fingerprint,
            dry_run=not deliver_to,
        )
        return await self._flights.run(flight, lambda: self._encode_somewhere(names[0], request))

    async def _encode_somewhere(self, key: str, request: pb.EncodeRequest) -> pb.EncodeReply:
        """By the key's vision worker, or by another one where that is gone."""
        tried: list[Vision] = []
        while True:
            worker = self._workers.vision.pick(key, without=tried)
            tried.append(worker)
            try:
                with counted(worker):
                    self._metrics.encodes.inc()
                    reply = await worker.client.encode(request, self._options.request_timeout)
            except errors.Unavailable as error:
                if type(error) is not errors.Unavailable or len(tried) == 2:
                    raise
                worker.said = None  # until it answers the next probe
                continue
            self._remember(reply)
            return reply

    def _remember(self, reply: pb.EncodeReply) -> None:
        for image in reply.images:
            self._routes[image.key] = image
            if not reply.cached:
                self._metrics.image_tiles.observe(len(image.compressed))
                self._metrics.tiles.labels("full").inc(len(image.compressed) - sum(image.compressed))
                self._metrics.tiles.labels("compressed").inc(sum(image.compressed))
        while len(self._routes) > _REMEMBERED:
            self._routes.popitem(last=False)

    def _report(
        self, names: Sequence[str], tokens: Sequence[int], cached: Mapping[str, bool], checkpoint: CheckpointDescription
    ) -> Report:
        """`cached` has what the sink lacked: whether the vision worker had it."""
        routes = [self._routes[name].compressed for name in names if name in self._routes]
        outcomes, compressed = Counter(cached.get(name) for name in names), sum(map(sum, routes))
        self._metrics.cache.labels("sink", "hits").inc(outcomes[None])
        self._metrics.cache.labels("sink", "misses").inc(len(names) - outcomes[None])
        self._metrics.visual_tokens.inc(sum(tokens))
        self._metrics.saved_tokens.inc(compressed * (checkpoint.tokens_per_tile - checkpoint.compressed_tokens_per_tile))
        return Report(
            images=len(names),
            tiles=sum(map(len, routes)),
            compressed=compressed,
            tokens=sum(tokens),
            reused=outcomes[None],
            shared=outcomes[True],
            encoded=outcomes[False],
        )

    @contextmanager
    def _stage(self, name: str, account: Account) -> Iterator[None]:
        with self._metrics.stage(name, account), self._trace.span(name):
            yield


def _shown(image: Image, files: int) -> list[Image]:
    """An image as it is; a video as its frames, named as InternVL is taught to read them."""
    if not image.frames:
        return [image]
    return [replace(image, frames=0, label=f"Frame{number}: ") for number in range(1, files + 1)]


@contextmanager
def counted(worker: Vision | Language) -> Iterator[None]:
    """A request that the worker is busy with."""
    worker.outstanding += 1
    try:
        with worker.held():
            yield
    finally:
        worker.outstanding -= 1
