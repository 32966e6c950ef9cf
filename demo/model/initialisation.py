"""Initial weights of the vision model: heads that attend to neighbouring patches, and cosine filters for the patches."""

import math
from typing import cast

import torch
from torch import Tensor, nn

from demo.model.config import VISION_HEADS, VISION_WIDTH
from demo.scenes.scene import PATCH_PIXELS, TILE_PATCHES
from vision_worker.models.intern_vit import InternViT, Layer
from vision_worker.models.internvl import Model

_FREQUENCIES = 12
"""Per axis. Positions start in dimensions of their own, so that they do not blur what a patch shows."""
_HEAD_OFFSETS = (
    ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, -1)),
    ((1, -1), (-1, 1), (0, 2), (0, -2), (2, 0), (-2, 0)),
)
"""For each head of the first two layers: rows and columns to the patch that it attends to at first."""


def initialise_vision(vision: Model) -> None:
    """Set the initial weights of tower, projectors and router."""
    vision.apply(_initialise_module)
    nn.init.normal_(vision.pooling_before_gating.query_token, std=0.02)
    _initialise_local_attention(vision.vision_model)


def _initialise_module(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=min(0.05, (1 / module.in_features) ** 0.5))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    for name, tensor in module.named_parameters(recurse=False):
        if name == "in_proj_weight":
            nn.init.xavier_uniform_(tensor)
        if name == "in_proj_bias":
            nn.init.zeros_(tensor)


@torch.no_grad()
def _initialise_local_attention(tower: InternViT) -> None:
    """Make the heads of two layers attend to a neighbouring patch, much like a convolution.

    Positions start as sines and cosines of both coordinates. A head attends to the patch at `offset` if its query is its
    own position rotated by the offset. From random weights, a tower this small finds its neighbours very late. The idea
    is that of ConViT (d'Ascoli et al. 2021); here it is only the starting point of training.
    """
    frequencies = 2 * 30.0 ** (-torch.arange(_FREQUENCIES) / _FREQUENCIES)
    phases = torch.arange(TILE_PATCHES)[:, None] * frequencies
    line = torch.cat([phases.sin(), phases.cos()], dim=1)
    rows, columns = line[:, None].expand(TILE_PATCHES, TILE_PATCHES, -1), line[None].expand(TILE_PATCHES, TILE_PATCHES, -1)
    dimensions = 4 * _FREQUENCIES
    tower.embeddings.position_embedding[0, 1:] = 0
    tower.embeddings.position_embedding[0, 1:, :dimensions] = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    tower.embeddings.patch_embedding.weight.zero_()
    tower.embeddings.patch_embedding.weight[dimensions:] = _cosine_filters(VISION_WIDTH - dimensions)
    nn.init.zeros_(cast(Tensor, tower.embeddings.patch_embedding.bias))
    for layer, offsets in zip(tower.encoder.layers, _HEAD_OFFSETS, strict=False):
        for head, offset in enumerate(offsets):
            _aim_head(cast(Layer, layer).attn.qkv.weight, head, offset, frequencies)


def _aim_head(qkv: Tensor, head: int, offset: tuple[int, int], frequencies: Tensor) -> None:
    """Set query and key of one head so that it attends to the patch at `offset` (rows, columns)."""
    width = VISION_WIDTH // VISION_HEADS
    query, key = qkv[head * width : (head + 1) * width], qkv[VISION_WIDTH + head * width : VISION_WIDTH + (head + 1) * width]
    query[:] = key[:] = 0
    gain, row = 1.0, 0
    for axis, distance in enumerate(offset):
        for i in range(width // 4):  # the highest frequencies
            sine, cosine = (2 * axis) * _FREQUENCIES + i, (2 * axis + 1) * _FREQUENCIES + i
            angle = float(frequencies[i]) * distance
            key[row, sine] = key[row + 1, cosine] = gain
            query[row, sine], query[row, cosine] = gain * math.cos(angle), gain * math.sin(angle)
            query[row + 1, cosine], query[row + 1, sine] = gain * math.cos(angle), -gain * math.sin(angle)
            row += 2


def _cosine_filters(count: int) -> Tensor:
    """Return the lowest two-dimensional cosines of brightness and of two colour differences.

    Shape [count, 3, PATCH_PIXELS, PATCH_PIXELS].
    """
    phases = (torch.arange(PATCH_PIXELS) + 0.5) * math.pi / PATCH_PIXELS
    colours = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]])
    colours = colours / colours.norm(dim=1, keepdim=True)
    order = sorted(((u, v) for u in range(PATCH_PIXELS) for v in range(PATCH_PIXELS)), key=lambda f: (f[0] ** 2 + f[1] ** 2, f))
    waves = [torch.outer((u * phases).cos(), (v * phases).cos()) for u, v in order[: count // 3]]
    scaled = [wave / wave.norm() * (0.03 if i == 0 else 0.8) for i, wave in enumerate(waves)]  # most patches are flat
    return torch.cat([torch.einsum("c,hw->chw", colour, wave)[None] for wave in scaled for colour in colours])
