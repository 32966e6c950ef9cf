"""Consistency training, the first half of visual consistency learning (ViCO, InternVL3.5 report, section 2.4).

The short path learns to give the answers of the long path.
"""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from demo.batches.conversations import conversation_batch
from demo.batches.types import ConversationBatch
from demo.model.demo_model import DemoModel
from demo.scenes.style import Style
from demo.training.attention_supervision import MORE_COUNTING_HEADS, AttentionSupervision
from demo.training.run import Stage, Step, TrainingRun


def learn_consistency(run: TrainingRun, stage: Stage, style: Style, tile_budget: int) -> None:
    """Train the language model and the projector of the short path. The tower is frozen."""
    make_batch = partial(conversation_batch, tokenizer=run.tokenizer, style=style, tile_budget=tile_budget)
    parameters = [*run.model.language.parameters(), *run.model.vision.mlp2.parameters()]
    with AttentionSupervision(run.model, MORE_COUNTING_HEADS) as attention:
        run.train(stage, make_batch, consistency_step(run.model, attention), [{"params": parameters}])


def consistency_step(model: DemoModel, attention: AttentionSupervision) -> Step:
    """Return a step whose loss is the KL divergence of the answers from those of a frozen copy on the long path.

    The attention of `model` stays supervised. Otherwise it drifts: 100 steps lose one count in 25.
    """
    teacher = copy.deepcopy(model).requires_grad_(False)

    def step(batch: ConversationBatch) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            features = model.forward(batch.tiles, batch.crop_origins)
            long_path = teacher.build_prefixes(batch, features, torch.zeros_like(batch.compressed))
            target = teacher.answer_logits(teacher.encode_prefixes(long_path), batch.rows)
        prefix = model.encode_prefixes(model.build_prefixes(batch, features, batch.compressed))
        logits = model.answer_logits(prefix, batch.rows)
        divergence = F.kl_div(logits.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="batchmean")
        answers = F.cross_entropy(logits, batch.rows.answer_ids)
        attention_loss, figures = attention.loss(prefix, batch)
        total = divergence + 0.3 * answers + 0.5 * attention_loss
        return total, {
            "loss": float(total.detach()),
            **figures,
            f"divergence {batch.path}": float(divergence.detach()),
            f"answers {batch.path}": float(answers.detach()),
        }

    return step
