"""Copies of tiles to the device: bytes/s from pinned memory, and how much of their time a running tower hides."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.kit import Kit, Measurement
from benchmarks.gpu.shapes import Shape
from benchmarks.gpu.timing import measure_seconds, rate, run_seconds
from benchmarks.gpu.towers import dtype_of, random_tower
from vision_worker.encoder import Stager
from vision_worker.models.internvl import normalize

_BATCHES = 12
_TILES = 32


def measurements(kit: Kit, shape: Shape) -> Iterator[Measurement]:
    """Yield one measurement."""
    yield Measurement(f"copies beside the tower {shape.name}", 25, lambda: _measure(kit, shape))


def _measure(kit: Kit, shape: Shape) -> dict[str, Any]:
    tiles = [np.zeros((shape.tower.image_size, shape.tower.image_size, 3), np.uint8)] * (4 if kit.dry else _TILES)
    batches = 2 if kit.dry else _BATCHES
    stager, tower, dtype = Stager(kit.device), random_tower(shape, kit.device), dtype_of(kit.device)
    copied = rate(sum(tile.nbytes for tile in tiles), measure_seconds(lambda: stager.stage(tiles), kit.device, 1.0))
    staged = stager.stage(tiles)

    @torch.inference_mode()
    def forward() -> None:
        tower(normalize(staged).to(dtype))

    forward()
    alone = run_seconds(lambda: [forward() for _ in range(batches)], kit.device)
    in_turn = sum(run_seconds(lambda: (stager.stage(tiles), forward()), kit.device) for _ in range(batches))
    beside = run_seconds(lambda: _run_beside(lambda: stager.stage(tiles), forward, batches), kit.device)
    return {
        "GB/s": round(copied["per second"] / 1e9, 3), "tower alone, s": round(alone, 4),
        "copies and tower in turn, s": round(in_turn, 4), "copies beside the tower, s": round(beside, 4),
        "tower alone / beside": round(alone / beside, 3),
    }  # fmt: skip


def _run_beside(stage: Callable[[], Any], forward: Callable[[], None], batches: int) -> None:
    """Stage all batches in a thread while this one runs the tower, as a vision worker does."""
    thread = threading.Thread(target=lambda: [stage() for _ in range(batches)])
    thread.start()
    for _ in range(batches):
        forward()
    thread.join()
