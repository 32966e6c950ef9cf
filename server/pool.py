"""Which workers there are, which of them answer, and which one gets a request."""

import asyncio
import hashlib
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from protos import embeddings_pb2 as pb
from protos import vision_pb2
from server.clients import LanguageClient, VisionClient
from server.metrics import Metrics
from wire import errors

log = logging.getLogger(__name__)

POLL_EVERY = 1.0
PROBE_TIMEOUT = 2.0
_SLACK = 4
"""Requests that a worker may have beyond twice those of the least busy one before its keys go elsewhere."""

_COMPARED = ("fingerprint", "width", "tile_size", "tokens_per_tile", "compressed_tokens_per_tile",
             "relative_threshold", "absolute_threshold")  # fmt: skip


@dataclass(eq=False)
class Vision:
    """A vision worker; `said` is None while it does not answer."""

    client: VisionClient
    said: vision_pb2.VisionDescription | None = None
    outstanding: int = 0
    strikes: int = 0


@dataclass(eq=False)
class Language:
    """A language worker; `said` is None while its sink or vLLM does not answer."""

    client: LanguageClient
    said: pb.LanguageDescription | None = None
    models: list[str] = field(default_factory=list)
    outstanding: int = 0
    strikes: int = 0


W = TypeVar("W", Vision, Language)


class Pool(Generic[W]):
    """A fixed list of workers of one kind."""

    def __init__(self, members: Sequence[W], absent: str) -> None:
        self.members: Sequence[W] = members
        self._absent = absent

    def up(self) -> list[W]:
        return [worker for worker in self.members if worker.said is not None]

    def pick(self, key: str | None, without: Collection[W] = ()) -> W:
        """The worker for a key, the least loaded for None. Raises `Unavailable`.

        Rendezvous hashing sends a key to the same worker as long as that is there and not far busier than the others, so
        that what it has in its caches is found again.
        """
        there = [worker for worker in self.up() if worker not in without]
        if not there:
            raise errors.Unavailable(self._absent, retry_after=1)
        if key is None:
            return min(there, key=lambda worker: worker.outstanding)
        ranked = sorted(there, key=lambda worker: _weight(worker.client.address, key), reverse=True)
        least = min(ranked, key=lambda worker: worker.outstanding)
        return next(worker for worker in ranked if worker.outstanding <= 2 * least.outstanding + _SLACK)


def _silent(worker: Vision | Language, error: errors.DvdError) -> bool:
    """A worker that is late once may only be busy; one that is late twice, or not there, gets nothing more."""
    worker.strikes += 1
    if worker.strikes > 1 or not isinstance(error, errors.DeadlineExceeded):
        worker.said = None
    return False


def _weight(address: str, key: str) -> bytes:
    return hashlib.blake2b(f"{address} {key}".encode(), digest_size=8).digest()


class Workers:
    """Both pools, and the task that asks their members whether they are there. Make it inside the event loop."""

    def __init__(self, vision: Sequence[str], language: Sequence[str], metrics: Metrics) -> None:
        self.vision = Pool([Vision(VisionClient(a)) for a in vision], "no vision worker is there: image requests must wait")
        self.language = Pool([Language(LanguageClient(a)) for a in language], "no language worker is there; try again")
        self._metrics = metrics
        self._complained: str | None = None
        self._polling = asyncio.create_task(self._poll())

    async def close(self) -> None:
        self._polling.cancel()
        clients: list[VisionClient | LanguageClient] = [
            *(w.client for w in self.vision.members),
            *(w.client for w in self.language.members),
        ]
        for client in clients:
            await client.close()

    async def probe(self) -> tuple[bool, bool]:
        """Ask every worker now, at most some `PROBE_TIMEOUT` seconds: whether any vision and any language worker answered."""
        vision = await asyncio.gather(*(self._probe_vision(worker) for worker in self.vision.members))
        language = await asyncio.gather(*(self._probe_language(worker) for worker in self.language.members))
        self._gauge("vision", [worker.said is not None for worker in self.vision.members])
        self._gauge("language", [worker.said is not None for worker in self.language.members])
        return any(vision), any(language)

    def _gauge(self, kind: str, answering: Sequence[bool]) -> None:
        for index, up in enumerate(answering):
            self._metrics.workers.labels(kind, index).set(up)

    async def _poll(self) -> None:
        while True:
            try:
                await self.probe()
                self._complain(self.mismatch())
            except Exception:
                log.exception("asking the workers failed")
            await asyncio.sleep(POLL_EVERY)

    async def _probe_vision(self, worker: Vision) -> bool:
        try:
            worker.said = await worker.client.describe(PROBE_TIMEOUT)
        except errors.DvdError as error:
            return _silent(worker, error)
        worker.strikes = 0
        return True

    async def _probe_language(self, worker: Language) -> bool:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT):
                said = await worker.client.describe(PROBE_TIMEOUT)
                await worker.client.get("/health", PROBE_TIMEOUT)
                listed = await worker.client.get("/v1/models", PROBE_TIMEOUT)
            worker.models = [model["id"] for model in listed["data"]]
        except TimeoutError:
            return _silent(worker, errors.DeadlineExceeded("no answer in time"))
        except (LookupError, TypeError):
            return _silent(worker, errors.Unavailable("no list of models"))
        except errors.DvdError as error:
            return _silent(worker, error)
        worker.said, worker.strikes = said, 0
        return True

    def _complain(self, mismatch: str | None) -> None:
        if mismatch and mismatch != self._complained:
            log.error("%s", mismatch)
        self._complained = mismatch

    def mismatch(self) -> str | None:
        """What two workers that are there do not agree in, both values named; None where they agree."""
        language = self.language.up()
        said = [w.said.checkpoint for w in self.vision.up() if w.said] + [w.said.checkpoint for w in language if w.said]
        for other in said[1:]:
            for name in _COMPARED:
                mine, theirs = getattr(said[0], name), getattr(other, name)
                if mine != theirs:
                    return f"workers serve different checkpoints: {name} {mine} and {theirs}; start all from the same one"
        return None
