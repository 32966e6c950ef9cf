"""Forms forward batches from the tiles of all calls, and owns the one thread that drives the device.

A batch contains tiles of any calls, up to a maximum number. Routing is decided over a whole group, after all its tiles have
features, so neither batch boundaries nor other calls change an embedding.

Three threads overlap: the event loop forms batch k+1, the stager thread copies it to the device, and the device thread
computes batch k.
"""

import asyncio
import functools
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common import errors
from common.tracing import Trace
from vision_worker.encoder import Encoder
from vision_worker.metrics import Metrics
from vision_worker.models.vir import Fixed, Policy
from vision_worker.preprocessing.tiling import Tiles

log = logging.getLogger(__name__)

_MAX_BATCHES_IN_FLIGHT = 2
"""One on the device and the next one staged. With more, batches would contain tiles of callers that have disconnected."""


@dataclass(frozen=True)
class ImageEmbedding:
    """The embedding of one image: `data` holds rows × width values of the requested dtype, row by row.

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


@dataclass(eq=False)
class _Group:
    """One call's images. Equal tiles (blank margins, a repeated image) are computed once.

    That also keeps scores of equal tiles equal: the features of equal pixels may differ by rounding between batches.

    Attributes:
        tiles: the distinct tiles.
        index: for each tile of the group, its index in `tiles`.
    """

    images: Sequence[Tiles]
    policy: Policy
    dtype: torch.dtype
    future: "asyncio.Future[EncodedGroup]"
    arrived: float = field(default_factory=time.monotonic)
    started: float = 0.0
    taken: int = 0  # tiles that batches have taken
    features: list[Tensor] = field(default_factory=list)  # device thread only
    routing_seconds: float = 0.0  # device thread only

    def __post_init__(self) -> None:
        hashes = [value for image in self.images for value in image.hashes]
        distinct: dict[int, npt.NDArray[np.uint8]] = {}
        for value, pixels in zip(hashes, (tile for image in self.images for tile in image.pixels), strict=True):
            distinct.setdefault(value, pixels)
        places = {value: place for place, value in enumerate(distinct)}
        self.tiles = list(distinct.values())
        self.index = [places[value] for value in hashes]

    def take(self, max_tiles: int) -> list[npt.NDArray[np.uint8]]:
        """The next tiles for a batch."""
        self.started = self.started or time.monotonic()
        tiles = self.tiles[self.taken : self.taken + max_tiles]
        self.taken += len(tiles)
        return tiles


_Batch = list[tuple[_Group, int]]
"""Groups, and how many tiles each has in the batch."""

_Results = list[tuple[_Group, list[ImageEmbedding] | errors.DvdError]]


class Batcher:
    """Encodes groups of images: `async with Batcher(encoder, max_tiles) as batcher: await batcher.encode(…)`.

    Args:
        encoder: the vision tower.
        max_tiles: maximum number of tiles in a forward pass.
        metrics: where batches and waiting tiles are counted.
        trace: where batches are recorded.

    Attributes:
        device_lost: set when the device can no longer compute anything; the process must then be restarted.
    """

    def __init__(self, encoder: Encoder, max_tiles: int, metrics: Metrics | None = None, trace: Trace | None = None) -> None:
        self._encoder, self._metrics, self._trace = encoder, metrics or Metrics(), trace or Trace(None, "vision")
        self._max_tiles = max_tiles
        self._waiting: deque[_Group] = deque()
        self._has_waiting, self.device_lost = asyncio.Event(), asyncio.Event()
        self._slots = asyncio.Semaphore(_MAX_BATCHES_IN_FLIGHT)
        self._stager_thread = ThreadPoolExecutor(1, "stager")
        self._device_thread = ThreadPoolExecutor(1, "device")

    async def __aenter__(self) -> "Batcher":
        self._loop_task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._loop_task.cancel()
        for executor in (self._stager_thread, self._device_thread):
            executor.shutdown(wait=False, cancel_futures=True)

    async def warm_up(self) -> None:
        """Run blank batches of the encoder's warm-up sizes on the device thread."""
        description = self._encoder.checkpoint.description
        side = description.tower.image_size
        blank = np.zeros((side, side, 3), dtype=np.uint8)
        policies = [Fixed(False), *([Fixed(True)] if description.thresholds else [])]

        def run() -> None:
            for size in self._encoder.warmup_batch_sizes(self._max_tiles):
                features = self._encoder.forward(self._encoder.stage([blank] * size))
            for policy in policies:
                self._encoder.project(features, range(len(features)), policy)

        await asyncio.get_running_loop().run_in_executor(self._device_thread, run)

    async def encode(self, images: Sequence[Tiles], policy: Policy, dtype: torch.dtype) -> EncodedGroup:
        """Encode the images of one group; `policy` routes all their tiles together.

        If the caller is cancelled, its tiles leave the queue.
        Raises: InternalError where the batch failed; WorkerUnavailable where the device is lost.
        """
        group = _Group(images, policy, dtype, asyncio.get_running_loop().create_future())
        self._waiting.append(group)
        self._metrics.waiting_tiles.inc(len(group.tiles))
        self._has_waiting.set()
        return await group.future

    async def _run(self) -> None:
        """Form batches and submit them until the batcher is closed."""
        loop = asyncio.get_running_loop()
        while True:
            await self._slots.acquire()
            batch, tiles = await self._next_batch()
            staged = self._stager_thread.submit(self._encoder.stage, tiles)
            results = loop.run_in_executor(self._device_thread, self._compute, batch, staged)
            results.add_done_callback(self._set_results)

    async def _next_batch(self) -> tuple[_Batch, list[npt.NDArray[np.uint8]]]:
        """Wait for tiles, then take all that are waiting, up to the maximum."""
        batch: _Batch = []
        tiles: list[npt.NDArray[np.uint8]] = []
        while not tiles:
            await self._has_waiting.wait()
            while self._waiting and len(tiles) < self._max_tiles:
                group = self._waiting[0]
                if not group.future.done():  # done: its caller has disconnected, or an earlier batch of it failed
                    part = group.take(self._max_tiles - len(tiles))
                    batch.append((group, len(part)))
                    tiles += part
                    self._metrics.waiting_tiles.dec(len(part))
                if group.future.done() or group.taken == len(group.tiles):
                    self._waiting.popleft()
                    self._metrics.waiting_tiles.dec(len(group.tiles) - group.taken)
            if not self._waiting:
                self._has_waiting.clear()
        self._metrics.batch_tiles.observe(len(tiles))
        return batch, tiles

    def _compute(self, batch: _Batch, staged: "Future[Tensor]") -> _Results:
        """Compute one batch on the device thread; the results are those of the groups that it completes or fails."""
        with self._trace.span("encode", tiles=sum(count for _, count in batch), calls=len(batch)):
            features = self._result_or_error(lambda: self._encoder.forward(staged.result()))
            if isinstance(features, errors.DvdError):
                return [(group, features) for group, _ in batch]
            results: _Results = []
            for (group, _), part in zip(batch, torch.split(features, [count for _, count in batch]), strict=True):
                group.features.append(part)
                if group.future.done():
                    group.features.clear()
                elif sum(map(len, group.features)) == len(group.tiles):
                    results.append((group, self._result_or_error(functools.partial(self._project, group))))
            return results

    def _project(self, group: _Group) -> list[ImageEmbedding]:
        embedding = self._encoder.project(torch.cat(group.features), group.index, group.policy)
        group.features.clear()
        group.routing_seconds = embedding.routing_seconds
        tokens = torch.cat(embedding.blocks).to(group.dtype)
        if not bool(torch.isfinite(tokens).all()):
            raise errors.InternalError(
                f"the vision tower computed infinite or undefined values in {tokens.dtype}; run it in bfloat16 or float32"
            )
        rows = [len(block) for block in embedding.blocks]
        return _split_by_image(group.images, tokens.cpu(), rows, embedding.compressed, embedding.scores)

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

    def _set_results(self, computed: "asyncio.Future[_Results]") -> None:
        """Hand a batch's results to the callers, on the event loop."""
        self._slots.release()
        if computed.cancelled():
            return
        for group, result in computed.result():
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
    images: Sequence[Tiles], tokens: Tensor, rows: list[int], compressed: list[bool], scores: list[float]
) -> list[ImageEmbedding]:
    """Split a group's tokens [all rows, width] by image; `rows`, `compressed` and `scores` have an item per tile."""
    values = tokens.contiguous()
    result, first_tile, first_row = [], 0, 0
    for image in images:
        tiles = slice(first_tile, first_tile + len(image))
        count = sum(rows[tiles])
        data = values[first_row : first_row + count].view(torch.uint8).numpy().data.cast("B")
        result.append(ImageEmbedding(data, count, compressed[tiles], scores[tiles]))
        first_tile, first_row = first_tile + len(image), first_row + count
    return result
