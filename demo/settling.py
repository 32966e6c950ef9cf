"""The last layer's say, set right at the end from thousands of answers at once.

A step of training sees a dozen pictures, and its gradient is clipped: what few of them get wrong by much counts little, and
answers stay leaning to one side. Five of a kind were said to be six five times as often as six five.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from demo.batches import Talk
from demo.model import Trainee

_COUNTS = 3.0
"""What a count weighs beside another answer."""


@dataclass
class Gathered:
    """What the last layer's MLP is given where a token is to be said, [n, HIDDEN], that token, [n], and what it weighs, [n]."""

    given: Tensor
    told: Tensor
    weights: Tensor


@torch.no_grad()
def gathered(model: Trainee, batch: Talk) -> Gathered:
    """Of all answers of a batch, by its own paths and by the long one."""
    features = model.forward(batch.tiles, batch.corners)
    paths = [batch.compressed] if batch.path == "long" else [batch.compressed, torch.zeros_like(batch.compressed)]
    asked = batch.rows.answers >= 0
    counting = torch.tensor([task == "count" for task in batch.tasks], device=asked.device)[batch.rows.numbers[asked]]
    seen: list[Tensor] = []
    hook = _last(model).post_attention_layernorm.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for compressed in paths:
        model.answer(model.read(model.prefixes(batch, features, compressed)), batch.rows)
    hook.remove()
    # each path was two calls: the prefix, and what follows it
    given = torch.cat([rows[asked].float() for rows in seen[1::2]])
    weights = torch.where(counting, _COUNTS, 1.0)
    return Gathered(given.cpu(), batch.rows.told.repeat(len(paths)).cpu(), weights.repeat(len(paths)).cpu())


def settle(model: Trainee, found: Gathered) -> tuple[list[nn.Parameter], Callable[[Tensor], tuple[Tensor, dict[str, float]]]]:
    """What learns, and a step over some of `found`: cross entropy. All before the last MLP stays as it is."""
    last, norm = _last(model), model.language.model.norm

    def step(chosen: Tensor) -> tuple[Tensor, dict[str, float]]:
        given, told, weights = (part[chosen.cpu()].to(chosen.device) for part in (found.given, found.told, found.weights))
        logits = model.language.lm_head(norm(given + last.mlp(last.post_attention_layernorm(given))))
        loss = (F.cross_entropy(logits, told, reduction="none") * weights).sum() / weights.sum()
        right = (logits.argmax(-1) == told).float()
        return loss, {"loss": float(loss.detach()), "right": float(right.mean()), "counts": float(right[weights > 1].mean())}

    return [*last.mlp.parameters(), *last.post_attention_layernorm.parameters(), *norm.parameters()], step


def _last(model: Trainee) -> Qwen3DecoderLayer:
    return cast(Qwen3DecoderLayer, model.language.model.layers[-1])
