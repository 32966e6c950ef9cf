"""A pool of workers of one kind: its members, and which of them gets a request."""

import hashlib
import logging
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Generic, TypeVar

from common import errors
from server.workers.worker import LanguageWorker, VisionWorker

log = logging.getLogger(__name__)

WorkerT = TypeVar("WorkerT", VisionWorker, LanguageWorker)

_LOAD_SLACK = 4
"""Requests that a worker may have beyond twice those of the least busy one before its keys go to another worker."""

_UNLISTED_LOOKUPS = 3
"""Lookups in a row without a worker's address after which it gets no new requests."""
_SLOW_FACTOR = 5.0
"""Times by which a worker may be slower than the median of the others."""


class Pool(Generic[WorkerT]):
    """The workers of one kind. The only owner of its members and of their clients.

    A source (the operator's list, or a DNS name) lists addresses. A worker that no source has listed for several lookups gets
    no new requests: it is about to shut down. It stays while it answers probes, to finish those that it has. A single lookup
    decides nothing, because a resolver may omit some of many addresses.
    """

    def __init__(self, kind: str, create_worker: Callable[[str], WorkerT], unavailable_message: str) -> None:
        self.kind = kind
        self.workers: list[WorkerT] = []
        self._create_worker: Callable[[str], WorkerT] = create_worker
        self._unavailable_message = unavailable_message
        self._addresses: dict[str, Collection[str]] = {}
        self._unlisted: Counter[str] = Counter()  # lookups in a row without an address
        self._removed: list[WorkerT] = []

    def set_members(self, source: str, addresses: Collection[str]) -> list[WorkerT]:
        """Replace the addresses that a source lists. Returns the workers that are new."""
        self._addresses[source] = addresses
        self._count_unlisted()
        known = {worker.address for worker in self.workers}
        new = [self._create_worker(address) for address in dict.fromkeys(addresses) if address not in known]
        self.workers += new
        return new

    def _listed(self) -> set[str]:
        return {address for addresses in self._addresses.values() for address in addresses}

    def _count_unlisted(self) -> None:
        listed = self._listed()
        for worker in self.workers:
            if worker.address in listed:
                del self._unlisted[worker.address]
                continue
            self._unlisted[worker.address] += 1
            if self._unlisted[worker.address] == _UNLISTED_LOOKUPS:
                log.info("%s worker %s is no longer listed: it gets no new requests", self.kind, worker.address)

    async def prune(self) -> None:
        """Remove the workers that are down and that no source lists; close clients that are no longer in use."""
        listed = self._listed()
        for worker in [worker for worker in self.workers if not worker.is_up and worker.address not in listed]:
            log.info("%s worker %s removed: it does not answer and is no longer listed", self.kind, worker.address)
            self.workers.remove(worker)
            self._removed.append(worker)
            del self._unlisted[worker.address]
        for worker in [worker for worker in self._removed if not worker.is_in_use]:
            self._removed.remove(worker)
            await worker.client.close()

    async def close(self) -> None:
        """Close all clients."""
        for worker in (*self.workers, *self._removed):
            await worker.client.close()

    def available(self) -> list[WorkerT]:
        """Return the workers that may get requests: they are up, not draining, and admitted by their breakers."""
        up = [worker for worker in self.workers if worker.is_available]
        available = [worker for worker in up if self._unlisted[worker.address] < _UNLISTED_LOOKUPS] or up
        now = time.monotonic()
        # with every breaker open a request is worth a try
        return [worker for worker in available if worker.breaker.admits(now, worker.outstanding)] or available

    def candidates(self, exclude: Collection[WorkerT] = ()) -> list[WorkerT]:
        """Return the workers that may get a request, apart from those in `exclude`. Raises `Unavailable` if there is none."""
        candidates = [worker for worker in self.available() if worker not in exclude]
        if not candidates:  # a worker that is on trial after its ejection is better than none
            candidates = [worker for worker in self.workers if worker.is_available and worker not in exclude]
        if not candidates:
            raise errors.Unavailable(self._unavailable_message, retry_after=1)
        return candidates

    def pick(self, key: str | None, exclude: Collection[WorkerT] = ()) -> WorkerT:
        """Return the worker for a key, or the least busy one if `key` is None.

        Rendezvous hashing sends a key to the same worker as long as that worker is up and not far busier than the others, so
        that its caches are hit.

        Raises:
            Unavailable: No worker may get a request, apart from those in `exclude`.
        """
        candidates, now = self.candidates(exclude), time.monotonic()
        least = min(candidates, key=lambda worker: worker.outstanding / worker.breaker.share(now))
        if key is None:
            return least
        most = 2 * least.outstanding + _LOAD_SLACK
        return next(
            worker for worker in rank(candidates, key)
            if worker is least or worker.outstanding <= most * worker.breaker.share(now)
        )  # fmt: skip

    def record_failure(self, worker: WorkerT) -> None:
        """Record a request that a worker failed and another one served; eject it if it does so often."""
        now = time.monotonic()
        worker.breaker.record_failure(now)
        if worker.breaker.is_suspect and not worker.breaker.is_ejected():
            self._eject(worker, now, "it fails requests that others serve")

    def check_speed(self, worker: WorkerT) -> None:
        """Eject a worker that is far slower than the others of its priority."""
        own, others = worker.throughput.per_second, [other for other in self.available() if other is not worker]
        rates = [rate for other in others if other.is_spare == worker.is_spare and (rate := other.throughput.per_second)]
        if own and rates and _SLOW_FACTOR * own < statistics.median(rates) and not worker.breaker.is_ejected():
            self._eject(worker, time.monotonic(), f"it is {statistics.median(rates) / own:.0f} times slower than the others")

    def _eject(self, worker: WorkerT, now: float, reason: str) -> None:
        """Eject a worker, unless fewer than half of those that are up would remain."""
        up = [other for other in self.workers if other.is_available]
        if 2 * (sum(other.breaker.is_ejected() for other in up) + 1) > len(up):
            return
        seconds = worker.breaker.eject(now)
        log.warning("%s worker %s gets no requests for %.0f s: %s", self.kind, worker.address, seconds, reason)


def rank(workers: Sequence[WorkerT], key: str) -> list[WorkerT]:
    """Return workers in the order in which they are preferred for a key (rendezvous hashing)."""
    return sorted(workers, key=lambda worker: _weight(worker.address, key), reverse=True)


def _weight(address: str, key: str) -> bytes:
    return hashlib.blake2b(f"{address} {key}".encode(), digest_size=8).digest()
