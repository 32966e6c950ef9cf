"""Forms forward batches from the tiles of all calls, and owns the one thread that drives the device.

A batch contains tiles of any calls, up to a maximum number; callers take turns (`fair_queue.py`). Routing is decided over a
whole group, after all its tiles have features, so neither batch boundaries nor other calls change an embedding.

Three threads overlap: the event loop forms batch k+1, the stager thread copies it to the device, and the device thread
computes batch k. On a GPU the device thread only launches batches, and a fourth, the projector thread, waits for batch k and
projects the groups that it completes while the device computes batch k+1.
"""

import asyncio
import contextlib
import functools
import itertools
import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common import errors
from common.fair_queue import FairQueue
from common.tracing import Trace
from vision_worker.batch_times import BatchTimes
from vision_worker.deadline import Deadline
from vision_worker.encoder import Encoder
from vision_worker.liveness import CpuClock, Progress
from vision_worker.metrics import Metrics
from vision_worker.models.vir import Fixed, Learned, Policy
from vision_worker.preprocessing.tiling import Tiles
from vision_worker.projector import CompleteGroup, ProjectedGroup, Projector
from vision_worker.tile_group import EncodedGroup, TileGroup

log = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_MEASURED_WARM_UP_SECONDS = 5.0
"""A warm-up that takes longer is not repeated for a measurement: it would delay readiness."""

_SLOW_BATCH_SECONDS = 0.1
"""Duration of a batch from which on a CPU stages none in advance: the milliseconds that it would save do not matter then."""

_MAX_BATCHES_ON_DEVICE = 2
"""One that the device computes and the next one staged. With more, batches would contain tiles of callers that have
disconnected, and a call that arrives would wait for all of them."""


_Batch = list[tuple[TileGroup, int]]
"""Groups, and how many tiles each has in the batch."""


@dataclass(frozen=True)
class _Launched:
    """A forward pass that the device has been given.

    Attributes:
        features: its result. A GPU may still compute it.
        seconds: how long it took; 0 on a GPU.
        events: its start and its end on a GPU.
    """

    features: Tensor
    seconds: float
    events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None


_Results = list[tuple[TileGroup, ProjectedGroup | errors.DvdError]]
"""Groups that a batch completes or fails, and their embeddings or their error."""


@dataclass(frozen=True)
class _Computed:
    """What is known once a batch is projected.

    Attributes:
        results: see `_Results`.
        forward_seconds: time on the device until all features were there; 0 if the batch failed.
    """

    results: _Results
    forward_seconds: float = 0.0


class Batcher:
    """Encodes groups of images: `async with Batcher(encoder, max_tiles) as batcher: await batcher.encode(…)`.

    Args:
        encoder: the vision tower.
        max_tiles: maximum number of tiles in a forward pass.
        metrics: where batches and waiting tiles are counted.
        trace: where batches are recorded.
        on_thread_start: called first in each thread.

    Attributes:
        max_tiles: as above.
        times: how long batches take.
        device_lost: set when the device can no longer compute anything; the process must then be restarted.
    """

    def __init__(
        self,
        encoder: Encoder,
        max_tiles: int,
        metrics: Metrics | None = None,
        trace: Trace | None = None,
        on_thread_start: Callable[[], None] = lambda: None,
    ) -> None:
        self._encoder, self._metrics, self._trace = encoder, metrics or Metrics(), trace or Trace(None, "vision")
        self.max_tiles, self.times = max_tiles, BatchTimes(max_tiles)
        self._queue: FairQueue[TileGroup] = FairQueue()
        self._metrics.waiting_tiles.set_function(lambda: len(self._queue))
        self._has_waiting, self.device_lost = asyncio.Event(), asyncio.Event()
        self._batch_ended = asyncio.Event()
        self._clock = CpuClock()
        self._projector = Projector(encoder)
        start_thread = functools.partial(_start_thread, encoder.placement.device, on_thread_start)
        self._stager_thread, self._device_thread, self._projector_thread = (
            ThreadPoolExecutor(1, name, self._clock.register, (start_thread,)) for name in ("stager", "device", "projector")
        )
        self._in_flight = self._completed = 0  # batches and self-tests
        self._on_device: set[int] = set()  # numbers of the batches whose features nobody has seen yet
        self._numbers = itertools.count()

    async def __aenter__(self) -> "Batcher":
        self._loop_task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._loop_task.cancel()
        for executor in (self._stager_thread, self._device_thread, self._projector_thread):
            executor.shutdown(wait=False, cancel_futures=True)

    @property
    def progress(self) -> Progress:
        """Progress of the threads, which are busy while a tile waits or a batch is in flight."""
        return Progress(self._in_flight > 0 or len(self._queue) > 0, self._completed, self._clock.seconds())

    @property
    def is_idle(self) -> bool:
        """Whether the device has nothing to do."""
        return self._in_flight == 0

    async def warm_up(self) -> None:
        """Run blank batches of the encoder's warm-up sizes, on the threads that compute batches."""
        loop = asyncio.get_running_loop()
        projector_thread = self._projector_thread if self._encoder.placement.is_asynchronous else self._device_thread

        async def compute(size: int) -> float:
            launched = await loop.run_in_executor(self._device_thread, self._launch_blank, size)
            seconds = await loop.run_in_executor(projector_thread, _wait, launched)
            await loop.run_in_executor(projector_thread, self._project_blank, launched.features)
            return seconds

        for size in self._encoder.warmup_batch_sizes(self.max_tiles):
            seconds = await compute(size)
        # the first batch allocates memory or compiles, so that only the second one tells how fast the device is
        if self._encoder.placement.is_prepared or seconds < _MAX_MEASURED_WARM_UP_SECONDS:
            seconds = await compute(self.max_tiles)
        self.times.record(self.max_tiles, seconds)

    def _launch_blank(self, size: int) -> _Launched:
        return _launch(self._encoder, self._encoder.stage([self._blank_tile()] * size))

    def _project_blank(self, features: Tensor) -> None:
        thresholds, count = self._encoder.checkpoint.description.thresholds, len(features)
        policies: list[Policy] = [Fixed(False)]
        if thresholds is not None:
            policies += [Fixed(True), Learned(thresholds.relative, thresholds.absolute)]
        for policy in policies:
            group = CompleteGroup([features], range(count), policy, self._encoder.placement.dtype, [count])
            self._projector.project([group])

    async def self_test(self) -> None:
        """Compute one blank tile on the device, as a batch that nobody waits for."""

        def compute(staged: "Future[Tensor]") -> _Computed:
            started = time.monotonic()
            tested = self._result_or_error(lambda: self._encoder.forward(staged.result()).cpu())
            self.times.latest_tiles_per_second = 1 / (time.monotonic() - started)
            if isinstance(tested, errors.WorkerUnavailable):
                loop.call_soon_threadsafe(self.device_lost.set)
            return _Computed([])

        loop = asyncio.get_running_loop()
        staged = self._stager_thread.submit(self._encoder.stage, [self._blank_tile()])
        await asyncio.wait([self._count(loop.run_in_executor(self._device_thread, compute, staged))])

    def _blank_tile(self) -> npt.NDArray[np.uint8]:
        side = self._encoder.checkpoint.description.tower.image_size
        return np.zeros((side, side, 3), dtype=np.uint8)

    def encode(
        self,
        images: Iterable[Tiles],
        policy: Policy,
        dtype: torch.dtype,
        caller: str = "",
        deadline: Deadline | None = None,
        request: str = "",
    ) -> "asyncio.Future[EncodedGroup]":
        """Encode the images of one group; `policy` routes all their tiles together.

        The images are not referenced any longer than until their tiles are on the device. If the future is cancelled, the
        tiles leave the queue.

        Args:
            images: the tiles of each image.
            policy: decides which tiles are compressed.
            dtype: dtype of the embeddings, one of `quantization.EMBEDDING_DTYPES`.
            caller: opaque id of the caller, whose turn the tiles wait for.
            deadline: time until which the result is useful; None: no deadline.
            request: id of the request, all groups of which have one turn together; empty: it has this one only.

        Raises (through the future):
            DeadlineExceeded: the deadline passed, or could not be met any more, before a batch took the group's tiles.
            InternalError: the batch failed.
            WorkerUnavailable: the device is lost.
        """
        group = TileGroup(images, policy, dtype, deadline or Deadline())
        self._queue.add(group, caller, group.distinct, request or None)
        self._has_waiting.set()
        group.future.add_done_callback(lambda _: self._remove(group))
        return group.future

    async def _run(self) -> None:
        """Form batches and submit them until the batcher is closed."""
        while True:
            while not self._has_room():
                self._batch_ended.clear()
                await self._batch_ended.wait()
            batch, tiles = await self._next_batch()
            self._submit(batch, tiles).add_done_callback(functools.partial(self._set_results, len(tiles)))
            del batch, tiles  # while this waits for the next batch, the pixels and results of this one can go

    def _has_room(self) -> bool:
        """Whether one more batch may be submitted: a staged one delays every call that arrives after it."""
        placement = self._encoder.placement
        is_slow = self.times.seconds_per_batch >= _SLOW_BATCH_SECONDS
        limit = 1 if is_slow and placement.device.type == "cpu" else _MAX_BATCHES_ON_DEVICE
        return len(self._on_device) < limit and self._in_flight < limit + placement.is_asynchronous  # one more is projected

    def _submit(self, batch: _Batch, tiles: list[npt.NDArray[np.uint8]]) -> "asyncio.Future[_Computed]":
        """Stage, compute and project a batch, each after the batches before."""
        self._on_device.add(number := next(self._numbers))
        loop = asyncio.get_running_loop()
        release = functools.partial(self._release_device, number)

        def on_features() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
                loop.call_soon_threadsafe(release)

        staged = self._stager_thread.submit(self._encoder.stage, tiles)
        if self._encoder.placement.is_asynchronous:
            launched = self._device_thread.submit(self._launch, staged)
            computed = loop.run_in_executor(self._projector_thread, self._project_launched, batch, launched, on_features)
        else:
            computed = loop.run_in_executor(self._device_thread, self._compute, batch, staged, on_features)
        computed.add_done_callback(lambda _: release())  # whatever has happened before it was called
        return self._count(computed)

    def _count(self, computed: "asyncio.Future[_Computed]") -> "asyncio.Future[_Computed]":
        """Count a batch or self-test as in flight until it is done."""
        self._in_flight += 1
        computed.add_done_callback(self._count_completed)
        return computed

    def _count_completed(self, _computed: "asyncio.Future[_Computed]") -> None:
        self._in_flight -= 1
        self._completed += 1
        if not self._in_flight:
            self._queue.forget()
        self._batch_ended.set()

    def _release_device(self, number: int) -> None:
        self._on_device.discard(number)
        self._batch_ended.set()

    async def _next_batch(self) -> tuple[_Batch, list[npt.NDArray[np.uint8]]]:
        """Wait for tiles, then take all that are waiting, up to the maximum. Tiles of a group are next to each other."""
        parts: dict[TileGroup, list[npt.NDArray[np.uint8]]] = {}
        while not parts:
            await self._has_waiting.wait()
            for _ in range(self.max_tiles):
                self._drop_unwanted()
                if not self._queue:
                    self._has_waiting.clear()
                    break
                group = self._queue.take()
                group.started = group.started or time.monotonic()
                parts.setdefault(group, []).append(group.tiles.popleft())
        batch = [(group, len(part)) for group, part in parts.items()]
        tiles = [tile for part in parts.values() for tile in part]
        self._metrics.batch_tiles.observe(len(tiles))
        return batch, tiles

    def _drop_unwanted(self) -> None:
        """Remove groups from the front of the queue until the first one's result is still wanted and can be in time."""
        while self._queue:
            group = self._queue.first()
            if not group.future.done():  # done: its caller has disconnected, or an earlier batch of it failed
                if not self._is_late(group):
                    return
                group.deadline.missed = True
                message = f"Deadline exceeded: the {group.distinct} tiles of the call cannot be computed in time; retry later."
                group.future.set_exception(errors.DeadlineExceeded(message))
            self._remove(group)

    def _is_late(self, group: TileGroup) -> bool:
        """Whether the deadline of a group has passed, or comes before its tiles can be computed.

        The latter is an estimate, which must not waste what is computed already: a group that has begun may go on.
        """
        seconds = 0.0 if group.started else group.distinct * (self.times.seconds_per_tile or 0.0)
        return group.deadline.passes_within(seconds)

    def _remove(self, group: TileGroup) -> None:
        """Remove a group from the queue, if it is still there: its caller has its result, its error, or has disconnected."""
        waiting = self._queue.remove(group)
        group.tiles.clear()
        if group.deadline.missed or group.deadline.passes_within(0):
            self._metrics.dropped_tiles.inc(waiting)

    def _compute(self, batch: _Batch, staged: "Future[Tensor]", on_features: Callable[[], None]) -> _Computed:
        """Compute and project one batch on the device thread."""
        with self._span(batch):
            return self._finish(batch, self._launch(staged), on_features)

    def _project_launched(
        self, batch: _Batch, launched: "Future[_Launched | errors.DvdError]", on_features: Callable[[], None]
    ) -> _Computed:
        """Wait for one batch and project it, on the projector thread."""
        result = self._result_or_error(launched.result)
        with self._span(batch):
            return self._finish(batch, result, on_features)

    def _span(self, batch: _Batch) -> contextlib.AbstractContextManager[None]:
        return self._trace.span("encode", tiles=sum(tiles for _, tiles in batch), calls=len(batch))

    def _launch(self, staged: "Future[Tensor]") -> _Launched | errors.DvdError:
        """Give a batch to the device, on the device thread. A GPU computes behind the thread's back."""
        return self._result_or_error(lambda: _launch(self._encoder, staged.result()))

    def _finish(self, batch: _Batch, launched: _Launched | errors.DvdError, on_features: Callable[[], None]) -> _Computed:
        """Wait until the device has computed a batch, call `on_features`, and project the groups that it completes."""
        if isinstance(launched, errors.DvdError):
            return _failed(batch, launched)
        seconds = self._result_or_error(lambda: _wait(launched))
        on_features()
        if isinstance(seconds, errors.DvdError):
            return _failed(batch, seconds)
        complete = self._result_or_error(lambda: _collect(batch, launched))
        if isinstance(complete, errors.DvdError):
            return _failed(batch, complete)
        return _Computed(self._project(complete), seconds)

    def _project(self, groups: list[TileGroup]) -> _Results:
        """Project groups: on a GPU together, and each alone where that fails, so that no group fails for another's sake."""
        complete = [group.take_features() for group in groups]
        if len(groups) > 1 and self._encoder.placement.is_asynchronous:
            projected = self._result_or_error(lambda: self._projector.project(complete))
            if not isinstance(projected, errors.DvdError):
                return list(zip(groups, projected, strict=True))
        return [(group, self._project_alone(each)) for group, each in zip(groups, complete, strict=True)]

    def _project_alone(self, group: CompleteGroup) -> ProjectedGroup | errors.DvdError:
        return self._result_or_error(lambda: self._projector.project([group])[0])

    def _result_or_error(self, compute: Callable[[], T]) -> T | errors.DvdError:
        """Run `compute` and return its result, or the error for its callers: nothing may end the device thread.

        The error is `WorkerUnavailable` where the device is lost, as after an illegal memory access: the caller may then ask
        another worker.
        """
        try:
            return compute()
        except CancelledError:  # of work that had not begun when the batcher was closed
            return errors.InternalError("the vision worker is stopping")
        except errors.DvdError as error:
            return error
        except Exception:
            log.exception("a batch failed")
            device = self._encoder.placement.device
            if _is_usable(device):
                return errors.InternalError("the vision worker failed on this batch; see its log")
            return errors.WorkerUnavailable(f"device {device} of the vision worker is no longer usable; see its log")

    def _set_results(self, tiles: int, computed: "asyncio.Future[_Computed]") -> None:
        """Hand a batch's results to the callers, on the event loop."""
        if computed.cancelled():
            return
        if seconds := computed.result().forward_seconds:
            self.times.record(tiles, seconds)
        for group, result in computed.result().results:
            if isinstance(result, errors.WorkerUnavailable):
                self.device_lost.set()
            if group.future.done():
                continue
            if isinstance(result, errors.DvdError):
                group.future.set_exception(result)
            else:
                encode_seconds = time.monotonic() - group.started - result.routing_seconds
                group.future.set_result(
                    EncodedGroup(result.images, group.started - group.arrived, encode_seconds, result.routing_seconds)
                )


def _start_thread(device: torch.device, on_thread_start: Callable[[], None]) -> None:
    """Prepare a thread: CUDA graphs, events and memory belong to the thread's current device."""
    on_thread_start()
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def _launch(encoder: Encoder, pixels: Tensor) -> _Launched:
    """Compute the features of a batch, or on a GPU begin to."""
    if not pixels.is_cuda:
        started = time.monotonic()
        features = encoder.forward(pixels)
        return _Launched(features, time.monotonic() - started)
    start, end = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    features = encoder.forward(pixels)
    end.record()
    return _Launched(features, 0.0, (start, end))


def _wait(launched: _Launched) -> float:
    """Wait until the features of a batch are there. Returns: the seconds that the device needed for them."""
    if launched.events is None:
        return launched.seconds
    start, end = launched.events
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _failed(batch: _Batch, error: errors.DvdError) -> _Computed:
    return _Computed([(group, error) for group, _ in batch])


def _collect(batch: _Batch, launched: _Launched) -> list[TileGroup]:
    """Give the groups of a batch their features. Returns those that are complete, and wanted."""
    complete = []
    for (group, _), part in zip(batch, torch.split(launched.features, [tiles for _, tiles in batch]), strict=True):
        group.features.append(part)
        if group.future.done():
            group.features.clear()
        elif sum(map(len, group.features)) == group.distinct:
            complete.append(group)
    return complete


def _is_usable(device: torch.device) -> bool:
    """Whether the device still computes: after some CUDA errors every further call of the process fails."""
    try:
        return float(torch.ones(1, device=device).sum()) == 1
    except torch.OutOfMemoryError:
        return True
    except RuntimeError:
        return False
