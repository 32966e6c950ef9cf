"""Open questions about an image get a fixed answer, and all other answers stay what they are.

Only embeddings and output rows of a few tokens are trained. No question of a task and no answer to one has these tokens, so
the language model still computes what it computed for those.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from demo.batches.types import ConversationBatch
from demo.text.small_talk import DESCRIPTION_ANSWER
from demo.text.tokenizer import DemoTokenizer
from demo.training.answer_learning import answer_accuracy
from demo.training.run import Stage, TrainingRun

_CUES = ("Describe", " see")
"""Words of the open questions that no question of a task has."""
_OUTPUT_RATE_FACTOR = 0.2


def learn_descriptions(run: TrainingRun, stage: Stage, make_batch: Callable[..., ConversationBatch]) -> None:
    """Train a few rows of both embedding matrices. `make_batch` takes a generator and the tokenizer."""
    language = run.model.language
    inputs, outputs = language.model.embed_tokens.weight, language.lm_head.weight
    answer = answer_tokens(run.tokenizer)
    masks = [
        weight.register_hook(partial(torch.mul, _row_mask(weight, rows)))
        for weight, rows in ((inputs, answer | cue_tokens(run.tokenizer)), (outputs, answer))
    ]
    # without weight decay, a parameter whose gradient is always 0 stays as it is
    parameters = [
        {"params": [inputs], "weight_decay": 0.0},
        {"params": [outputs], "weight_decay": 0.0, "rate_factor": _OUTPUT_RATE_FACTOR},
    ]
    run.train(stage, partial(make_batch, tokenizer=run.tokenizer), partial(_step, run), parameters)
    for mask in masks:
        mask.remove()


def cue_tokens(tokenizer: DemoTokenizer) -> set[int]:
    """Return the ids of the tokens by which an open question is recognised."""
    return {token for word in _CUES for token in tokenizer.encode(word)}


def answer_tokens(tokenizer: DemoTokenizer) -> set[int]:
    """Return the ids of the fixed answer's tokens, without the full stop."""
    return set(tokenizer.encode(DESCRIPTION_ANSWER.rstrip(".")))


def _step(run: TrainingRun, batch: ConversationBatch) -> tuple[Tensor, dict[str, float]]:
    model = run.model
    with torch.no_grad():
        features = model.forward(batch.tiles, batch.crop_origins)
        prefix = model.encode_prefixes(model.build_prefixes(batch, features, batch.compressed))
    logits = model.answer_logits(prefix, batch.rows)
    answers = F.cross_entropy(logits, batch.rows.answer_ids)
    texts = F.cross_entropy(model.answer_logits(None, batch.text_rows), batch.text_rows.answer_ids)
    total = answers + 0.5 * texts
    accuracies = answer_accuracy(logits.detach(), batch.rows, batch.tasks)
    return total, {
        "loss": float(total.detach()),
        "answers": float(answers.detach()),
        "texts": float(texts.detach()),
        **accuracies,
    }


def _row_mask(weight: Tensor, rows: set[int]) -> Tensor:
    mask = torch.zeros(len(weight), 1, device=weight.device)
    mask[sorted(rows)] = 1
    return mask
