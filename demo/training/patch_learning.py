"""The vision tower alone learns which object covers each patch."""

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from demo.batches.patches import patch_batch
from demo.batches.types import PatchBatch
from demo.scenes.style import Style
from demo.training.run import Stage, TrainingRun

_CROWDED_SHARE = 0.9


def learn_patches(run: TrainingRun, stage: Stage, styles: tuple[Style, ...], tile_count: int, foreground_weight: float) -> None:
    """Train the tower on patch labels.

    The first layer also learns the foreground of a patch, the second that of the 5 × 5 patches around it. Without these
    losses, the tower learns late that neighbouring patches matter: shapes stayed at chance level for 600 steps.

    Args:
        run: The run.
        stage: The stage.
        styles: Styles of the scenes, in equal shares.
        tile_count: Tiles per batch.
        foreground_weight: Weight of the foreground losses.
    """
    layers = run.model.vision.vision_model.encoder.layers
    outputs: dict[int, Tensor] = {}
    hooks = [layers[i].register_forward_hook(partial(_store_patches, outputs, i)) for i in (0, 1)]

    def step(batch: PatchBatch) -> tuple[Tensor, dict[str, float]]:
        loss, figures = run.heads(run.model.forward(batch.tiles, batch.crop_origins), batch.targets)
        target = batch.foreground.float()
        own = F.binary_cross_entropy_with_logits(run.heads.foreground(outputs[0]), target)
        neighbours = F.binary_cross_entropy_with_logits(
            run.heads.neighbour_foreground(outputs[1]), _neighbour_foreground(target)
        )
        figures |= {"foreground": float(own.detach()), "neighbour foreground": float(neighbours.detach())}
        return loss + foreground_weight * (own + 4 * neighbours), {"loss": float(loss.detach()), **figures}

    tower = run.model.vision.vision_model.parameters()
    make_batch = partial(patch_batch, styles=styles, count=tile_count, crowded_share=_CROWDED_SHARE)
    try:
        run.train(stage, make_batch, step, [{"params": [*tower, *run.heads.parameters()]}])
    finally:
        for hook in hooks:
            hook.remove()


def _store_patches(outputs: dict[int, Tensor], layer: int, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
    outputs[layer] = output[:, 1:]


def _neighbour_foreground(foreground: Tensor) -> Tensor:
    """Sample 3 × 3 cells of each of the 5 × 5 patches around a patch: [n, patches, 49] to [n, patches, 225]."""
    side = round(foreground.shape[1] ** 0.5)
    cells = foreground.view(-1, side * side, 7, 7)[..., ::3, ::3].flatten(-2)
    return F.unfold(cells.mT.reshape(-1, 9, side, side), 5, padding=2).mT
