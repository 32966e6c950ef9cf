"""The queue in front of the vision workers: which call is sent when and where, and whether a request may join.

Callers take turns by tiles. A vision worker gets no more tiles than it needs to stay busy, so that the rest waits here, where
its deadline and its caller are known, and where an image that waits is a file and not yet decoded.
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from common import errors, messages
from common.fair_queue import FairQueue
from protos.embeddings_pb2 import CheckpointDescription
from server.metrics import Metrics
from server.waits import check_wait
from server.workers.compatibility import can_encode
from server.workers.pool import Pool, rank
from server.workers.worker import VisionWorker

_TILE_SLACK = 16
"""Tiles that a worker may have beyond twice those of the least busy one before its keys go to another worker."""


@dataclass(frozen=True)
class EncodeJob:
    """What the queue needs to know of a call.

    Attributes:
        key: Key of an embedding; equal keys prefer the same vision worker.
        checkpoint: The checkpoint that the vision worker must serve.
        caller: Who sent the request; callers take turns.
        request: The request; all its calls have one turn of the caller's together.
        tiles: Number of tiles of the call.
        deadline: Monotonic time at which the request expires.
        dtype: Dtype in which the vision worker must deliver, as an enum value.
    """

    key: str
    checkpoint: CheckpointDescription
    caller: str
    request: str
    tiles: int
    deadline: float
    dtype: int


@dataclass(eq=False)
class _Ticket:
    """A call in the queue, whether it counts for the wait of others, and the worker that it is sent to when it is its turn."""

    job: EncodeJob
    exclude: Collection[VisionWorker]
    is_counted: bool = True
    turn: "asyncio.Future[VisionWorker]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class VisionQueue:
    """The calls that wait for a vision worker. The only owner of their order.

    Args:
        pool: The vision workers.
        max_wait_seconds: Estimated time in the queue from which on requests are refused.
        metrics: Where waiting tiles and dropped calls are counted.
        clock: Monotonic time in seconds.
    """

    def __init__(
        self, pool: Pool[VisionWorker], max_wait_seconds: float, metrics: Metrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._pool, self._max_wait, self._metrics, self._clock = pool, max_wait_seconds, metrics, clock
        self._queue: FairQueue[_Ticket] = FairQueue()
        self._tiles_by_caller: Counter[str] = Counter()  # waiting and in flight
        self._sent: Counter[str] = Counter()  # tiles in flight at vision workers, by caller

    @property
    def tiles_per_second(self) -> float | None:
        """Tiles that all available vision workers encode in a second; None until one of them has been saturated."""
        available = self._pool.available()
        regular = _without_spares(available) or available
        rates = [rate for worker in regular if (rate := worker.tiles_per_second)]
        return sum(rates) * len(regular) / len(rates) if rates else None

    @property
    def waiting_tiles(self) -> int:
        """Tiles that wait here."""
        return len(self._queue)

    @property
    def total_wait_seconds(self) -> float:
        """Estimated seconds that all tiles here and at the workers take; 0 if nothing is known yet."""
        rate = self.tiles_per_second
        return self._tiles_by_caller.total() / rate if rate else 0.0

    def wait_seconds(self, caller: str, tiles: int) -> float:
        """Return the estimated seconds until the tower begins with the last of these tiles; 0 if nothing is known yet.

        All tiles that are queued or in flight come first, but of each other caller no more than of this one.
        """
        rate = self.tiles_per_second
        return self._tiles_ahead(caller, tiles) / rate if rate else 0.0

    def _tiles_ahead(self, caller: str, tiles: int) -> int:
        own = self._tiles_by_caller[caller]
        others = len(self._tiles_by_caller) - (own > 0)  # it keeps no zeros
        return min(self._tiles_by_caller.total(), own + (own + tiles) * others)

    def admit(self, caller: str, tiles: int, deadline: float) -> None:
        """Check that a request may join the queue.

        Args:
            caller: Who sent the request.
            tiles: Number of tiles that it would add.
            deadline: Monotonic time at which it expires.

        Raises:
            Overloaded: Its wait would be longer than the bound, or than its deadline allows.
        """
        ahead = self._tiles_ahead(caller, tiles)
        if not ahead or not (rate := self.tiles_per_second):
            return
        left = deadline - self._clock() - tiles / rate
        hint = ", or send smaller images"
        check_wait("vision", "the images", ahead / rate, self._max_wait, left, self._metrics, hint)

    @asynccontextmanager
    async def worker(self, job: EncodeJob, exclude: Collection[VisionWorker] = ()) -> AsyncIterator[VisionWorker]:
        """Wait for the job's turn, and yield the vision worker that encodes it; its tiles count until the block ends.

        Raises:
            Unavailable: No vision worker can serve the job, apart from those in `exclude`.
            DeadlineExceeded: The deadline cannot be met any more.
        """
        ticket = _Ticket(job, exclude)
        self._tiles_by_caller[job.caller] += job.tiles
        is_only_one = self._tiles_by_caller[job.caller] == job.tiles
        if not (is_only_one and self._send(ticket)):  # the only call of a caller need not wait behind those that have no room
            self._queue.add(ticket, job.caller, job.tiles, job.request)
            self._export()
            self.dispatch()
        try:
            worker = await ticket.turn
            with worker.track_in_flight():
                yield worker
        finally:
            self._release(ticket)
            self.dispatch()

    def dispatch(self) -> None:
        """Send the calls whose turn it is, as long as a worker has room. Called whenever that may have changed."""
        while self._queue:
            ticket = self._queue.first()
            if ticket.turn.cancelled():  # its task has not run since
                self._queue.remove(ticket)
                self._export()
                continue
            if not self._send(ticket):
                return
            self._queue.take_item()
            self._export()

    def _send(self, ticket: _Ticket) -> bool:
        """Decide about a call: its worker, or its error. Returns False if it has to wait."""
        try:
            worker = self._choose(ticket)
        except errors.DvdError as error:
            ticket.turn.set_exception(error)
            return True
        if worker is None:
            return False
        worker.add_tiles(ticket.job.tiles)  # here, since the waiting task runs later
        if worker.is_spare and _without_spares(self._pool.available()):
            self._leave(ticket)  # no call has to wait for these tiles
        self._sent[ticket.job.caller] += ticket.job.tiles
        ticket.turn.set_result(worker)
        return True

    def _choose(self, ticket: _Ticket) -> VisionWorker | None:
        """Return the worker for a call, None if none has room. Raises `Unavailable`, `DeadlineExceeded`."""
        job = ticket.job
        candidates = [
            worker for worker in self._pool.candidates(ticket.exclude)
            if worker.description is not None and can_encode(worker.description, job.checkpoint, job.dtype)
        ]  # fmt: skip
        if not candidates:
            dtype = messages.dtype_from_proto(job.dtype)
            raise errors.Unavailable(
                f"No vision worker serves the language worker's checkpoint with embeddings in {dtype}; retry later.",
                retry_after=1,
            )
        regular = _without_spares(candidates)
        if not regular and _without_spares(ticket.exclude):
            return self._idle_spare(candidates)
        worker = self._with_room(regular or candidates, job)
        if worker is None and regular:
            return self._spare(candidates, job)
        if worker and (rate := worker.tiles_per_second) and self._clock() + job.tiles / rate > job.deadline:
            self._metrics.dropped_tiles.inc(job.tiles)
            raise errors.DeadlineExceeded("The deadline passed while the images waited for a vision worker.")
        return worker

    def _with_room(self, candidates: Sequence[VisionWorker], job: EncodeJob) -> VisionWorker | None:
        """Return the worker that the key prefers among those that have room and are not far busier than another one."""
        least = min(worker.tiles for worker in candidates)
        is_first = not self._sent[job.caller]
        return next(
            (worker for worker in rank(candidates, job.key)
             if worker.has_room(job.tiles, is_first=is_first) and worker.tiles <= 2 * least + _TILE_SLACK),
            None,
        )  # fmt: skip

    def _spare(self, candidates: Sequence[VisionWorker], job: EncodeJob) -> VisionWorker | None:
        """Return a spare worker that ends the job before the others would end what waits here; None if there is none.

        The speed of a spare worker changes with what else its cores do. It is measured by one job at a time.
        """
        left = min(len(self._queue) / (self.tiles_per_second or math.inf), job.deadline - self._clock())
        idle = (worker for worker in candidates if worker.is_spare and not worker.tiles)
        return next((worker for worker in idle if job.tiles / (worker.tiles_per_second or math.inf) <= left), None)

    @staticmethod
    def _idle_spare(candidates: Sequence[VisionWorker]) -> VisionWorker:
        """Return a spare worker for a call that has failed elsewhere. Raises `Unavailable`: all others would wait behind it."""
        for worker in candidates:
            if not worker.tiles:
                return worker
        raise errors.Unavailable(
            "Only spare vision workers are left for the images, and they are busy; retry later.", retry_after=1
        )

    def _release(self, ticket: _Ticket) -> None:
        """Undo what a call has been counted for: its place in the queue, or its tiles at a worker."""
        job = ticket.job
        self._leave(ticket)
        if ticket.turn.cancelled():  # while it waited
            self._queue.remove(ticket)
            self._export()
        elif ticket.turn.exception() is None:
            ticket.turn.result().remove_tiles(job.tiles)
            _subtract(self._sent, job.caller, job.tiles)
            if not self._sent:
                self._queue.forget()

    def _leave(self, ticket: _Ticket) -> None:
        """Count a call no longer among those that others have to wait for."""
        if ticket.is_counted:
            ticket.is_counted = False
            _subtract(self._tiles_by_caller, ticket.job.caller, ticket.job.tiles)

    def _export(self) -> None:
        self._metrics.waiting_tiles.set(len(self._queue))


def _without_spares(workers: Collection[VisionWorker]) -> list[VisionWorker]:
    return [worker for worker in workers if not worker.is_spare]


def _subtract(counter: Counter[str], name: str, count: int) -> None:
    """Subtract from a counter that keeps no zeros: there may be any number of callers."""
    counter[name] -= count
    if not counter[name]:
        del counter[name]
