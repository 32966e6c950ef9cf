"""Losses on hidden states of the language model: where two images differ, and ordinals of digits and shapes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from demo.batches.types import ConversationBatch, PatchTargets
from demo.model.demo_model import EncodedPrefix
from demo.scenes.scene import PATCH_PIXELS
from demo.training.patch_heads import MAX_COUNT, MAX_DIGITS, PatchHeads
from demo.training.token_maps import digit_maps, shape_centre_maps, sum_over_tokens

_CHANGED_PIXEL = 30
"""Difference of a colour channel above which a pixel counts as changed."""


def difference_loss(heads: PatchHeads, prefix: EncodedPrefix, batch: ConversationBatch) -> Tensor:
    """Binary cross entropy of whether the images of a pair differ, for each visual token of the second image.

    One yes or no per pair is little to learn from. Both classes have equal weight.
    """
    side = batch.tiles.shape[1]
    images, tiles = batch.compressed.shape
    pixels = batch.tiles.view(images // 2, 2, tiles, side, side, 3).short()
    changed = ((pixels[:, 0] - pixels[:, 1]).abs().amax(-1) > _CHANGED_PIXEL).float()  # [pairs, tiles, side, side]
    token_pixels = (torch.where(batch.compressed[1::2], 4, 2) * PATCH_PIXELS).tolist()
    targets = torch.stack([
        torch.cat([F.max_pool2d(tile[None], span).flatten() for tile, span in zip(pair, spans, strict=True)])
        for pair, spans in zip(changed, token_pixels, strict=True)
    ])  # fmt: skip
    end = prefix.hidden.shape[1] - len(batch.closing)
    logits = heads.difference(prefix.hidden[:, end - targets.shape[1] : end])[..., 0]
    share = targets.mean().clamp(0.02, 0.98)
    weights = torch.where(targets > 0, 0.5 / share, 0.5 / (1 - share))
    return F.binary_cross_entropy_with_logits(logits, targets, weights)


def ordinal_loss(
    heads: PatchHeads, prefix: EncodedPrefix, batch: ConversationBatch, targets: PatchTargets
) -> tuple[Tensor, dict[str, float]]:
    """Cross entropy of the ordinals of digits and shapes, and figures for the log. Every prefix has one image.

    A number that a tile border cuts is read in order only if each token knows its digit's index. Counting happens token
    by token in the tile that shows the whole scene.
    """
    hidden = prefix.hidden[:, len(batch.opening) : prefix.hidden.shape[1] - len(batch.closing)]
    logits = heads.ordinals(hidden)
    total, figures = logits.sum() * 0, dict[str, float]()
    ordinals = token_ordinals(targets, batch.compressed)
    for name, part, target in zip(
        ("digit index", "shape ordinal"), logits.split([MAX_DIGITS, MAX_COUNT], dim=-1), ordinals, strict=True
    ):
        known = target >= 0
        if bool(known.any()):
            total = total + F.cross_entropy(part[known], target[known])
            figures[name] = float((part[known].argmax(-1) == target[known]).float().mean())
    return total, figures


def token_ordinals(targets: PatchTargets, compressed: Tensor) -> tuple[Tensor, Tensor]:
    """Return two labels of each visual token, int64 [images, tokens] each.

    The first is the index of its digit in the number, the second the index of its shape among those of the same kind,
    from 0 to 5, in token order. −1 for neither, and for tokens with two digits or two centres.
    """
    digits = sum_over_tokens(digit_maps(targets), compressed) > 0
    digit_index = torch.where(digits.sum(1) == 1, digits.int().argmax(1), -1)
    centres = sum_over_tokens(shape_centre_maps(targets), compressed)
    running_count = (centres.cumsum(2) * centres).amax(1)
    known = (centres.sum(1) == 1) & (running_count <= MAX_COUNT)
    return digit_index, torch.where(known, running_count - 1, -1).long()
