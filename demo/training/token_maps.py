"""Patch labels as maps over patches, and their sums over visual tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from demo.batches.types import PatchTargets
from demo.scenes.labels import FIRST_SHAPE, LAST_SHAPE


def shape_maps(targets: PatchTargets) -> Tensor:
    """Return 1 where a shape is, by kind, [tiles, 6, patches]."""
    known = (targets.kind >= FIRST_SHAPE) & (targets.kind <= LAST_SHAPE)
    return F.one_hot(torch.where(known, targets.kind, 0), LAST_SHAPE + 1)[..., 1:].mT.float()


def shape_centre_maps(targets: PatchTargets) -> Tensor:
    """Return 1 at the centre patch of each shape, by kind, [tiles, 6, patches]. Only tiles with the whole scene have any."""
    return shape_maps(targets) * ((targets.centre == 1) & (targets.position >= 0))[:, None]


def digit_maps(targets: PatchTargets) -> Tensor:
    """Return 1 where a digit is, by its index in the number, [tiles, 4, patches]."""
    return F.one_hot(targets.digit_index + 1, 5)[..., 1:].mT.float()


def sum_over_tokens(maps: Tensor, compressed: Tensor) -> Tensor:
    """Sum maps over the patches of each visual token, [images, n, tokens].

    Args:
        maps: Whole numbers, [images · tiles, n, patches].
        compressed: bool [images, tiles]: which tiles have tokens of 4 × 4 patches, and not of 2 × 2.
    """
    images, tiles = compressed.shape
    side = round(maps.shape[-1] ** 0.5)
    sums = []
    for tile, short in zip(maps.view(*maps.shape[:2], side, side), compressed.flatten().tolist(), strict=True):
        span = 4 if short else 2
        sums.append((F.avg_pool2d(tile, span) * span**2).round().flatten(1))
    return torch.stack([torch.cat(sums[i * tiles : (i + 1) * tiles], dim=1) for i in range(images)])
