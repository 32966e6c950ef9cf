"""The InternVL family, all generations: InternViT, pixel shuffle, a projector per resolution and, in Flash, the router.

Source: `modeling_internvl_chat.py` of OpenGVLab's checkpoints (`extract_feature`, `pixel_shuffle`; in InternVL3.5-Flash also
`mlp2`, `pooling_before_gating` and `gating`).
"""

import functools
import itertools
import time
from collections.abc import Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from common.checkpoint import Checkpoint, CheckpointError
from common.layouts.base import Description
from common.tiling import Tiling
from vision_worker import weights
from vision_worker.encoder import FeatureGroup, GroupEmbedding, Placement, Stager, concatenate
from vision_worker.models import onednn
from vision_worker.models.compiled import CompiledTower
from vision_worker.models.intern_vit import InternViT
from vision_worker.models.recorded import RecordedTower
from vision_worker.models.vir import Gating, Pooling
from vision_worker.preprocessing import tiling

_MEAN = (0.485, 0.456, 0.406)
_STANDARD_DEVIATION = (0.229, 0.224, 0.225)
_TILES_PER_PASS = 32
"""Tiles that the router or a projector processes at a time, to limit their memory for large groups."""


class Model(nn.Module):
    """All vision parameters of a checkpoint, under OpenGVLab's names. `positions`: see `InternViT`."""

    def __init__(self, description: Description, positions: int) -> None:
        super().__init__()
        features, width = description.tower.hidden_size, description.width
        self.vision_model = InternViT(description.tower, positions)
        self.mlp1 = build_projector(round(features / description.downsample_ratio**2), width)
        if description.thresholds:
            self.mlp2 = build_compressing_projector(round(4 * features / description.downsample_ratio**2), width)
            self.pooling_before_gating = Pooling(features)
            self.gating = Gating(features)


def build_projector(features: int, width: int) -> nn.Sequential:
    """The projector of tiles that are kept, `mlp1`: from gathered features to the language model's width."""
    return nn.Sequential(nn.LayerNorm(features), nn.Linear(features, width), nn.GELU(), nn.Linear(width, width))


def build_compressing_projector(features: int, width: int) -> nn.Sequential:
    """The projector of compressed tiles, `mlp2` of a Flash checkpoint: from gathered features to the language model's width."""
    # nn.Identity stands where training had dropout, so that the layers keep the checkpoint's numbers
    return nn.Sequential(
        nn.LayerNorm(features),
        nn.Linear(features, 2 * width), nn.GELU(), nn.Identity(),
        nn.Linear(2 * width, 2 * width), nn.GELU(), nn.Identity(),
        nn.Linear(2 * width, width),
    )  # fmt: skip


def pixel_shuffle(features: Tensor, factor: float, version: str) -> Tensor:
    """Gather squares of a square feature map into fewer, wider tokens.

    Args:
        features: [n, side², c].
        factor: 0.5 or 0.25, the ratio of the new side to the old one.
        version: the checkpoint's `ps_version`; "v1" leaves the map transposed, "v2" does not.

    Returns: [n, side²·factor², c/factor²].
    """
    n, patches, width = features.shape
    side = round(patches**0.5)
    new_side, row_width = round(side * factor), round(width / factor)
    x = features.view(n, side, new_side, row_width).permute(0, 2, 1, 3)
    x = x.reshape(n, new_side, new_side, round(row_width / factor))
    return (x.permute(0, 2, 1, 3) if version == "v2" else x).flatten(1, 2)


@functools.cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation on a device, [3, 1, 1]. To copy them for each batch would wait for the batch before."""
    with torch.inference_mode(False):
        return tuple(torch.tensor(values, device=device).view(3, 1, 1) for values in (_MEAN, _STANDARD_DEVIATION))  # type: ignore[return-value]


def normalize(pixels: Tensor) -> Tensor:
    """uint8 [n, side, side, 3] to float32 [n, 3, side, side], by ImageNet's mean and standard deviation.

    The order of operations is that of the official preprocessing, so the results are equal bit for bit.
    """
    mean, deviation = _constants(pixels.device)
    return pixels.permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(deviation)


class InternVL:
    """One loaded checkpoint: the `Encoder` of this family."""

    def __init__(self, checkpoint: Checkpoint, placement: Placement, model: Model) -> None:
        self.checkpoint, self.placement, self.model = checkpoint, placement, model.eval()
        self.stage = Stager(placement.device).stage
        tower = model.vision_model
        self._tower: InternViT | CompiledTower | RecordedTower = CompiledTower(tower) if placement.is_compiled else tower
        if placement.record_for:
            self._tower = RecordedTower(self._tower, placement.record_for)

    def warmup_batch_sizes(self, max_tiles: int) -> Sequence[int]:
        """Every size that is recorded; of a compiled tower one tile and the largest batch; otherwise the largest batch."""
        if isinstance(self._tower, RecordedTower):
            return self._tower.warmup_sizes
        return CompiledTower.warmup_sizes(max_tiles) if self.placement.is_compiled else [max_tiles]

    def prepare(self, image: npt.NDArray[np.uint8], options: Tiling) -> tiling.Tiles:
        """See `Encoder.prepare`."""
        return tiling.cut(image, options)

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> Tensor:
        """The tower's features [n, patches, width of the tower] of staged tiles."""
        return cast(Tensor, self._tower(normalize(pixels).to(self.placement.dtype)))

    @torch.inference_mode()
    def project(self, groups: Sequence[FeatureGroup]) -> list[GroupEmbedding]:
        """See `Encoder.project`."""
        started = time.monotonic()
        scores = self._scores_by_group(groups)
        routes = [group.policy.route(values).tolist() for group, values in zip(groups, scores, strict=True)]
        routing_seconds = time.monotonic() - started
        # equal tiles have equal scores, hence equal routes
        by_feature = [dict(zip(group.index, route, strict=True)) for group, route in zip(groups, routes, strict=True)]
        compressed = [route[i] for route in by_feature for i in range(len(route))]
        blocks = iter(self._project_tiles(concatenate([group.features for group in groups]), compressed))
        embeddings = []
        for group, route, values in zip(groups, routes, scores, strict=True):
            distinct = list(itertools.islice(blocks, len(group.features)))
            reported = values.tolist() if group.policy.needs_scores else []
            embeddings.append(GroupEmbedding([distinct[i] for i in group.index], route, reported, routing_seconds))
        return embeddings

    def _scores_by_group(self, groups: Sequence[FeatureGroup]) -> list[Tensor]:
        """The score of each tile of each group, float32 on the CPU; zeros where the policy needs none."""
        routed = [group.features for group in groups if group.policy.needs_scores]
        # as arrays: each of torch's functions hands the interpreter to another thread, which is slow for many small groups
        scores = self.scores(concatenate(routed)).numpy() if routed else np.empty(0, np.float32)
        result, first = [], 0
        for group in groups:
            if group.policy.needs_scores:
                result.append(torch.from_numpy(scores[first : first + len(group.features)][list(group.index)]))
                first += len(group.features)
            else:
                result.append(torch.zeros(len(group.index)))
        return result

    def scores(self, features: Tensor) -> Tensor:
        """The router's probability of "compress" for each tile, float32 [n] on the CPU."""
        model = self.model
        parts = torch.split(features, _TILES_PER_PASS)
        logits = torch.cat([model.gating(model.pooling_before_gating(part)) for part in parts])
        return logits.float().softmax(-1)[:, 0].cpu()

    def _project_tiles(self, features: Tensor, compressed: Sequence[bool]) -> list[Tensor]:
        """Visual tokens [256 or 64, width] of each tile; a projector runs only on the tiles of its resolution."""
        description = self.checkpoint.description
        blocks: dict[int, Tensor] = {}
        for compress, factor in ((False, description.downsample_ratio), (True, description.downsample_ratio / 2)):
            tiles = [i for i, is_compressed in enumerate(compressed) if is_compressed == compress]
            for start in range(0, len(tiles), _TILES_PER_PASS):
                part = tiles[start : start + _TILES_PER_PASS]
                projector = self.model.mlp2 if compress else self.model.mlp1
                tokens = projector(pixel_shuffle(features[part], factor, description.pixel_shuffle))
                blocks.update(zip(part, tokens, strict=True))
        return [blocks[i] for i in range(len(features))]


def load(checkpoint: Checkpoint, placement: Placement, dummy: bool = False) -> InternVL:
    """Build the model and load its weights; `dummy`: random weights instead.

    Raises: CheckpointError if a tensor is missing or the configuration requires a feature that is not implemented.
    """
    tower = checkpoint.description.tower
    default_positions = (tower.image_size // tower.patch_size) ** 2 + 1
    positions = (not dummy and weights.stored_positions(checkpoint)) or default_positions
    try:
        with torch.device("meta"):
            model = Model(checkpoint.description, positions)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"config.json of {str(checkpoint.path)!r} requires an unsupported feature: {error}") from None
    if dummy:
        weights.randomize(model, placement.device, placement.dtype)
    else:
        weights.load(model, checkpoint, placement.device, placement.dtype)
    _optimize(model, placement)
    return InternVL(checkpoint, placement, model)


def _optimize(model: Model, placement: Placement) -> None:
    if onednn.is_supported(placement.device, placement.dtype):
        for name, part in model.named_children():
            if not (name == "vision_model" and placement.is_compiled):  # torch's compiler chooses operators itself
                onednn.optimize(part)
