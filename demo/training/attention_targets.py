"""Where the language model should attend to, derived from the patch labels."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from demo.batches.types import ConversationBatch, PatchTargets
from demo.scenes.scene import PATCH_PIXELS
from demo.training.token_maps import digit_maps, shape_centre_maps, shape_maps, sum_over_tokens

FIRST_TOKEN_WEIGHT = 2.0
"""Attention of the first token, in shapes. Its share then tells how many shapes there are."""


@dataclass
class AttentionTarget:
    """The target distribution of one query over sets of tokens.

    Attributes:
        prefix: Index of the prefix that the query belongs to.
        row: Index of the query's token in its row.
        sets: Index of the set of each token of the prefix, −1 for none, [prefix tokens].
        shares: Attention that each set should get, [sets]. Their sum is 1.
    """

    prefix: int
    row: int
    sets: Tensor
    shares: Tensor


def counting_targets(batch: ConversationBatch, targets: PatchTargets) -> Iterator[AttentionTarget]:
    """Yield a target for each counting question: an equal share for each shape of the kind, and one for the first token.

    Shapes count in the tile that shows the whole scene. Questions with shapes too thin to be labelled there have no
    target. Every prefix has one image.
    """
    centres = sum_over_tokens(shape_centre_maps(targets), batch.compressed)
    areas = sum_over_tokens(shape_maps(targets), batch.compressed)
    for index, (task, (kind, count)) in enumerate(zip(batch.tasks, batch.counted, strict=True)):
        if task != "count":
            continue
        prefix, row = _answer_positions(batch, index)[0]
        side = batch.tiles.shape[1] // PATCH_PIXELS // (4 if batch.compressed[prefix, -1] else 2)
        centre, area = (maps[prefix, kind - 1, -side * side :] for maps in (centres, areas))
        if int(centre.sum()) == count:
            before = len(batch.opening) + centres.shape[-1] - side * side
            sets = F.pad(_nearest_centres(centre, area > 0, side), (before, len(batch.closing)), value=-1)
            sets[0] = 0
            weights = torch.cat([centre.new_tensor([FIRST_TOKEN_WEIGHT]), centre[centre > 0]])
            yield AttentionTarget(prefix, row, sets, weights / (FIRST_TOKEN_WEIGHT + count))


def reading_targets(batch: ConversationBatch, targets: PatchTargets) -> Iterator[AttentionTarget]:
    """Yield a target for each digit of each number: all tokens that show the digit of that index, in any tile."""
    digits = sum_over_tokens(digit_maps(targets), batch.compressed)
    for index, task in enumerate(batch.tasks):
        if task != "number":
            continue
        for digit_index, (prefix, row) in enumerate(_answer_positions(batch, index)[:-1]):
            shown = F.pad(digits[prefix, digit_index], (len(batch.opening), len(batch.closing))) > 0
            if bool(shown.any()):
                yield AttentionTarget(prefix, row, shown.long() - 1, torch.ones(1, device=shown.device))


def _nearest_centres(centres: Tensor, area: Tensor, side: int) -> Tensor:
    """Assign each token of a tile that the kind covers to the nearest token with a centre.

    Args:
        centres: Number of centres in each token, [side²].
        area: bool [side²]: whether the kind covers the token.
        side: Tokens per side of the tile.

    Returns:
        The centre's index from 1, or −1 for other tokens, [side²].
    """
    nearest = torch.full_like(centres, -1, dtype=torch.long)
    at, covered = centres.nonzero().flatten(), (area | (centres > 0)).nonzero().flatten()
    if len(at):
        dy, dx = covered[:, None] // side - at // side, covered[:, None] % side - at % side
        nearest[covered] = 1 + (dy**2 + dx**2).argmin(1)
    return nearest


def _answer_positions(batch: ConversationBatch, conversation: int) -> list[tuple[int, int]]:
    """Return prefix and row of each token that is followed by a token of the conversation's answer."""
    positions = ((batch.rows.conversations == conversation) & batch.rows.answer_mask).nonzero()
    return [(int(prefix), int(row)) for prefix, row in positions]
