"""The last MLP of the language model learns from thousands of answers at once.

A step of the other stages has a dozen images, and its gradient is clipped. Large errors on few images count little, and
answers keep a bias: five shapes were counted as six five times as often as six as five.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from demo.batches.types import ConversationBatch
from demo.model.demo_model import DemoModel
from demo.training.router import random_indices
from demo.training.run import Stage, Step, TrainingRun

_COUNT_WEIGHT = 3.0
"""Weight of a count, relative to other answers."""


@dataclass
class LastLayerInputs:
    """Inputs of the last MLP where an answer token follows.

    Attributes:
        hidden: float32 [n, LANGUAGE_WIDTH].
        answer_ids: The tokens that follow, [n].
        weights: Weights of the tokens, [n].
    """

    hidden: Tensor
    answer_ids: Tensor
    weights: Tensor


def collect_inputs(run: TrainingRun, stage: Stage, make_batch: Callable[..., ConversationBatch]) -> None:
    """Collect the inputs of the last MLP for all batches of the stage."""
    run.collect(stage, partial(make_batch, tokenizer=run.tokenizer), lambda batch, _: last_layer_inputs(run.model, batch))


def learn_last_layer(run: TrainingRun, stage: Stage, inputs_stage: str, token_count: int) -> None:
    """Train the last MLP on what the stage named `inputs_stage` collected, `token_count` tokens per step."""
    inputs = run.load_collected(inputs_stage)
    parameters, step = last_layer_step(run.model, inputs)
    make_batch = partial(random_indices, count=token_count, size=len(inputs.answer_ids))
    run.train(stage, make_batch, step, [{"params": parameters}])


@torch.no_grad()
def last_layer_inputs(model: DemoModel, batch: ConversationBatch) -> LastLayerInputs:
    """Return the inputs for all answers of a batch, by the paths of the batch and by the long path."""
    features = model.forward(batch.tiles, batch.crop_origins)
    paths = [batch.compressed] if batch.path == "long" else [batch.compressed, torch.zeros_like(batch.compressed)]
    answer_mask = batch.rows.answer_mask
    is_count = torch.tensor([task == "count" for task in batch.tasks], device=answer_mask.device)
    weights = torch.where(is_count[batch.rows.conversations[answer_mask]], _COUNT_WEIGHT, 1.0)
    calls: list[Tensor] = []
    hook = _last_layer(model).post_attention_layernorm.register_forward_pre_hook(lambda _, args: calls.append(args[0]))
    for compressed in paths:
        model.answer_logits(model.encode_prefixes(model.build_prefixes(batch, features, compressed)), batch.rows)
    hook.remove()
    # each path calls the layer twice: for the prefix, and for the rows
    hidden = torch.cat([rows[answer_mask].float() for rows in calls[1::2]])
    ids = batch.rows.answer_ids.repeat(len(paths))
    return LastLayerInputs(hidden.cpu(), ids.cpu(), weights.repeat(len(paths)).cpu())


def last_layer_step(model: DemoModel, inputs: LastLayerInputs) -> tuple[list[nn.Parameter], Step]:
    """Return the trained parameters, and a step on some indices of `inputs`. All other parameters stay as they are."""
    last, norm = _last_layer(model), model.language.model.norm

    def step(indices: Tensor) -> tuple[Tensor, dict[str, float]]:
        hidden, answer_ids, weights = (
            tensor[indices.cpu()].to(indices.device) for tensor in (inputs.hidden, inputs.answer_ids, inputs.weights)
        )
        logits = model.language.lm_head(norm(hidden + last.mlp(last.post_attention_layernorm(hidden))))
        loss = (F.cross_entropy(logits, answer_ids, reduction="none") * weights).sum() / weights.sum()
        correct = (logits.argmax(-1) == answer_ids).float()
        return loss, {
            "loss": float(loss.detach()),
            "accuracy": float(correct.mean()),
            "count accuracy": float(correct[weights > 1].mean()),
        }

    return [*last.mlp.parameters(), *last.post_attention_layernorm.parameters(), *norm.parameters()], step


def _last_layer(model: DemoModel) -> Qwen3DecoderLayer:
    return cast(Qwen3DecoderLayer, model.language.model.layers[-1])
