"""Language model, projectors and, at a lower rate, the tower learn to answer questions."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from demo.batches.types import ConversationBatch, ConversationRows
from demo.training.attention_supervision import COUNTING_HEADS, MORE_COUNTING_HEADS, AttentionSupervision
from demo.training.auxiliary_losses import difference_loss, ordinal_loss
from demo.training.run import Stage, TrainingRun

_LOGIT_SCALES = ("q_norm.weight", "k_norm.weight")
"""Parameters that bound the attention logits in Qwen3. At 1 the bound is 8, just enough for one token among 3,000 to get
half of the attention. With ten times the learning rate of other parameters, the largest rose from 1.2 to 1.5 in stage 14."""
_LOGIT_SCALE_RATE_FACTOR = 10.0
_LANGUAGE_HEADS = ("difference", "ordinals")


def learn_answers(
    run: TrainingRun,
    stage: Stage,
    make_batch: Callable[..., ConversationBatch],
    tower_rate: float,
    more_counting_heads: bool = False,
) -> None:
    """Train on conversations.

    Args:
        run: The run.
        stage: The stage.
        make_batch: Takes a generator and the tokenizer.
        tower_rate: Learning rate of the tower over that of the rest. At 0 the tower is frozen.
        more_counting_heads: Supervise six counting heads instead of two, with twice the weight.
    """
    heads, weight = (MORE_COUNTING_HEADS, 1.0) if more_counting_heads else (COUNTING_HEADS, 0.5)
    with AttentionSupervision(run.model, heads, weight) as attention:
        step = partial(_answer_step, run, attention, tower_rate > 0)
        run.train(stage, partial(make_batch, tokenizer=run.tokenizer), step, _parameter_groups(run, tower_rate))


def _answer_step(
    run: TrainingRun, attention: AttentionSupervision, train_tower: bool, batch: ConversationBatch
) -> tuple[Tensor, dict[str, float]]:
    model = run.model
    with torch.set_grad_enabled(train_tower):
        features = model.forward(batch.tiles, batch.crop_origins)
    prefix = model.encode_prefixes(model.build_prefixes(batch, features, batch.compressed))
    logits = model.answer_logits(prefix, batch.rows)
    answers = F.cross_entropy(logits, batch.rows.answer_ids)
    attention_loss, figures = attention.loss(prefix, batch)
    total = answers + attention_loss
    if batch.single_image_targets is not None:
        ordinals, accuracies = ordinal_loss(run.heads, prefix, batch, batch.single_image_targets)
        total, figures = total + 0.2 * ordinals, figures | accuracies
    texts = F.cross_entropy(model.answer_logits(None, batch.text_rows), batch.text_rows.answer_ids)
    total = total + 0.1 * texts
    if batch.images_per_prefix == 2:
        difference = difference_loss(run.heads, prefix, batch)
        total, figures = total + 0.5 * difference, figures | {"difference": float(difference.detach())}
    if train_tower and batch.targets is not None:
        total = total + 0.15 * run.heads(features, batch.targets)[0]
    accuracies = answer_accuracy(logits.detach(), batch.rows, batch.tasks)
    return total, {
        "loss": float(total.detach()),
        "answers": float(answers.detach()),
        "texts": float(texts.detach()),
        **figures,
        **{f"{task} {batch.path}": share for task, share in accuracies.items()},
    }


def answer_accuracy(logits: Tensor, rows: ConversationRows, tasks: list[str]) -> dict[str, float]:
    """Return, by task, the share of conversations whose answers are correct to the last token."""
    errors = torch.zeros(len(tasks), dtype=torch.long, device=logits.device)
    errors.index_add_(0, rows.conversations[rows.answer_mask], (logits.argmax(-1) != rows.answer_ids).long())
    by_task: dict[str, list[float]] = {}
    for task, count in zip(tasks, errors.tolist(), strict=True):
        by_task.setdefault(task, []).append(float(count == 0))
    return {task: sum(correct) / len(correct) for task, correct in by_task.items()}


def _parameter_groups(run: TrainingRun, tower_rate: float) -> list[dict[str, Any]]:
    vision = run.model.vision
    language_heads = [p for n, p in run.heads.named_parameters() if n.startswith(_LANGUAGE_HEADS)]
    language = dict(run.model.language.named_parameters())
    rest = [parameter for name, parameter in language.items() if not name.endswith(_LOGIT_SCALES)]
    scales = [parameter for name, parameter in language.items() if name.endswith(_LOGIT_SCALES)]
    groups: list[dict[str, Any]] = [
        {"params": [*rest, *vision.mlp1.parameters(), *vision.mlp2.parameters(), *language_heads]},
        {"params": scales, "rate_factor": _LOGIT_SCALE_RATE_FACTOR, "weight_decay": 0.0},
    ]
    if tower_rate > 0:
        patch_heads = [p for n, p in run.heads.named_parameters() if not n.startswith(_LANGUAGE_HEADS)]
        groups.append({"params": [*vision.vision_model.parameters(), *patch_heads], "rate_factor": tower_rate})
    return groups
