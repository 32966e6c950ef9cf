"""Which workers there are, which of them answer, and which one gets a request."""

import asyncio
import functools
import hashlib
import logging
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from common import errors, messages
from common.tasks import SingleFlight
from protos import embeddings_pb2 as pb
from protos import vision_pb2
from server.metrics import Load, Metrics, Worker
from server.workers import discovery
from server.workers.clients import LanguageClient, VisionClient

log = logging.getLogger(__name__)

POLL_EVERY = 1.0
PROBE_TIMEOUT = 2.0
_SLACK = 4
"""Requests that a worker may have beyond twice those of the least busy one before its keys go elsewhere."""

_COMPARED = ("fingerprint", "width", "tile_size", "tokens_per_tile", "compressed_tokens_per_tile", "min_tiles", "max_tiles",
             "thumbnail", "relative_threshold", "absolute_threshold")  # fmt: skip
_DELIVERED = [number for number in pb.Dtype.values() if number != pb.DTYPE_UNSPECIFIED]
"""What a language worker may compute in: a vision worker casts to each of them."""

_NAMED = 4
"""Workers that a complaint names of each side."""


@dataclass(frozen=True)
class Mismatch:
    """What workers do not agree in, both values named: for a caller, and with the workers' addresses for the operator."""

    in_short: str
    in_full: str


@dataclass(eq=False, kw_only=True)
class _Worker:
    """What is known of a worker beside what it says of itself."""

    outstanding: int = 0
    strikes: int = 0
    users: int = 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Its client stays open meanwhile, also where the worker is no longer one of ours."""
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1


@dataclass(eq=False)
class Vision(_Worker):
    """A vision worker; `said` is None while it does not answer."""

    client: VisionClient
    said: vision_pb2.VisionDescription | None = None


@dataclass(eq=False)
class Language(_Worker):
    """A language worker; `said` is None while its sink or vLLM does not answer."""

    client: LanguageClient
    said: pb.LanguageDescription | None = None
    models: list[str] = field(default_factory=list)
    load: Load | None = None


W = TypeVar("W", Vision, Language)


class Pool(Generic[W]):
    """The workers of one kind: who is one of them, and who gets a request. The only owner of its members.

    A member is whom a source lists: the operator, or a name by its addresses. One that no source lists any more stays as long
    as it answers: a resolver may leave out some of many addresses, and a worker may end what it has begun.
    """

    def __init__(self, kind: str, make: Callable[[str], W], absent: str) -> None:
        self.kind = kind
        self.members: list[W] = []
        self._make: Callable[[str], W] = make
        self._absent = absent
        self._listed: dict[str, Collection[str]] = {}
        self._left: list[W] = []

    def enlist(self, source: str, addresses: Collection[str]) -> list[W]:
        """Take over whom a source lists now. Returns who is new."""
        self._listed[source] = addresses
        known = {worker.client.address for worker in self.members}
        new = [self._make(address) for address in dict.fromkeys(addresses) if address not in known]
        self.members += new
        return new

    async def sweep(self) -> None:
        """Part with those whom no source lists and who do not answer; close the clients of those whom nobody uses any more."""
        listed = {address for addresses in self._listed.values() for address in addresses}
        gone = [worker for worker in self.members if worker.said is None and worker.client.address not in listed]
        for worker in gone:
            log.info("%s worker %s has left", self.kind, worker.client.address)
            self.members.remove(worker)
        self._left += gone
        for worker in [worker for worker in self._left if not worker.users]:
            self._left.remove(worker)
            await worker.client.close()

    async def close(self) -> None:
        for worker in (*self.members, *self._left):
            await worker.client.close()

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
    """Both pools, and the tasks that ask who belongs to them and whether they are there. Make it inside the event loop.

    Each list may hold static addresses and names (`dns:NAME:PORT`); `resolve` says what a name stands for.
    """

    def __init__(
        self,
        vision: Sequence[str],
        language: Sequence[str],
        metrics: Metrics,
        resolve: discovery.Resolve = discovery.resolve,
    ) -> None:
        self.vision = Pool(
            "vision", lambda address: Vision(VisionClient(address)), "no vision worker is there: image requests must wait"
        )
        self.language = Pool(
            "language", lambda address: Language(LanguageClient(address)), "no language worker is there; try again"
        )
        self._complained: str | None = None
        self._probes: SingleFlight[tuple[bool, bool]] = SingleFlight()
        self._metrics = metrics
        metrics.watch(self._up)
        self._tasks = [
            *self._follow(vision, resolve, self.vision, self._probe_vision),
            *self._follow(language, resolve, self.language, self._probe_language),
            asyncio.create_task(self._poll()),
        ]

    def _follow(
        self, addresses: Sequence[str], resolve: discovery.Resolve, pool: Pool[W], probe: Callable[[W], Awaitable[bool]]
    ) -> list[asyncio.Task[None]]:
        """Fill a pool: from static addresses now, from each name in a task of its own."""

        async def found(name: str, those: Collection[str]) -> None:
            new = pool.enlist(name, those)
            for worker in new:
                log.info("%s worker %s has come, by %s", pool.kind, worker.client.address, name)
            await asyncio.gather(*map(probe, new))

        pool.enlist("", [address for address in addresses if not discovery.named(address)])
        names = [address for address in dict.fromkeys(addresses) if discovery.named(address)]
        return [asyncio.create_task(discovery.watch(name, resolve, functools.partial(found, name))) for name in names]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.vision.close()
        await self.language.close()

    async def probe(self) -> tuple[bool, bool]:
        """Ask every worker now, at most some `PROBE_TIMEOUT` seconds: whether any vision and any language worker answered.

        Who asks meanwhile gets the same answer: two at once would each find a busy worker late, which is then late twice.
        """
        return await self._probes.run("", self._probe_all)

    async def _probe_all(self) -> tuple[bool, bool]:
        vision = await asyncio.gather(*(self._probe_vision(worker) for worker in self.vision.members))
        language = await asyncio.gather(*(self._probe_language(worker) for worker in self.language.members))
        return any(vision), any(language)

    def _up(self) -> Iterator[Worker]:
        for kind, worker in self._members():
            load = worker.load if isinstance(worker, Language) else None
            yield Worker(kind, worker.client.address, worker.said is not None, load)

    def _members(self) -> Iterator[tuple[str, Vision | Language]]:
        for pool in (self.vision, self.language):
            yield from ((pool.kind, worker) for worker in pool.members)

    async def _poll(self) -> None:
        while True:
            try:
                await self.probe()
                self._complain(self.mismatch())
                await asyncio.gather(*map(self._read_load, self.language.members))
                await self.vision.sweep()
                await self.language.sweep()
            except Exception:
                log.exception("asking the workers failed")
            await asyncio.sleep(POLL_EVERY)

    async def _read_load(self, worker: Language) -> None:
        """What is shown of a language worker that is there; of another one nothing is."""
        if worker.said is None:
            worker.load = None
            return
        checkpoint, dtype = worker.said.checkpoint, worker.said.dtype
        name = messages.dtype_from_proto(dtype) if dtype in _DELIVERED else f"number {dtype}"
        self._metrics.common.set_model(checkpoint.fingerprint, checkpoint.family, name)
        with worker.held():
            worker.load = await worker.client.load(PROBE_TIMEOUT)

    async def _probe_vision(self, worker: Vision) -> bool:
        try:
            with worker.held():
                worker.said = await worker.client.describe(PROBE_TIMEOUT)
        except errors.DvdError as error:
            return _silent(worker, error)
        worker.strikes = 0
        return True

    async def _probe_language(self, worker: Language) -> bool:
        try:
            with worker.held():
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

    def _complain(self, mismatch: Mismatch | None) -> None:
        complaint = mismatch.in_full if mismatch else None
        if complaint and complaint != self._complained:
            log.error("%s", complaint)
        self._complained = complaint

    def mismatch(self) -> Mismatch | None:
        """What workers that are there do not agree in; None where they do, or too few are there to tell."""
        there = [(f"{kind} worker {worker.client.address}", worker.said) for kind, worker in self._members() if worker.said]
        for name in _COMPARED:
            values: dict[object, list[str]] = {}
            for who, said in there:
                values.setdefault(getattr(said.checkpoint, name), []).append(who)
            if len(values) > 1:
                return _different_checkpoints(name, values)
        for worker in self.language.up():
            if worker.said and worker.said.dtype not in _DELIVERED:
                return _unknown_dtype(worker.said.dtype, f"language worker {worker.client.address}")
        return None


def _different_checkpoints(name: str, values: dict[object, list[str]]) -> Mismatch:
    def told(text: Callable[[object], str]) -> str:
        which = " and ".join(map(text, values))
        return f"workers serve different checkpoints: {name} {which}; start all from the same one"

    return Mismatch(told(str), told(lambda value: f"{value} ({_some(values[value])})"))


def _unknown_dtype(number: int, who: str) -> Mismatch:
    known = ", ".join(map(messages.dtype_from_proto, _DELIVERED))
    said = f"computes in dtype number {number}, and vision workers deliver {known}; run the same version of all processes"
    return Mismatch(f"a language worker {said}", f"{who} {said}")


def _some(workers: Sequence[str]) -> str:
    more = len(workers) - _NAMED
    return ", ".join(workers[:_NAMED]) + (f" and {more} more" if more > 0 else "")
