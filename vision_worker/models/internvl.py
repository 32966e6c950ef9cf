"""The InternVL family, every generation: InternViT, pixel shuffle, one projector a resolution, and in Flash the router."""

import time
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from common.checkpoint import Checkpoint, CheckpointError
from common.layouts.base import Description
from common.tiling import Tiling
from vision_worker import weights
from vision_worker.encoder import Embedded, Placement, Stager
from vision_worker.models.compiled import Compiled
from vision_worker.models.intern_vit import InternViT
from vision_worker.models.onednn import Linear
from vision_worker.models.vir import Gating, Policy, Pooling
from vision_worker.preprocessing import tiling

_MEAN = (0.485, 0.456, 0.406)
_DEVIATION = (0.229, 0.224, 0.225)
_STEP = 16
"""Tiles a router or a projector takes at once: bounds their memory for a group of any size."""


class Model(nn.Module):
    """The parameters, under OpenGVLab's names. `positions`: see `InternViT`."""

    def __init__(self, said: Description, positions: int) -> None:
        super().__init__()
        features, width = said.tower.hidden_size, said.width
        self.vision_model = InternViT(said.tower, positions)
        self.mlp1 = _projector(round(features / said.downsample_ratio**2), width)
        if said.thresholds:
            self.mlp2 = _compressing_projector(round(4 * features / said.downsample_ratio**2), width)
            self.pooling_before_gating = Pooling(features)
            self.gating = Gating(features)


def _projector(features: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(features), Linear(features, width), nn.GELU(), Linear(width, width))


def _compressing_projector(features: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(features),
        Linear(features, 2 * width), nn.GELU(), nn.Identity(),
        Linear(2 * width, 2 * width), nn.GELU(), nn.Identity(),
        Linear(2 * width, width),
    )  # fmt: skip


def pixel_shuffle(features: Tensor, factor: float, version: str) -> Tensor:
    """Features [n, side², c] of a square map to [n, side²·factor², c/factor²]. "v1" leaves the map transposed."""
    n, patches, width = features.shape
    side = round(patches**0.5)
    small, wide = round(side * factor), round(width / factor)
    x = features.view(n, side, small, wide).permute(0, 2, 1, 3)
    x = x.reshape(n, small, small, round(wide / factor))
    return (x.permute(0, 2, 1, 3) if version == "v2" else x).flatten(1, 2)


def normalised(pixels: Tensor) -> Tensor:
    """uint8 [n, side, side, 3] to float32 [n, 3, side, side]; the order of operations is the official one, to the bit."""
    mean = torch.tensor(_MEAN, device=pixels.device).view(3, 1, 1)
    deviation = torch.tensor(_DEVIATION, device=pixels.device).view(3, 1, 1)
    return pixels.permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(deviation)


class InternVL:
    def __init__(self, checkpoint: Checkpoint, place: Placement, model: Model) -> None:
        self.checkpoint, self.placement, self.model = checkpoint, place, model.eval()
        self.stage = Stager(place.device).stage
        self._tower = Compiled(model.vision_model, place.compile_for, place.device) if place.compile_for else model.vision_model

    def sizes(self, largest: int) -> Sequence[int]:
        return self._tower.to_warm if isinstance(self._tower, Compiled) else [largest]

    def prepare(self, data: bytes, options: Tiling) -> tiling.Tiles:
        return tiling.cut(data, options)

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> Tensor:
        """Features [n, patches, width of the tower]."""
        return cast(Tensor, self._tower(normalised(pixels).to(self.placement.dtype)))

    @torch.inference_mode()
    def project(self, features: Tensor, copies: Sequence[int], policy: Policy) -> Embedded:
        if features.is_cuda:
            # the tower may still compute, which is not the router's time
            torch.cuda.current_stream(features.device).synchronize()
        began = time.monotonic()
        scores = self.scores(features)[list(copies)] if policy.needs_scores else torch.zeros(len(copies))
        compressed = policy.route(scores).tolist()
        routing = time.monotonic() - began
        routed = dict(zip(copies, compressed, strict=True))  # equal tiles have equal scores, hence equal routes
        blocks = self._projected(features, [routed[i] for i in range(len(features))])
        return Embedded([blocks[i] for i in copies], compressed, scores.tolist() if policy.needs_scores else [], routing)

    def scores(self, features: Tensor) -> Tensor:
        """The router's probability of "compress", float32 [n] on the CPU."""
        model = self.model
        logits = torch.cat([model.gating(model.pooling_before_gating(part)) for part in torch.split(features, _STEP)])
        return logits.float().softmax(-1)[:, 0].cpu()

    def _projected(self, features: Tensor, compressed: Sequence[bool]) -> list[Tensor]:
        """Tokens [256 or 64, width] of each tile; a projector sees only the tiles of its resolution."""
        said = self.checkpoint.description
        blocks: dict[int, Tensor] = {}
        for resolution, factor in ((False, said.downsample_ratio), (True, said.downsample_ratio / 2)):
            chosen = [i for i, small in enumerate(compressed) if small == resolution]
            for start in range(0, len(chosen), _STEP):
                some = chosen[start : start + _STEP]
                projector = self.model.mlp2 if resolution else self.model.mlp1
                blocks.update(zip(some, projector(pixel_shuffle(features[some], factor, said.pixel_shuffle)), strict=True))
        return [blocks[i] for i in range(len(features))]


def load(checkpoint: Checkpoint, place: Placement, dummy: bool = False) -> InternVL:
    """Raises `CheckpointError`."""
    tower = checkpoint.description.tower
    trained = (tower.image_size // tower.patch_size) ** 2 + 1
    try:
        with torch.device("meta"):
            model = Model(checkpoint.description, (not dummy and weights.positions(checkpoint)) or trained)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"config.json of {str(checkpoint.path)!r} asks for what is not built: {error}") from None
    if dummy:
        weights.randomise(model, place.device, place.dtype)
    else:
        weights.load(model, checkpoint, place.device, place.dtype)
    return InternVL(checkpoint, place, model)
