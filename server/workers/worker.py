"""Workers as the gateway sees them. A worker is the only owner of its state: other code calls its methods."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Generic, TypeVar

from common import errors
from protos import embeddings_pb2, vision_pb2
from server.metrics import EngineLoad
from server.workers.breaker import Breaker
from server.workers.clients import LanguageClient, VisionClient
from server.workers.throughput import Throughput

log = logging.getLogger(__name__)

ClientT = TypeVar("ClientT", VisionClient, LanguageClient)
DescriptionT = TypeVar("DescriptionT", vision_pb2.VisionDescription, embeddings_pb2.LanguageDescription)

_MAX_LATE_PROBES = 2
"""Late probes in a row after which a worker is down: after one it may only be busy."""

_HUNG_PROBES = 3
"""Failed probes in a row after which the calls in flight at a worker are given up."""

_PROOF_OF_LIFE_SECONDS = 2.0
"""Time for which a served request outweighs a late probe."""

_DEFAULT_BATCH_TILES = 8
"""For a vision worker that does not report its batches."""
_WINDOW_BATCHES = 4
"""Most tiles that a vision worker has at once, in batches: one computes, one is staged, and images are decoded for two more."""
_WINDOW_SECONDS = 1.0
"""Work that a vision worker has at once: enough to stay busy, while what waits longer waits in the gateway."""


class Worker(Generic[ClientT, DescriptionT]):
    """One worker: its client, whether it is up, and its requests in flight."""

    kind: str

    def __init__(self, client: ClientT) -> None:
        self.client: ClientT = client
        self._description: DescriptionT | None = None
        self._failed_probes = 0
        self._calls: set[asyncio.Timeout] = set()
        self._outstanding = 0
        self._users = 0
        self._served_at = -_PROOF_OF_LIFE_SECONDS
        self.breaker = Breaker()
        self.throughput = Throughput()

    @property
    def address(self) -> str:
        """The address under which the gateway knows the worker."""
        return self.client.address

    @property
    def is_up(self) -> bool:
        """Whether the worker answers probes."""
        return self._description is not None

    @property
    def is_draining(self) -> bool:
        """Whether the worker is about to stop: it finishes its requests and gets no new ones."""
        return self._description is not None and self._description.draining

    @property
    def is_available(self) -> bool:
        """Whether the worker may get requests, unless its pool has ejected it."""
        return self.is_up and not self.is_draining

    @property
    def description(self) -> DescriptionT | None:
        """The answer of the worker's last successful `Describe`; None while it is down."""
        return self._description

    @property
    def is_spare(self) -> bool:
        """Whether the worker computes in idle time only, and is slower than the others for that reason."""
        return False

    @property
    def outstanding(self) -> int:
        """Number of requests in flight at the worker."""
        return self._outstanding

    @property
    def answers_probes(self) -> bool:
        """Whether the worker has answered the last probe. One that is up may be late once."""
        return self.is_up and not self._failed_probes

    @property
    def is_in_use(self) -> bool:
        """Whether the client may still be in use."""
        return self._users > 0

    def mark_up(self, description: DescriptionT) -> None:
        """Record a successful probe."""
        if description.draining and not self.is_draining:
            log.info("%s worker %s is draining: it gets no new requests", self.kind, self.address)
        self._description, self._failed_probes = description, 0

    def record_served(self) -> None:
        """Record a request that the worker has served: it makes progress."""
        self._served_at = now = time.monotonic()
        self.breaker.record_success(now)

    def mark_down(self, reason: str) -> None:
        """Record that the worker may get no requests until its next successful probe."""
        if self._description is not None:
            log.warning("%s worker %s is down: %s", self.kind, self.address, reason)
        self._description = None

    def record_failed_probe(self, error: errors.DvdError) -> None:
        """Mark the worker down, unless the probe only timed out and it is the first one that did.

        A worker that answers no probe for longer hangs: its calls in flight are given up. One that has just served a request
        is only too busy to answer a probe in time.
        """
        if isinstance(error, errors.DeadlineExceeded) and time.monotonic() - self._served_at < _PROOF_OF_LIFE_SECONDS:
            return
        self._failed_probes += 1
        if self._failed_probes >= _MAX_LATE_PROBES or not isinstance(error, errors.DeadlineExceeded):
            self.mark_down(str(error))
        if self._failed_probes >= _HUNG_PROBES:
            calls, self._calls = self._calls, set()
            for call in calls:
                call.reschedule(0)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the client open, also if the worker leaves the pool in the meantime."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1

    @contextmanager
    def track_in_flight(self) -> Iterator[None]:
        """Count one request in flight, and keep the client open."""
        self._outstanding += 1
        try:
            with self.in_use():
                yield
        finally:
            self._outstanding -= 1

    @asynccontextmanager
    async def giving_up_if_hung(self) -> AsyncIterator[None]:
        """Raise `WorkerUnavailable` in the block if the worker stops answering probes, so that a call can be moved.

        Its connections stay open when a process hangs, so that no call to it would fail by itself.
        """
        call = asyncio.timeout(None)
        try:
            async with call:
                self._calls.add(call)
                yield
        except TimeoutError:
            if not call.expired():
                raise
            raise errors.WorkerUnavailable(f"The {self.kind} worker has stopped answering; retry later.") from None
        finally:
            self._calls.discard(call)

    @contextmanager
    def marking_down_if_gone(self) -> Iterator[None]:
        """Mark the worker down if a call to it raises `WorkerUnavailable`. Raises what the call raises."""
        try:
            yield
        except errors.WorkerUnavailable as error:
            self.mark_down(str(error))
            raise


class VisionWorker(Worker[VisionClient, vision_pb2.VisionDescription]):
    """A vision worker, and the only owner of the number of tiles in flight at it."""

    kind = "vision"

    def __init__(self, client: VisionClient) -> None:
        super().__init__(client)
        self._tiles = 0

    @property
    def tiles(self) -> int:
        """Number of tiles in flight at the worker."""
        return self._tiles

    @property
    def is_spare(self) -> bool:
        """Whether the worker computes in idle time only: it gets what the others have no room for."""
        return self._description is not None and self._description.spare

    @property
    def window(self) -> int:
        """Number of tiles from which on the worker gets no more calls: more would wait there instead of in the gateway."""
        batch = (self._description.batch_tiles if self._description is not None else 0) or _DEFAULT_BATCH_TILES
        rate = self.tiles_per_second
        most = _WINDOW_BATCHES * batch
        return most if rate is None else max(batch + 1, min(most, int(rate * _WINDOW_SECONDS)))

    @property
    def tiles_per_second(self) -> float | None:
        """Tiles that the worker encodes in a second while it is saturated: as measured here, else as it reports.

        For a spare worker only what it reports: that is its speed of late, also of self-tests while it got nothing.
        """
        reported = self._description.tiles_per_second if self._description is not None else 0.0
        measured = None if self.is_spare else self.throughput.per_second
        return measured or reported or None

    def has_room(self, tiles: int, *, is_first: bool) -> bool:
        """Return whether a call may be sent now. A worker without any call has room for each.

        Args:
            tiles: Tiles of the call.
            is_first: Whether its caller has no other call in flight. Such a call may exceed the window, up to twice its size:
                at the worker its tiles are next, while here it would wait for those that are ahead there.
        """
        window = self.window * self.breaker.share(time.monotonic())
        return not self._tiles or self._tiles + tiles <= (2 * window if is_first else window)

    def add_tiles(self, tiles: int) -> None:
        """Record that a call of this many tiles is sent to the worker."""
        self._change_tiles(tiles, 0)

    def remove_tiles(self, tiles: int) -> None:
        """Record that a call of this many tiles has ended."""
        self._change_tiles(-tiles, tiles)

    def _change_tiles(self, change: int, finished: int) -> None:
        self._tiles += change
        self.throughput.update(time.monotonic(), finished, is_saturated=2 * self._tiles > self.window)


class LanguageWorker(Worker[LanguageClient, embeddings_pb2.LanguageDescription]):
    """A language worker: vLLM's server and the sink beside it. It is up if both answer."""

    kind = "language"

    def __init__(self, client: LanguageClient) -> None:
        super().__init__(client)
        self._models: tuple[str, ...] = ()
        self._context_tokens: int | None = None
        self._load: EngineLoad | None = None
        self._sent_since_load = 0

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models and adapters that the worker serves."""
        return self._models

    def serves(self, model: str | None) -> bool:
        """Return whether the worker serves a model; None stands for any."""
        return model is None or model in self._models

    @property
    def load(self) -> EngineLoad | None:
        """The load of the worker's vLLM; None if the worker is down or vLLM does not report it."""
        return self._load

    @property
    def context_tokens(self) -> int | None:
        """Maximum number of tokens of a prompt and its response; None if vLLM does not report it."""
        return self._context_tokens

    def update_models(self, models: Sequence[str], context_tokens: int | None = None) -> None:
        """Record the models that vLLM lists, and the length of their context."""
        self._models, self._context_tokens = tuple(models), context_tokens

    def update_load(self, load: EngineLoad | None) -> None:
        """Record the load that vLLM reports."""
        self._load, self._sent_since_load = load, 0
        self._record_finished(0)

    @property
    def wait_seconds(self) -> float:
        """Estimated seconds until vLLM begins with a request that it gets now; 0 if nothing waits, or nothing is known."""
        rate = self.throughput.per_second
        # those that it reported to wait for their first step, and those that it got since
        return (self._waiting + self._sent_since_load) / rate if rate and self._waiting else 0.0

    @property
    def _waiting(self) -> float:
        return self._load.requests_waiting if self._load is not None else 0.0

    @contextmanager
    def generating(self, sequences: int = 1) -> Iterator[None]:
        """Count a request while vLLM answers it. vLLM counts each of its sequences as a request."""
        self._sent_since_load += sequences
        try:
            with self.track_in_flight():
                yield
        finally:
            self._record_finished(sequences)

    def _record_finished(self, requests: int) -> None:
        self.throughput.update(time.monotonic(), requests, is_saturated=self._waiting > 0)
