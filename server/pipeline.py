"""The road of a request's images: bytes → keys → what the language worker lacks → encoded and delivered → the engine's body."""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field

from protos import vision_pb2 as pb
from server import keys
from server.media import Fetcher
from server.metrics import Metrics
from server.pool import Language, Vision, Workers
from server.requests import Chat
from wire import errors
from wire.config import Gateway
from wire.tasks import Flights, together
from wire.trace import Trace

_REMEMBERED = 20_000
_FETCHES = 8
_ASKING = 5.0
"""Seconds that a sink may take to say what it has."""


@dataclass(frozen=True)
class Loaded:
    """An image's file and its digest."""

    data: bytes
    digest: bytes


@dataclass
class Report:
    """What happened to a request's images."""

    images: int = 0
    tiles: int = 0
    compressed: int = 0
    tokens: int = 0
    reused: int = 0

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

    def __init__(self, options: Gateway, workers: Workers, fetcher: Fetcher, metrics: Metrics, trace: Trace) -> None:
        self._options, self._workers, self._fetcher, self._metrics = options, workers, fetcher, metrics
        self._trace = trace
        self._together = options.router_scope == "request"
        self._flights: Flights[list[pb.EncodedImage]] = Flights()
        self._routes: OrderedDict[str, pb.EncodedImage] = OrderedDict()  # for reports only: what the router did last time

    async def fetch(self, chat: Chat) -> list[Loaded]:
        """Each image; an equal URL is loaded once."""
        with self._stage("fetch"):
            urls = list(dict.fromkeys(chat.urls))
            loaded = dict(zip(urls, await self._load(urls), strict=True))
        self._metrics.images.inc(len(chat.urls))
        return [loaded[url] for url in chat.urls]

    async def _load(self, urls: Sequence[str]) -> list[Loaded]:
        """A few at a time, and not more bytes than a body may have."""
        slots, left = asyncio.Semaphore(_FETCHES), self._options.max_body_bytes

        async def one(url: str) -> Loaded:
            nonlocal left
            async with slots:
                data = await self._fetcher.load(url)
            left -= len(data)
            if left < 0:
                raise errors.ImageTooLarge(f"the images have more than {self._options.max_body_bytes} bytes together")
            # in a thread: a digest of megabytes would hold up everybody's streams
            return Loaded(data, await asyncio.to_thread(lambda: hashlib.sha256(data).digest()))

        return await together(*(one(url) for url in urls))

    async def prepare(
        self,
        chat: Chat,
        images: Sequence[Loaded],
        caller: bytes,
        held: AsyncExitStack,
        without: Collection[Language] = (),
    ) -> Prepared:
        """Choose a language worker, which is the caller's until `held` closes, and see that it has every embedding.

        Raises `Unavailable` and what encoding raises.
        """
        digests = [image.digest for image in images]
        language = self._workers.language.pick(keys.digest(caller, digests[0]).hex() if digests else None, without)
        held.enter_context(language.held())
        if not images:
            return Prepared(language, chat.replaced([], []))
        assert language.said is not None
        if mismatch := self._workers.mismatch():
            raise errors.CheckpointMismatch(mismatch.in_short)
        setting = keys.Setting(language.said.checkpoint.fingerprint, pb.Tiling(), chat.router, language.said.dtype)
        names = (keys.keys_together if self._together else keys.keys_alone)(caller, setting, digests)
        there = dict(zip(names, await self._has(language, names), strict=True))
        missing = [[*dict.fromkeys(names)]] if self._together else [[name] for name in dict.fromkeys(names)]
        missing = [group for group in missing if not all(there[name] for name in group)]
        content = {name: image.data for name, image in zip(names, images, strict=True)}
        with self._stage("encode"):
            try:
                encoded = await together(*(self._encode(group, content, setting, language) for group in missing))
            except errors.SinkUnavailable:
                language.said = None  # until it answers the next probe
                raise
        there |= {image.key: image.tokens for group in encoded for image in group}
        tokens = [there[name] for name in names]
        lacked = {name for group in missing for name in group}
        return Prepared(language, chat.replaced(names, tokens), names, self._report(names, tokens, lacked))

    async def _has(self, language: Language, names: Sequence[str]) -> list[int]:
        try:
            return await language.client.has(names, _ASKING)
        except (errors.Unavailable, errors.DeadlineExceeded):
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

    async def _encode(
        self, names: Sequence[str], content: dict[str, bytes], setting: keys.Setting, language: Language
    ) -> list[pb.EncodedImage]:
        flight = keys.digest(language.client.address.encode(), *(name.encode() for name in names)).hex()
        self._metrics.joined.inc(len(names) * self._flights.under_way(flight))
        request = pb.EncodeRequest(
            images=[pb.Image(key=name, data=content[name]) for name in names],
            tiling=setting.tiling,
            router=setting.router,
            dtype=setting.dtype,  # type: ignore[arg-type]  # a number is what enums are on the wire
            deliver_to=language.client.address,
            fingerprint=setting.fingerprint,
        )
        return await self._flights.run(flight, lambda: self._encode_somewhere(names[0], request))

    async def _encode_somewhere(self, key: str, request: pb.EncodeRequest) -> list[pb.EncodedImage]:
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
            return list(reply.images)

    def _remember(self, reply: pb.EncodeReply) -> None:
        for image in reply.images:
            self._routes[image.key] = image
            self._metrics.tiles.labels("full").inc(len(image.compressed) - sum(image.compressed))
            self._metrics.tiles.labels("compressed").inc(sum(image.compressed))
        while len(self._routes) > _REMEMBERED:
            self._routes.popitem(last=False)

    def _report(self, names: Sequence[str], tokens: Sequence[int], lacked: Collection[str]) -> Report:
        routes = [self._routes[name].compressed for name in names if name in self._routes]
        reused = sum(name not in lacked for name in names)
        self._metrics.reused.inc(reused)
        self._metrics.visual_tokens.inc(sum(tokens))
        return Report(len(names), sum(map(len, routes)), sum(map(sum, routes)), sum(tokens), reused)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        ended = time.monotonic()
        self._metrics.stages.labels(name).observe(ended - began)
        self._trace.record(name, began, ended)


@contextmanager
def counted(worker: Vision | Language) -> Iterator[None]:
    """A request that the worker is busy with."""
    worker.outstanding += 1
    try:
        with worker.held():
            yield
    finally:
        worker.outstanding -= 1
