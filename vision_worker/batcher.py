"""From calls to forward batches and back: the one owner of the queue, and the one thread that drives the device.

Batches hold tiles of any calls, up to a budget of tiles. What is decided over a whole group (its routes) waits until all
its tiles have been looked at, so neither batch boundaries nor neighbours change an embedding.
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

_AHEAD = 2
"""Batches under way: one on the device, the next one ready. More would go stale, and hold callers who have left."""


@dataclass(frozen=True)
class Encoded:
    """One image: `data` holds rows × width values; `scores` is empty where the router was not asked."""

    data: memoryview
    rows: int
    compressed: list[bool]
    scores: list[float]


@dataclass(frozen=True)
class Answer:
    """A group's images in order, and the seconds its tiles waited, were computed and routed."""

    images: list[Encoded]
    queue: float
    encode: float
    route: float


@dataclass(eq=False)
class _Group:
    """One call. Equal tiles (blank margins, a repeated image) are looked at once: `copies[i]` is the distinct one of tile i.

    That also keeps ties exact: the same pixels at two places of two batches may differ by rounding.
    """

    images: Sequence[Tiles]
    policy: Policy
    dtype: torch.dtype
    future: "asyncio.Future[Answer]"
    arrived: float = field(default_factory=time.monotonic)
    started: float = 0.0
    taken: int = 0  # tiles handed to batches
    features: list[Tensor] = field(default_factory=list)  # the device thread's
    routing: float = 0.0  # likewise

    def __post_init__(self) -> None:
        hashes = [value for image in self.images for value in image.hashes]
        distinct: dict[int, npt.NDArray[np.uint8]] = {}
        for value, pixels in zip(hashes, (tile for image in self.images for tile in image.pixels), strict=True):
            distinct.setdefault(value, pixels)
        places = {value: place for place, value in enumerate(distinct)}
        self.tiles = list(distinct.values())
        self.copies = [places[value] for value in hashes]

    def take(self, most: int) -> list[npt.NDArray[np.uint8]]:
        self.started = self.started or time.monotonic()
        some = self.tiles[self.taken : self.taken + most]
        self.taken += len(some)
        return some


_Batch = list[tuple[_Group, int]]
_Settled = list[tuple[_Group, list[Encoded] | errors.DvdError]]


class Batcher:
    """`async with Batcher(encoder, max_tiles) as batcher: await batcher.encode(…)`.

    `lost` is set when the device computes nothing any more: the process has to end, and another one to begin.
    """

    def __init__(self, encoder: Encoder, max_tiles: int, metrics: Metrics | None = None, trace: Trace | None = None) -> None:
        self._encoder, self._metrics, self._trace = encoder, metrics or Metrics(), trace or Trace(None, "vision")
        self._max_tiles = max_tiles
        self._waiting: deque[_Group] = deque()
        self._arrived, self.lost = asyncio.Event(), asyncio.Event()
        self._slots = asyncio.Semaphore(_AHEAD)
        self._stager = ThreadPoolExecutor(1, "stager")
        self._device = ThreadPoolExecutor(1, "device")

    async def __aenter__(self) -> "Batcher":
        self._owner = asyncio.create_task(self._own())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._owner.cancel()
        for executor in (self._stager, self._device):
            executor.shutdown(wait=False, cancel_futures=True)

    async def warm(self) -> None:
        """Run batches of every size that the encoder wants to have seen, on the device thread."""
        side = self._encoder.checkpoint.description.tower.image_size
        blank = np.zeros((side, side, 3), dtype=np.uint8)
        policies = [Fixed(False), *([Fixed(True)] if self._encoder.checkpoint.description.thresholds else [])]

        def run() -> None:
            for size in self._encoder.sizes(self._max_tiles):
                features = self._encoder.forward(self._encoder.stage([blank] * size))
            for policy in policies:
                self._encoder.project(features, range(len(features)), policy)

        await asyncio.get_running_loop().run_in_executor(self._device, run)

    async def encode(self, images: Sequence[Tiles], policy: Policy, dtype: torch.dtype) -> Answer:
        """Embed one group. A caller that is cancelled leaves the queue. Raises `InternalError`."""
        group = _Group(images, policy, dtype, asyncio.get_running_loop().create_future())
        self._waiting.append(group)
        self._metrics.waiting_tiles.inc(len(group.tiles))
        self._arrived.set()
        return await group.future

    async def _own(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._slots.acquire()
            batch, tiles = await self._form()
            staged = self._stager.submit(self._encoder.stage, tiles)
            computed = loop.run_in_executor(self._device, self._compute, batch, staged)
            computed.add_done_callback(self._settle)

    async def _form(self) -> tuple[_Batch, list[npt.NDArray[np.uint8]]]:
        """Wait for tiles, then take as many as are there and the budget allows."""
        batch: _Batch = []
        tiles: list[npt.NDArray[np.uint8]] = []
        while not tiles:
            await self._arrived.wait()
            while self._waiting and len(tiles) < self._max_tiles:
                group = self._waiting[0]
                if not group.future.done():  # else its caller has left, or an earlier batch of it failed
                    some = group.take(self._max_tiles - len(tiles))
                    batch.append((group, len(some)))
                    tiles += some
                    self._metrics.waiting_tiles.dec(len(some))
                if group.future.done() or group.taken == len(group.tiles):
                    self._waiting.popleft()
                    self._metrics.waiting_tiles.dec(len(group.tiles) - group.taken)
            if not self._waiting:
                self._arrived.clear()
        self._metrics.batch_tiles.observe(len(tiles))
        return batch, tiles

    def _compute(self, batch: _Batch, staged: "Future[Tensor]") -> _Settled:
        """Device thread: look at a batch, and finish the groups that it completes."""
        with self._trace.span("encode", tiles=sum(count for _, count in batch), calls=len(batch)):
            return self._looked(batch, staged)

    def _looked(self, batch: _Batch, staged: "Future[Tensor]") -> _Settled:
        features = self._guarded(lambda: self._encoder.forward(staged.result()))
        if isinstance(features, errors.DvdError):
            return [(group, features) for group, _ in batch]
        settled: _Settled = []
        for (group, _), part in zip(batch, torch.split(features, [count for _, count in batch]), strict=True):
            group.features.append(part)
            if group.future.done():
                group.features.clear()
            elif sum(map(len, group.features)) == len(group.tiles):
                settled.append((group, self._guarded(functools.partial(self._finish, group))))
        return settled

    def _finish(self, group: _Group) -> list[Encoded]:
        embedded = self._encoder.project(torch.cat(group.features), group.copies, group.policy)
        group.features.clear()
        group.routing = embedded.routing
        tokens = torch.cat(embedded.blocks).to(group.dtype)
        if not bool(torch.isfinite(tokens).all()):
            raise errors.InternalError(
                f"the vision tower gave infinite or undefined values in {tokens.dtype}; run it in bfloat16 or float32"
            )
        return _by_image(group.images, tokens.cpu(), [len(b) for b in embedded.blocks], embedded.compressed, embedded.scores)

    def _guarded(self, compute: Callable[[], Any]) -> Any:
        """The result, or the error that its callers get: nothing may end the device thread.

        `WorkerUnavailable` where the device is lost, as after an illegal access or a fault of its memory: another worker is asked.
        """
        try:
            return compute()
        except errors.DvdError as error:
            return error
        except Exception:
            log.exception("a batch failed")
            device = self._encoder.placement.device
            if _computes(device):
                return errors.InternalError("the vision worker failed on this batch; see its log")
            return errors.WorkerUnavailable(f"the vision worker's device {device} computes nothing any more; see its log")

    def _settle(self, computed: "asyncio.Future[_Settled]") -> None:
        self._slots.release()
        if computed.cancelled():
            return
        for group, result in computed.result():
            if isinstance(result, errors.WorkerUnavailable):
                self.lost.set()
            if group.future.done():
                continue
            if isinstance(result, errors.DvdError):
                group.future.set_exception(result)
            else:
                now = time.monotonic()
                computed_for = now - group.started - group.routing
                group.future.set_result(Answer(result, group.started - group.arrived, computed_for, group.routing))


def _computes(device: torch.device) -> bool:
    """Whether it still does: after some errors of CUDA nothing does any more in a process."""
    try:
        return float(torch.ones(1, device=device).sum()) == 1
    except torch.OutOfMemoryError:
        return True
    except RuntimeError:
        return False


def _by_image(
    images: Sequence[Tiles], tokens: Tensor, rows: list[int], compressed: list[bool], scores: list[float]
) -> list[Encoded]:
    values = tokens.contiguous()
    encoded, tile, row = [], 0, 0
    for image in images:
        here = slice(tile, tile + len(image))
        count = sum(rows[here])
        data = values[row : row + count].view(torch.uint8).numpy().data.cast("B")
        encoded.append(Encoded(data, count, compressed[here], scores[here]))
        tile, row = tile + len(image), row + count
    return encoded
