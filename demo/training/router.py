"""Router training, the second half of visual consistency learning (ViCO, InternVL3.5 report, section 2.4).

With all else frozen, the router learns which tiles may take the short path: those where it hardly raises the loss.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from demo.batches.conversations import conversation_batch
from demo.batches.types import ConversationBatch, ConversationRows
from demo.model.demo_model import DemoModel
from demo.scenes.style import TILE_COUNTS, Style
from demo.training.run import Stage, Step, TrainingRun

MULTI_TILE_COUNTS = tuple(count for count in TILE_COUNTS if count > 1)
_LOSS_OFFSET = 0.05
"""Added to both losses: the ratio of two losses near 0 means nothing."""
_COMPRESSED_SHARE = 0.7
"""Fraction of the other tiles on the short path while one is judged, about what the router decides."""
_TILES_PER_STEP = 48


@dataclass
class TileCosts:
    """Cost of the short path for many tiles.

    Attributes:
        features: float16 [n, patches, VISION_WIDTH].
        ratios: Loss with the tile on the short path over loss with it on the long path, [n].
    """

    features: Tensor
    ratios: Tensor


def measure_tiles(run: TrainingRun, stage: Stage, style: Style, tile_budget: int) -> None:
    """Collect the costs of the tiles of all batches of the stage."""
    make_batch = partial(
        conversation_batch, tokenizer=run.tokenizer, style=style, tile_budget=tile_budget, tile_counts=MULTI_TILE_COUNTS,
        pair_share=0, labelled=False,
    )  # fmt: skip
    run.collect(stage, make_batch, lambda batch, i: short_path_costs(run.model, batch, np.random.default_rng([run.seed, i])))


def learn_routes(run: TrainingRun, stage: Stage, costs_stage: str, compressed_share: float) -> None:
    """Train the router on the costs that the stage named `costs_stage` collected."""
    costs = run.load_collected(costs_stage)
    vision = run.model.vision
    parameters = [*vision.pooling_before_gating.parameters(), *vision.gating.parameters()]
    make_batch = partial(random_indices, count=_TILES_PER_STEP, size=len(costs.ratios))
    run.train(stage, make_batch, router_step(run.model, costs, compressed_share), [{"params": parameters}])


@torch.no_grad()
def short_path_costs(model: DemoModel, batch: ConversationBatch, rng: np.random.Generator) -> TileCosts:
    """Return the cost of each tile of each image, the paths of the other tiles being random."""
    features = model.forward(batch.tiles, batch.crop_origins)
    images, tiles = batch.compressed.shape
    ratios = torch.zeros(images, tiles)
    for image in range(images):
        rows = _rows_of_prefix(batch.rows, image)
        own = features[image * tiles : (image + 1) * tiles]
        for tile in range(tiles):
            others = torch.from_numpy(rng.random(tiles) < _COMPRESSED_SHARE)[None].to(features.device)
            short, long = others.clone(), others.clone()
            short[0, tile], long[0, tile] = True, False
            losses = [_answer_loss(model, model.build_prefixes(batch, own, path), rows) for path in (short, long)]
            ratios[image, tile] = (losses[0] + _LOSS_OFFSET) / (losses[1] + _LOSS_OFFSET)
    return TileCosts(features.half().cpu(), ratios.flatten())


def router_step(model: DemoModel, costs: TileCosts, compressed_share: float) -> Step:
    """Return a step on the indices of some tiles, whose loss is the cross entropy of the router's decision.

    A tile should be compressed (logit 0) if its ratio is among the lowest `compressed_share` of all; the report uses a
    moving percentile. A tile's weight is the distance of its ratio from that limit, in logarithms. Most tiles cost
    nothing and their ratios are noise, which the router memorised when all tiles had equal weight.
    """
    limit = torch.quantile(costs.ratios, compressed_share)
    keep = (costs.ratios > limit).long()
    tile_weights = (costs.ratios / limit).log().abs()

    def step(indices: Tensor) -> tuple[Tensor, dict[str, float]]:
        targets = keep[indices.cpu()].to(indices.device)
        features = costs.features[indices.cpu()].to(indices.device).float()
        weights = tile_weights[indices.cpu()].to(indices.device)
        logits = model.vision.gating(model.vision.pooling_before_gating(features))
        loss = (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
        accuracy = ((logits.argmax(-1) == targets) * weights).sum() / weights.sum()
        return loss, {"loss": float(loss.detach()), "accuracy": float(accuracy)}

    return step


def random_indices(rng: np.random.Generator, count: int, size: int) -> Tensor:
    """Return `count` random indices below `size`."""
    return torch.from_numpy(rng.integers(0, size, count))


def _rows_of_prefix(rows: ConversationRows, prefix: int) -> ConversationRows:
    tensors = (rows.ids, rows.labels, rows.positions, rows.conversations)
    return ConversationRows(*(tensor[prefix : prefix + 1] for tensor in tensors))


def _answer_loss(model: DemoModel, prefixes: Tensor, rows: ConversationRows) -> float:
    return float(F.cross_entropy(model.answer_logits(model.encode_prefixes(prefixes), rows), rows.answer_ids))
