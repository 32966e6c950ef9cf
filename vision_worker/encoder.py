"""The interface to a vision family: what the batcher and the service need from a loaded vision tower.

A family is a module in `vision_worker/models/` with a function `load(checkpoint, placement, dummy) -> Encoder`, a line in
`FAMILIES` and its name among the values of `--vision-backend` (`vision_worker/config.py`). docs/adding-a-vision-family.md
is the guide. Every family must pass `tests/vision_worker/test_encoder_contract.py`.

An image passes through an encoder in four steps, so that tiling, copying to the device and computing overlap:

    prepare   pixels of one image -> tiles                 a pool of threads, images in parallel
    stage     tiles of one batch -> pixels on the device   stager thread, while the device computes the batch before
    forward   pixels of one batch -> features              device thread, tiles of any requests together
    project   features of whole groups -> visual tokens    projector thread; a group is all images of one Encode call

On a GPU `forward` returns before the device has computed the batch, and the projector thread projects the batch before at the
same time. On a CPU the device thread also projects. `stage`, `forward` and `project` are each called by one thread at a time.
Errors: a `DvdError` reaches the callers as it is; any other exception fails the batch with `InternalError` and is logged.
"""

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
"""Modules of the families, by their name in `--vision-backend`."""

_DEFAULT_BATCH_TILES = {"cpu": 1}
"""By type of device. Larger batches are no faster on a CPU: a tile is a product of a thousand rows. They would only let callers
wait for each other, and delay readiness, since one runs before it."""


@dataclass(frozen=True)
class Placement:
    """The device and dtype that a family computes in."""

    device: torch.device
    dtype: torch.dtype
    is_compiled: bool = False
    """Whether torch compiles the tower."""
    record_for: int = 0
    """Tiles in the largest batch that CUDA graphs of the tower are recorded for; 0: none."""

    @property
    def is_prepared(self) -> bool:
        """Whether the tower is compiled or recorded for its batch sizes when they come first."""
        return self.is_compiled or self.record_for > 0

    @property
    def is_asynchronous(self) -> bool:
        """Whether the device computes behind the thread that gives it work."""
        return self.device.type == "cuda"

    @property
    def dtype_name(self) -> str:
        """The dtype without torch's prefix: `bfloat16`."""
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class FeatureGroup:
    """The features of one whole group.

    Attributes:
        features: of the group's distinct tiles, as `forward` returned them, [distinct, …]. Equal tiles of a group are computed
            once, so there may be fewer features than tiles.
        index: for each tile of the group, the index of its features in `features`.
        policy: decides which tiles are compressed. It sees the scores of all tiles, repeated ones included.
    """

    features: Tensor
    index: Sequence[int]
    policy: Policy


@dataclass(frozen=True)
class GroupEmbedding:
    """The visual tokens of one group, tile after tile.

    Attributes:
        blocks: one tensor [tokens, width] per tile, in the encoder's dtype on its device.
        compressed: whether each tile was compressed.
        scores: the router's score of each tile; empty where the policy needs none.
        routing_seconds: time for scores and policies, of all groups that were projected together.
    """

    blocks: list[Tensor]
    compressed: list[bool]
    scores: list[float]
    routing_seconds: float = 0.0


class Encoder(Protocol):
    """One checkpoint's vision tower and projectors, loaded."""

    checkpoint: Checkpoint
    """Its description determines the tile size, the tokens per tile and the width of this encoder."""

    placement: Placement

    def warmup_batch_sizes(self, max_tiles: int) -> Sequence[int]:
        """Sizes of the batches to run before the first request, in tiles, each at most `max_tiles`; at least one."""

    def prepare(self, image: npt.NDArray[np.uint8], options: Tiling) -> Tiles:
        """Cut one image, RGB [height, width, 3], into tiles. Called from several threads at once."""

    def stage(self, tiles: Sequence[npt.NDArray[np.uint8]]) -> Tensor:
        """Copy tiles [side, side, 3] to the device, uint8 [n, side, side, 3]; the copy is complete on return.

        Stager thread. All families so far use `Stager.stage`.
        """

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute features [n, …] of staged tiles. The features of a tile must not depend on the other tiles of the batch.

        Device thread. On a GPU it may return before the device has computed. n is between 1 and the batch limit; the tiles may
        belong to different requests. The batcher splits and concatenates the result along its first dimension only.
        """

    def project(self, groups: Sequence[FeatureGroup]) -> list[GroupEmbedding]:
        """Route each group and project its tiles to visual tokens.

        Projector thread. On a CPU it gets one group at a time. On a GPU it gets all that a batch completes: small kernels and
        waits for each of them would take longer than the tower. Groups must influence each other by rounding at most.
        """


def concatenate(features: Sequence[Tensor]) -> Tensor:
    """Join features along their first dimension. A single part is not copied."""
    return features[0] if len(features) == 1 else torch.cat(list(features))


def load(options: VisionOptions, checkpoint: Checkpoint) -> Encoder:
    """Load the family that `--vision-backend` names. Raises: CheckpointError, ConfigError."""
    family = importlib.import_module(FAMILIES[options.vision_backend])
    device = _device(options.device)
    recorded = max_batch_tiles(options, device) if device.type == "cuda" else 0
    dtype = _dtype(options.vision_dtype, checkpoint)
    placement = Placement(device, dtype, is_compiled=options.vision_compile, record_for=recorded)
    return cast(Encoder, family.load(checkpoint, placement, dummy=options.load_format == "dummy"))


def max_batch_tiles(options: VisionOptions, device: torch.device) -> int:
    """Maximum number of tiles in one forward pass: the option, or the device's default."""
    return options.max_batch_tiles or _DEFAULT_BATCH_TILES.get(device.type, 32)


class Stager:
    """Copies tiles to the device. Pinned memory and a separate stream let a GPU copy while it computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def stage(self, tiles: Sequence[npt.NDArray[np.uint8]]) -> Tensor:
        """See `Encoder.stage`."""
        pixels = torch.from_numpy(np.stack(tiles))
        if self._stream is None:
            return pixels.to(self._device)
        with torch.cuda.stream(self._stream):
            staged = pixels.pin_memory().to(self._device, non_blocking=True)
        self._stream.synchronize()  # blocks this thread, not the one that drives the device
        staged.record_stream(torch.cuda.default_stream(self._device))  # the stream that uses it last, before it is freed
        return staged


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        raise ConfigError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return torch.device(name)


def _dtype(name: str, checkpoint: Checkpoint) -> torch.dtype:
    name = checkpoint.description.dtype if name == "auto" else name
    if name not in DTYPES:
        raise CheckpointError(f"config.json has dtype {name!r}, which is not supported: choose one with --vision-dtype")
    return DTYPES[name]
