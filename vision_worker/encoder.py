"""The seam to a vision family. A new one is a file in `models/` with a `load` and a line in `FAMILIES`."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.checkpoint import Checkpoint, CheckpointError
from common.options import ConfigError
from common.tiling import Tiling
from vision_worker.config import VisionOptions
from vision_worker.models.vir import Policy
from vision_worker.preprocessing.tiling import Tiles
from vision_worker.weights import DTYPES

FAMILIES = {"internvl": "vision_worker.models.internvl", "fake": "vision_worker.models.fake"}

_BATCH_TILES = {"cpu": 4}
"""A CPU gains nothing from larger batches, and warms one before it is ready."""


@dataclass(frozen=True)
class Placement:
    """Where and in what a family computes."""

    device: torch.device
    dtype: torch.dtype
    compile_for: int = 0
    """Tiles in the largest batch that the tower is compiled for; 0: it is not."""

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Embedded:
    """A group's visual tokens, tile after tile. `scores` is empty where the policy asked for none; `routing`: seconds."""

    blocks: list[Tensor]  # one a tile, [tokens, width] each
    compressed: list[bool]
    scores: list[float]
    routing: float = 0.0


class Encoder(Protocol):
    """One checkpoint, loaded."""

    checkpoint: Checkpoint
    placement: Placement

    def sizes(self, largest: int) -> Sequence[int]:
        """Of batches to run once before the first request, in tiles."""

    def prepare(self, data: bytes, tiling: Tiling) -> Tiles:
        """Any thread. Raises `InvalidImage` or `ImageTooLarge`."""

    def stage(self, tiles: Sequence[npt.NDArray[np.uint8]]) -> Tensor:
        """Stager thread, while the device is busy with the batch before: tiles to uint8 [n, side, side, 3] on the device."""

    def forward(self, pixels: Tensor) -> Tensor:
        """Device thread: tiles as staged, of any groups, to features [n, …], each from its tile alone."""

    def project(self, features: Tensor, copies: Sequence[int], policy: Policy) -> Embedded:
        """Device thread: one whole group. `features` are of its distinct tiles; tile i of the group is `copies[i]`."""


def load(options: VisionOptions, checkpoint: Checkpoint) -> Encoder:
    """Raises `CheckpointError` or `ConfigError`."""
    family = importlib.import_module(FAMILIES[options.vision_backend])
    device = _device(options.device)
    largest = batch_tiles(options, device) if options.vision_compile else 0
    place = Placement(device, _dtype(options.vision_dtype, checkpoint), largest)
    return cast(Encoder, family.load(checkpoint, place, dummy=options.load_format == "dummy"))


def batch_tiles(options: VisionOptions, device: torch.device) -> int:
    """Tiles in one forward pass, at most."""
    return options.max_batch_tiles or _BATCH_TILES.get(device.type, 32)


class Stager:
    """Tiles to the device. Pinned memory and a stream of its own let a GPU's copy run beside its computing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def stage(self, tiles: Sequence[npt.NDArray[np.uint8]]) -> Tensor:
        """uint8 [n, side, side, 3], there when this returns."""
        pixels = torch.from_numpy(np.stack(tiles))
        if self._stream is None:
            return pixels.to(self._device)
        with torch.cuda.stream(self._stream):
            staged = pixels.pin_memory().to(self._device, non_blocking=True)
        self._stream.synchronize()  # this thread waits, not the one that drives the device
        staged.record_stream(torch.cuda.default_stream(self._device))  # who frees it last uses it on that one
        return staged


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ConfigError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return torch.device(name)


def _dtype(name: str, checkpoint: Checkpoint) -> torch.dtype:
    chosen = checkpoint.description.dtype if name == "auto" else name
    if chosen not in DTYPES:
        raise CheckpointError(f"config.json has dtype {chosen!r}: choose one with --vision-dtype")
    return DTYPES[chosen]
