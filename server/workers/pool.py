"""A pool of workers of one kind: its members, and which of them gets a request."""

import hashlib
import logging
from collections.abc import Callable, Collection
from typing import Generic, TypeVar

from common import errors
from server.workers.worker import LanguageWorker, VisionWorker

log = logging.getLogger(__name__)

WorkerT = TypeVar("WorkerT", VisionWorker, LanguageWorker)

_LOAD_SLACK = 4
"""Requests that a worker may have beyond twice those of the least busy one before its keys go to another worker."""


class Pool(Generic[WorkerT]):
    """The workers of one kind. The only owner of its members and of their clients.

    A source (the operator's list, or a DNS name) lists addresses. A worker that no source lists any more stays while it answers
    probes: a resolver may omit some of many addresses, and a worker that shuts down may still finish requests.
    """

    def __init__(self, kind: str, create_worker: Callable[[str], WorkerT], unavailable_message: str) -> None:
        self.kind = kind
        self.workers: list[WorkerT] = []
        self._create_worker: Callable[[str], WorkerT] = create_worker
        self._unavailable_message = unavailable_message
        self._addresses: dict[str, Collection[str]] = {}
        self._removed: list[WorkerT] = []

    def set_members(self, source: str, addresses: Collection[str]) -> list[WorkerT]:
        """Replace the addresses that a source lists. Returns the workers that are new."""
        self._addresses[source] = addresses
        known = {worker.address for worker in self.workers}
        new = [self._create_worker(address) for address in dict.fromkeys(addresses) if address not in known]
        self.workers += new
        return new

    async def prune(self) -> None:
        """Remove the workers that are down and that no source lists; close clients that are no longer in use."""
        listed = {address for addresses in self._addresses.values() for address in addresses}
        for worker in [worker for worker in self.workers if not worker.is_up and worker.address not in listed]:
            log.info("%s worker %s removed: it does not answer and is no longer listed", self.kind, worker.address)
            self.workers.remove(worker)
            self._removed.append(worker)
        for worker in [worker for worker in self._removed if not worker.is_in_use]:
            self._removed.remove(worker)
            await worker.client.close()

    async def close(self) -> None:
        """Close all clients."""
        for worker in (*self.workers, *self._removed):
            await worker.client.close()

    def available(self) -> list[WorkerT]:
        """Return the workers that are up."""
        return [worker for worker in self.workers if worker.is_up]

    def pick(self, key: str | None, exclude: Collection[WorkerT] = ()) -> WorkerT:
        """Return the worker for a key, or the least busy one if `key` is None.

        Rendezvous hashing sends a key to the same worker as long as that worker is up and not far busier than the others, so
        that its caches are hit.

        Raises:
            Unavailable: No worker is up, apart from those in `exclude`.
        """
        candidates = [worker for worker in self.available() if worker not in exclude]
        if not candidates:
            raise errors.Unavailable(self._unavailable_message, retry_after=1)
        least = min(candidates, key=lambda worker: worker.outstanding)
        if key is None:
            return least
        ranked = sorted(candidates, key=lambda worker: _weight(worker.address, key), reverse=True)
        return next(worker for worker in ranked if worker.outstanding <= 2 * least.outstanding + _LOAD_SLACK)


def _weight(address: str, key: str) -> bytes:
    return hashlib.blake2b(f"{address} {key}".encode(), digest_size=8).digest()
