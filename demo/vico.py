"""Visual consistency learning (ViCO, InternVL3.5 report, section 2.4) at toy scale.

First the short path learns to answer as the long one does. Then, with all else frozen, the router learns which tiles
may take the short path: those for which it costs the answers little.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from demo.batches import Generator, Rows, Talk
from demo.looking import Looking
from demo.model import Trainee


def consistency(model: Trainee, attentions: Looking) -> Callable[[Talk], tuple[Tensor, dict[str, float]]]:
    """A step: KL divergence of the answers on some route from those of the model as it is now, on the long path.

    The tower stays as it is, so one look serves both. `attentions`, the model's own, are held to where they look: left
    alone they drift, and in a hundred steps one count in twenty-five is lost.
    """
    teacher = copy.deepcopy(model).requires_grad_(False)

    def step(batch: Talk) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            features = model.forward(batch.tiles, batch.corners)
            long = teacher.prefixes(batch, features, torch.zeros_like(batch.compressed))
            full = teacher.answer(teacher.read(long), batch.rows)
        read = model.read(model.prefixes(batch, features, batch.compressed))
        answers = model.answer(read, batch.rows)
        divergence = F.kl_div(answers.log_softmax(-1), full.log_softmax(-1), log_target=True, reduction="batchmean")
        truth = F.cross_entropy(answers, batch.rows.told)
        looked, found = attentions.loss(read, batch)
        total = divergence + 0.3 * truth + 0.5 * looked
        return total, {
            "loss": float(total.detach()),
            **found,
            f"kl {batch.path}": float(divergence.detach()),
            f"answers {batch.path}": float(truth.detach()),
        }

    return step


@dataclass
class Judged:
    """Tiles seen so far: their features, float16 [n, patches, WIDTH], and what the short path costs, [n]."""

    features: Tensor
    ratios: Tensor


_CALM = 0.05
"""Added to both losses: between two answers that are certain there is nothing to choose."""


@torch.no_grad()
def cost_of_short(model: Trainee, batch: Talk, rng: Generator) -> Judged:
    """For each tile of each image: loss of the answers with it on the short path over the loss with it on the long one.

    The other tiles' paths are drawn by lot, as the router will have left most of them on the short one.
    """
    features = model.forward(batch.tiles, batch.corners)
    images, tiles = batch.compressed.shape
    ratios = torch.zeros(images, tiles)
    for image in range(images):
        rows = _rows_of(batch.rows, image)
        own = features[image * tiles : (image + 1) * tiles]
        for tile in range(tiles):
            others = torch.from_numpy(rng.random(tiles) < 0.7)[None].to(features.device)
            short, long = others.clone(), others.clone()
            short[0, tile], long[0, tile] = True, False
            costs = [_loss(model, model.prefixes(batch, own, path), rows) for path in (short, long)]
            ratios[image, tile] = (costs[0] + _CALM) / (costs[1] + _CALM)
    return Judged(features.half().cpu(), ratios.flatten())


def _rows_of(rows: Rows, image: int) -> Rows:
    return Rows(*(part[image : image + 1] for part in (rows.ids, rows.answers, rows.places, rows.numbers)))


def _loss(model: Trainee, prefix: Tensor, rows: Rows) -> float:
    return float(F.cross_entropy(model.answer(model.read(prefix), rows), rows.told))


def router(model: Trainee, judged: Judged, share: float) -> Callable[[Tensor], tuple[Tensor, dict[str, float]]]:
    """A step over some tiles: cross entropy of the router's choice.

    A tile is to be compressed (logit 0) if its ratio is within the lowest `share` of all, as the report's moving
    percentile has it. Each tile counts by how far its logarithm is from the limit's: few tiles cost anything, and what the
    others' ratios are is chance, which the router learned by heart when all counted alike.
    """
    limit = torch.quantile(judged.ratios, share)
    keep = (judged.ratios > limit).long()
    stakes = (judged.ratios / limit).log().abs()

    def step(chosen: Tensor) -> tuple[Tensor, dict[str, float]]:
        told = keep[chosen.cpu()].to(chosen.device)
        features = judged.features[chosen.cpu()].to(chosen.device).float()
        stake = stakes[chosen.cpu()].to(chosen.device)
        logits = model.vision.gating(model.vision.pooling_before_gating(features))
        loss = (F.cross_entropy(logits, told, reduction="none") * stake).sum() / stake.sum()
        right = ((logits.argmax(-1) == told) * stake).sum() / stake.sum()
        return loss, {"loss": float(loss.detach()), "right": float(right)}

    return step


def some(rng: Generator, count: int, of: int) -> Tensor:
    return torch.from_numpy(rng.integers(0, of, count))
