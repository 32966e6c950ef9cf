"""Membership and health of workers: which workers are in the pools, and which of them are up."""

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence

from common import errors, messages
from common.probing import POLL_INTERVAL_SECONDS, PROBE_TIMEOUT_SECONDS
from common.security import OPEN, Credentials
from common.tasks import SingleFlight
from server.metrics import Metrics, WorkerStatus
from server.workers import discovery
from server.workers.clients import LanguageClient, VisionClient
from server.workers.compatibility import (
    KNOWN_DTYPES,
    Mismatch,
    find_mismatch,
    find_mixed_weights,
    takes_images,
)
from server.workers.pool import Pool, WorkerT
from server.workers.worker import LanguageWorker, VisionWorker

log = logging.getLogger(__name__)


class WorkerPools:
    """Both pools, and the tasks that keep them up to date. `async with WorkerPools(…) as workers`.

    Each list of addresses may hold static addresses and names (`dns:NAME:PORT`), which `resolve` turns into addresses.
    """

    def __init__(
        self,
        vision: Sequence[str],
        language: Sequence[str],
        metrics: Metrics,
        resolve: discovery.Resolve = discovery.resolve,
        credentials: Credentials = OPEN,
    ) -> None:
        self.vision = Pool(
            "vision",
            lambda address: VisionWorker(VisionClient(address, credentials)),
            "No vision worker is available; image requests cannot be served yet.",
        )
        self.language = Pool(
            "language",
            lambda address: LanguageWorker(LanguageClient(address, credentials)),
            "No language worker is available; retry later.",
        )
        self._addresses = vision, language
        self._resolve = resolve
        self._metrics = metrics
        self._logged: list[str] = []
        self._probes: SingleFlight[tuple[bool, bool]] = SingleFlight()
        self._tasks: list[asyncio.Task[None]] = []
        self._listeners: list[Callable[[], None]] = []

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call a listener after each round of probes, which may have found a worker up, down or draining."""
        self._listeners.append(listener)

    async def __aenter__(self) -> "WorkerPools":
        vision, language = self._addresses
        self._tasks = [
            *self._follow(vision, self.vision, self._probe_vision),
            *self._follow(language, self.language, self._probe_language),
            asyncio.create_task(self._poll()),
        ]
        self._metrics.watch_workers(self._statuses)
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.vision.close()
        await self.language.close()

    def _follow(
        self, addresses: Sequence[str], pool: Pool[WorkerT], probe: Callable[[WorkerT], Awaitable[bool]]
    ) -> list[asyncio.Task[None]]:
        """Fill a pool: with the static addresses now, with those of each name in a task of its own."""

        async def update(name: str, resolved: Collection[str]) -> None:
            new = pool.set_members(name, resolved)
            for worker in new:
                log.info("%s worker %s added: %s resolves to it", pool.kind, worker.address, name)
            await asyncio.gather(*map(probe, new))

        pool.set_members("", [address for address in addresses if not discovery.parse_name(address)])
        names = [address for address in dict.fromkeys(addresses) if discovery.parse_name(address)]
        return [asyncio.create_task(discovery.watch(name, self._resolve, functools.partial(update, name))) for name in names]

    async def probe(self) -> tuple[bool, bool]:
        """Probe every worker now. Returns whether any vision worker and any language worker answered.

        Concurrent callers share one round of probes: two rounds at once would each find a busy worker late, and two late
        probes mark it down.
        """
        return await self._probes.run("", self._probe_all)

    async def _probe_all(self) -> tuple[bool, bool]:
        vision, language = await asyncio.gather(
            asyncio.gather(*map(self._probe_vision, self.vision.workers)),
            asyncio.gather(*map(self._probe_language, self.language.workers)),
        )
        return any(vision), any(language)

    def mismatch(self) -> Mismatch | None:
        """Return why no image can be served although workers of both kinds are available; None if some pair can."""
        language = self.language.available()
        if not language or not self.vision.available() or len(self.unpaired()) < len(language):
            return None
        return find_mismatch(self._all())

    def unpaired(self) -> list[LanguageWorker]:
        """Return the language workers that can take no image: no available vision worker has their checkpoint and dtype."""
        vision = [worker.description for worker in self.vision.available() if worker.description is not None]
        return [worker for worker in self.language.available() if vision and not takes_images(worker, vision)]

    def warnings(self) -> list[str]:
        """Return what the operator should know of workers that disagree, although requests are served."""
        mismatch, mixed = find_mismatch(self._all()), find_mixed_weights(self.language.available())
        return [*([mismatch.details] if mismatch else []), *([mixed] if mixed else [])]

    async def serving(self, model: str | None) -> list[LanguageWorker]:
        """Return the language workers that serve a model, at least one; None stands for any model.

        Raises:
            ModelNotFound: No language worker serves the model, not even after new probes.
            Unavailable: No language worker is up.
        """
        self.language.pick(None)
        for _ in range(2):  # an adapter may be new, and a round of probes that already runs may have missed it
            if serving := self._serving(model):
                return serving
            await self.probe()
        if serving := self._serving(model):
            return serving
        raise self.model_not_found(str(model))

    def model_not_found(self, name: str) -> errors.ModelNotFound:
        """Return the error for a model that no language worker serves."""
        served = ", ".join(sorted({model for worker in self.language.available() for model in worker.models}))
        return errors.ModelNotFound(f"Model {name!r:.200} is not served; served models: {served}.", param="model")

    def _serving(self, model: str | None) -> list[LanguageWorker]:
        return [worker for worker in self.language.available() if worker.serves(model)]

    def _all(self) -> Iterator[VisionWorker | LanguageWorker]:
        yield from self.vision.workers
        yield from self.language.workers

    def _statuses(self) -> Iterator[WorkerStatus]:
        for worker in self._all():
            load = worker.load if isinstance(worker, LanguageWorker) else None
            yield WorkerStatus(worker.kind, worker.address, worker.is_up, load)

    async def _poll(self) -> None:
        while True:
            try:
                await self.probe()
                self._log_warnings()
                for listener in self._listeners:
                    listener()
                await asyncio.gather(*map(self._read_load, self.language.workers))
                await self.vision.prune()
                await self.language.prune()
            except Exception:
                log.exception("probing the workers failed")
            await asyncio.sleep(POLL_INTERVAL_SECONDS)

    async def _read_load(self, worker: LanguageWorker) -> None:
        if worker.description is None or not worker.answers_probes:  # a worker that hangs would delay the next probes
            worker.update_load(None)
            return
        checkpoint, dtype = worker.description.checkpoint, messages.model_dtype(worker.description)
        dtype_name = messages.dtype_from_proto(dtype) if dtype in KNOWN_DTYPES else f"number {dtype}"
        self._metrics.process.set_model(checkpoint.fingerprint, checkpoint.family, dtype_name)
        with worker.in_use():
            worker.update_load(await worker.client.load(PROBE_TIMEOUT_SECONDS))

    async def _probe_vision(self, worker: VisionWorker) -> bool:
        try:
            with worker.in_use():
                description = await worker.client.describe(PROBE_TIMEOUT_SECONDS)
        except errors.DvdError as error:
            worker.record_failed_probe(error)
            return False
        if description.stalled:
            worker.record_failed_probe(errors.WorkerUnavailable(f"it makes no progress: {description.stalled}"))
            return False
        worker.mark_up(description)
        return True

    async def _probe_language(self, worker: LanguageWorker) -> bool:
        """Probe the sink by `Describe`, and vLLM by `/health` and `/v1/models`."""
        try:
            with worker.in_use():
                async with asyncio.timeout(PROBE_TIMEOUT_SECONDS):
                    description = await worker.client.describe(PROBE_TIMEOUT_SECONDS)
                    await worker.client.get("/health", PROBE_TIMEOUT_SECONDS)
                    models = _parse_models(await worker.client.get("/v1/models", PROBE_TIMEOUT_SECONDS))
        except TimeoutError:
            worker.record_failed_probe(errors.DeadlineExceeded(f"no answer within {PROBE_TIMEOUT_SECONDS:g} s"))
            return False
        except errors.DvdError as error:
            worker.record_failed_probe(error)
            return False
        worker.update_models(*models)
        worker.mark_up(description)
        return True

    def _log_warnings(self) -> None:
        """Log each warning once, until it is another one."""
        warnings = self.warnings()
        for warning in warnings:
            if warning not in self._logged:
                log.error("%s", warning)
        self._logged = warnings


def _parse_models(response: object) -> tuple[list[str], int | None]:
    """Return the names in vLLM's list of models, and the length of their context.

    Raises:
        WorkerUnavailable: The response is no such list.
    """
    try:
        models = list(response["data"])  # type: ignore[index]
        lengths = [model.get("max_model_len") for model in models]  # an adapter has none
        return [model["id"] for model in models], max((n for n in lengths if type(n) is int), default=None)
    except (LookupError, TypeError, AttributeError):
        raise errors.WorkerUnavailable("vLLM's /v1/models is not a list of models") from None
