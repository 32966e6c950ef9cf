"""Auxiliary heads: they exist in training only."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo.batches.types import PatchTargets
from demo.model.config import LANGUAGE_WIDTH, VISION_WIDTH
from demo.scenes.labels import FIRST_DIGIT
from demo.scenes.scene import COLOURS, POSITIONS, SHAPES

MAX_DIGITS, MAX_COUNT = 4, 6
_KINDS, _COLOURS, _POSITIONS = FIRST_DIGIT + 10, 1 + len(COLOURS), len(POSITIONS)
_READOUT_SIZES = [_KINDS, _COLOURS, MAX_DIGITS, _POSITIONS, 2]
_BACKGROUND_WEIGHT = 0.2
"""Most patches show nothing but background."""
_LOSS_WEIGHTS = {"kind": 1.0, "colour": 0.5, "order_in_tile": 0.5, "position": 0.3, "centre": 3.0}


class PatchHeads(nn.Module):
    """Linear read-outs from patch features, and from hidden states of the language model.

    Attributes:
        readout: Kind, colour, order, position and centre of each patch, from its features.
        foreground: Foreground cells of a patch, from the first layer of the tower.
        neighbour_foreground: Foreground of the 5 × 5 patches around, from the second layer.
        difference: Whether a visual token of the second image differs from the first image, from the language model.
        ordinals: Index of a digit and ordinal of a shape, from the language model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(VISION_WIDTH)
        self.foreground = nn.Sequential(nn.LayerNorm(VISION_WIDTH), nn.Linear(VISION_WIDTH, 49))
        self.neighbour_foreground = nn.Sequential(nn.LayerNorm(VISION_WIDTH), nn.Linear(VISION_WIDTH, 25 * 9))
        self.difference = nn.Linear(LANGUAGE_WIDTH, 1)
        self.ordinals = nn.Linear(LANGUAGE_WIDTH, MAX_DIGITS + MAX_COUNT)
        self.readout = nn.Linear(VISION_WIDTH, sum(_READOUT_SIZES))

    def forward(self, features: Tensor, targets: PatchTargets) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of the read-outs of features [tiles, patches, VISION_WIDTH], and figures for the log."""
        logits = self.readout(self.norm(features)).flatten(0, 1)
        kind, colour, order, position, centre = logits.split(_READOUT_SIZES, dim=-1)
        kind_target = targets.kind.flatten()
        losses = {
            "kind": F.cross_entropy(kind, kind_target, _class_weights(kind), ignore_index=-1),
            "colour": F.cross_entropy(colour, targets.colour.flatten(), _class_weights(colour), ignore_index=-1),
            "order_in_tile": _known_cross_entropy(order, targets.order_in_tile.flatten()),
            "position": _known_cross_entropy(position, targets.position.flatten()),
            # no class weights: for counting, the probabilities of one object's patches must add up to one
            "centre": F.cross_entropy(centre, targets.centre.flatten()),
        }
        figures = {name: float(value.detach()) for name, value in losses.items()}
        is_shape, is_digit = (kind_target > 0) & (kind_target <= len(SHAPES)), kind_target >= FIRST_DIGIT
        for name, chosen in (("shape accuracy", is_shape), ("digit accuracy", is_digit)):
            figures[name] = float((kind.argmax(-1) == kind_target)[chosen].float().mean())
        return torch.stack([_LOSS_WEIGHTS[name] * value for name, value in losses.items()]).sum(), figures


def _class_weights(logits: Tensor) -> Tensor:
    return torch.tensor([_BACKGROUND_WEIGHT] + [1.0] * (logits.shape[-1] - 1), device=logits.device)


def _known_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy over the targets that are not −1; 0 without any."""
    if not bool((targets >= 0).any()):
        return logits.sum() * 0
    return F.cross_entropy(logits, targets, ignore_index=-1)
