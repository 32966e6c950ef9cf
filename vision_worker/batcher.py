"""Forms forward batches from the tiles of all calls, and owns the one thread that drives the device.

A batch contains tiles of any calls, up to a maximum number; callers take turns (`fair_queue.py`). Routing is decided over a
whole group, after all its tiles have features, so neither batch boundaries nor other calls change an embedding.

Three threads overlap: the event loop forms batch k+1, the stager thread copies it to the device, and the device thread
computes batch k.
"""

import asyncio
import functools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common import errors
from common.fair_queue import FairQueue
from common.tracing import Trace
from vision_worker import quantization
from vision_worker.batch_times import BatchTimes
from vision_worker.deadline import Deadline
from vision_worker.encoder import Encoder
from vision_worker.liveness import CpuClock, Progress
from vision_worker.metrics import Metrics
from vision_worker.models.vir import Fixed, Policy
from vision_worker.preprocessing.tiling import Tiles

log = logging.getLogger(__name__)

_MAX_MEASURED_WARM_UP_SECONDS = 5.0
"""A warm-up that takes longer is not repeated for a measurement: it would delay readiness."""

_SLOW_BATCH_SECONDS = 0.1
"""Duration of a batch from which on a CPU stages none in advance: the milliseconds that it would save do not matter then."""

_MAX_BATCHES_IN_FLIGHT = 2
"""One on the device and the next one staged. With more, batches would contain tiles of callers that have disconnected."""


@dataclass(frozen=True)
class ImageEmbedding:
    """The embedding of one image: `data` is its payload in the requested dtype (`common/embedding.py`).

    `compressed` has an item per tile, thumbnail last. So has `scores`, which is empty if the router did not run.
    """

    data: memoryview
    rows: int
    compressed: list[bool]
    scores: list[float]


@dataclass(frozen=True)
class EncodedGroup:
    """The embeddings of a group's images in order, and the seconds spent waiting for a batch, computing and routing."""

    images: list[ImageEmbedding]
    queue_seconds: float
    encode_seconds: float
    route_seconds: float


class _Group:
    """One call's images. Equal tiles (blank margins, a repeated image) are computed once.

    That also keeps scores of equal tiles equal: the features of equal pixels may differ by rounding between batches.

    Attributes:
        tiles: the distinct tiles that no batch has taken yet. Their pixels are released with the batch.
        distinct: number of distinct tiles.
        index: for each tile of the group, its index among the distinct tiles.
        tiles_by_image: number of tiles of each image.
    """

    def __init__(self, images: Iterable[Tiles], policy: Policy, dtype: torch.dtype, deadline: Deadline) -> None:
        self.policy, self.dtype, self.deadline = policy, dtype, deadline
        self.future: asyncio.Future[EncodedGroup] = asyncio.get_running_loop().create_future()
        self.arrived, self.started = time.monotonic(), 0.0
        self.features: list[Tensor] = []  # device thread only
        self.routing_seconds = 0.0  # device thread only
        self.tiles_by_image: list[int] = []
        self.index: list[int] = []
        self.tiles: deque[npt.NDArray[np.uint8]] = deque()
        places: dict[int, int] = {}
        for image in images:
            self.tiles_by_image.append(len(image))
            for value, pixels in zip(image.hashes, image.pixels, strict=True):
                if value not in places:
                    places[value] = len(places)
                    self.tiles.append(pixels)
                self.index.append(places[value])
        self.distinct = len(places)


_Batch = list[tuple[_Group, int]]
"""Groups, and how many tiles each has in the batch."""


@dataclass(frozen=True)
class _Computed:
    """What the device thread returns for a batch: results of the groups that it completes or fails.

    Attributes:
        results: the groups, and their embeddings or their error.
        forward_seconds: time on the device until all features were there; 0 if the batch failed.
    """

    results: list[tuple[_Group, list[ImageEmbedding] | errors.DvdError]]
    forward_seconds: float = 0.0


class Batcher:
    """Encodes groups of images: `async with Batcher(encoder, max_tiles) as batcher: await batcher.encode(…)`.

    Args:
        encoder: the vision tower.
        max_tiles: maximum number of tiles in a forward pass.
        metrics: where batches and waiting tiles are counted.
        trace: where batches are recorded.
        on_thread_start: called first in each of the two threads.

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
        self._queue: FairQueue[_Group] = FairQueue()
        self._metrics.waiting_tiles.set_function(lambda: len(self._queue))
        self._has_waiting, self.device_lost = asyncio.Event(), asyncio.Event()
        self._batch_ended = asyncio.Event()
        self._clock = CpuClock()
        self._stager_thread = ThreadPoolExecutor(1, "stager", self._clock.register, (on_thread_start,))
        self._device_thread = ThreadPoolExecutor(1, "device", self._clock.register, (on_thread_start,))
        self._in_flight = self._completed = 0  # batches and self-tests

    async def __aenter__(self) -> "Batcher":
        self._loop_task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._loop_task.cancel()
        for executor in (self._stager_thread, self._device_thread):
            executor.shutdown(wait=False, cancel_futures=True)

    @property
    def progress(self) -> Progress:
        """Progress of the stager and the device thread, which are busy while a tile waits or a batch is in flight."""
        return Progress(self._in_flight > 0 or len(self._queue) > 0, self._completed, self._clock.seconds())

    @property
    def is_idle(self) -> bool:
        """Whether the device has nothing to do."""
        return self._in_flight == 0

    async def warm_up(self) -> None:
        """Run blank batches of the encoder's warm-up sizes on the device thread."""
        description = self._encoder.checkpoint.description
        policies = [Fixed(False), *([Fixed(True)] if description.thresholds else [])]

        def compute(size: int) -> float:
            started = time.monotonic()
            features = self._encoder.forward(self._encoder.stage([self._blank_tile()] * size))
            for policy in policies:
                self._encoder.project(features, range(len(features)), policy)
            return time.monotonic() - started

        def run() -> float:
            for size in self._encoder.warmup_batch_sizes(self.max_tiles):
                seconds = compute(size)
            # the first batch allocates memory or compiles, so that only the second one tells how fast the device is
            is_fast = self._encoder.placement.compile_for or seconds < _MAX_MEASURED_WARM_UP_SECONDS
            return compute(size) if is_fast else seconds

        seconds = await asyncio.get_running_loop().run_in_executor(self._device_thread, run)
        self.times.record(self.max_tiles, seconds)

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
        await asyncio.wait([self._submit([self._blank_tile()], compute)])

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
        group = _Group(images, policy, dtype, deadline or Deadline())
        self._queue.add(group, caller, group.distinct, request or None)
        self._has_waiting.set()
        group.future.add_done_callback(lambda _: self._remove(group))
        return group.future

    async def _run(self) -> None:
        """Form batches and submit them until the batcher is closed."""
        while True:
            while self._in_flight >= self._max_in_flight():
                self._batch_ended.clear()
                await self._batch_ended.wait()
            batch, tiles = await self._next_batch()
            count, compute = len(tiles), functools.partial(self._compute, batch)
            self._submit(tiles, compute).add_done_callback(functools.partial(self._set_results, count))
            del batch, tiles, compute  # while this waits for the next batch, the pixels and results of this one can go

    def _max_in_flight(self) -> int:
        """Return the number of batches that may be submitted: a staged one delays every call that arrives after it."""
        is_slow = self.times.seconds_per_batch >= _SLOW_BATCH_SECONDS
        return 1 if is_slow and self._encoder.placement.device.type == "cpu" else _MAX_BATCHES_IN_FLIGHT

    def _submit(
        self, tiles: list[npt.NDArray[np.uint8]], compute: "Callable[[Future[Tensor]], _Computed]"
    ) -> "asyncio.Future[_Computed]":
        """Stage tiles, and run `compute` with them on the device thread after everything that was submitted before."""
        self._in_flight += 1
        staged = self._stager_thread.submit(self._encoder.stage, tiles)
        computed = asyncio.get_running_loop().run_in_executor(self._device_thread, compute, staged)
        computed.add_done_callback(self._count_completed)
        return computed

    def _count_completed(self, _computed: "asyncio.Future[_Computed]") -> None:
        self._in_flight -= 1
        self._completed += 1
        if not self._in_flight:
            self._queue.forget()
        self._batch_ended.set()

    async def _next_batch(self) -> tuple[_Batch, list[npt.NDArray[np.uint8]]]:
        """Wait for tiles, then take all that are waiting, up to the maximum. Tiles of a group are next to each other."""
        parts: dict[_Group, list[npt.NDArray[np.uint8]]] = {}
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

    def _is_late(self, group: _Group) -> bool:
        """Whether the deadline of a group has passed, or comes before its tiles can be computed.

        The latter is an estimate, which must not waste what is computed already: a group that has begun may go on.
        """
        seconds = 0.0 if group.started else group.distinct * (self.times.seconds_per_tile or 0.0)
        return group.deadline.passes_within(seconds)

    def _remove(self, group: _Group) -> None:
        """Remove a group from the queue, if it is still there: its caller has its result, its error, or has disconnected."""
        waiting = self._queue.remove(group)
        group.tiles.clear()
        if group.deadline.missed or group.deadline.passes_within(0):
            self._metrics.dropped_tiles.inc(waiting)

    def _compute(self, batch: _Batch, staged: "Future[Tensor]") -> _Computed:
        """Compute one batch on the device thread."""
        count = sum(tiles for _, tiles in batch)
        with self._trace.span("encode", tiles=count, calls=len(batch)):
            computed = self._result_or_error(lambda: self._forward(staged.result()))
            if isinstance(computed, errors.DvdError):
                return _Computed([(group, computed) for group, _ in batch])
            features, seconds = computed
            results: list[tuple[_Group, list[ImageEmbedding] | errors.DvdError]] = []
            for (group, _), part in zip(batch, torch.split(features, [tiles for _, tiles in batch]), strict=True):
                group.features.append(part)
                if group.future.done():
                    group.features.clear()
                elif sum(map(len, group.features)) == group.distinct:
                    results.append((group, self._result_or_error(functools.partial(self._project, group))))
            return _Computed(results, seconds)

    def _forward(self, pixels: Tensor) -> tuple[Tensor, float]:
        """Features of staged tiles, and the seconds until they are there."""
        started = time.monotonic()
        features = self._encoder.forward(pixels)
        if features.is_cuda:
            # a GPU computes behind the thread's back: unlimited batches would be in flight, and none could be measured
            torch.cuda.current_stream(features.device).synchronize()
        return features, time.monotonic() - started

    def _project(self, group: _Group) -> list[ImageEmbedding]:
        embedding = self._encoder.project(torch.cat(group.features), group.index, group.policy)
        group.features.clear()
        group.routing_seconds = embedding.routing_seconds
        parts = quantization.convert(torch.cat(embedding.blocks), group.dtype)
        rows = [len(block) for block in embedding.blocks]
        return _split_by_image(group.tiles_by_image, parts, rows, embedding.compressed, embedding.scores)

    def _result_or_error(self, compute: Callable[[], Any]) -> Any:
        """Run `compute` and return its result, or the error for its callers: nothing may end the device thread.

        The error is `WorkerUnavailable` where the device is lost, as after an illegal memory access: the caller may then ask
        another worker.
        """
        try:
            return compute()
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
                encode_seconds = time.monotonic() - group.started - group.routing_seconds
                group.future.set_result(
                    EncodedGroup(result, group.started - group.arrived, encode_seconds, group.routing_seconds)
                )


def _is_usable(device: torch.device) -> bool:
    """Whether the device still computes: after some CUDA errors every further call of the process fails."""
    try:
        return float(torch.ones(1, device=device).sum()) == 1
    except torch.OutOfMemoryError:
        return True
    except RuntimeError:
        return False


def _split_by_image(
    tiles_by_image: Sequence[int], parts: Sequence[Tensor], rows: list[int], compressed: list[bool], scores: list[float]
) -> list[ImageEmbedding]:
    """Split a group's parts [all rows, …] by image; `rows`, `compressed` and `scores` have an item per tile."""
    result, first_tile, first_row = [], 0, 0
    for tile_count in tiles_by_image:
        tiles = slice(first_tile, first_tile + tile_count)
        count = sum(rows[tiles])
        data = quantization.join(parts, slice(first_row, first_row + count))
        result.append(ImageEmbedding(data, count, compressed[tiles], scores[tiles]))
        first_tile, first_row = first_tile + tile_count, first_row + count
    return result
