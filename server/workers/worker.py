"""Workers as the gateway sees them. A worker is the only owner of its state: other code calls its methods."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Generic, TypeVar

from common import errors
from protos import embeddings_pb2, vision_pb2
from server.metrics import EngineLoad
from server.workers.clients import LanguageClient, VisionClient

log = logging.getLogger(__name__)

ClientT = TypeVar("ClientT", VisionClient, LanguageClient)
DescriptionT = TypeVar("DescriptionT", vision_pb2.VisionDescription, embeddings_pb2.LanguageDescription)

_MAX_LATE_PROBES = 2
"""Late probes in a row after which a worker is down: after one it may only be busy."""

_HUNG_PROBES = 3
"""Failed probes in a row after which the calls in flight at a worker are given up."""


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

    @property
    def address(self) -> str:
        """The address under which the gateway knows the worker."""
        return self.client.address

    @property
    def is_up(self) -> bool:
        """Whether the worker may get requests."""
        return self._description is not None

    @property
    def description(self) -> DescriptionT | None:
        """The answer of the worker's last successful `Describe`; None while it is down."""
        return self._description

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
        """Record a successful probe: the worker may get requests."""
        self._description, self._failed_probes = description, 0

    def mark_down(self, reason: str) -> None:
        """Record that the worker may get no requests until its next successful probe."""
        if self._description is not None:
            log.warning("%s worker %s is down: %s", self.kind, self.address, reason)
        self._description = None

    def record_failed_probe(self, error: errors.DvdError) -> None:
        """Mark the worker down, unless the probe only timed out and it is the first one that did.

        A worker that answers no probe for longer hangs: its calls in flight are given up.
        """
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
    """A vision worker."""

    kind = "vision"


class LanguageWorker(Worker[LanguageClient, embeddings_pb2.LanguageDescription]):
    """A language worker: vLLM's server and the sink beside it. It is up if both answer."""

    kind = "language"

    def __init__(self, client: LanguageClient) -> None:
        super().__init__(client)
        self._models: tuple[str, ...] = ()
        self._context_tokens: int | None = None
        self._load: EngineLoad | None = None

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
        self._load = load
