"""Open questions: only rows are trained that no other question about an image depends on."""

from functools import partial
from pathlib import Path

import numpy as np
import torch

from demo.batches.conversations import conversation_batch
from demo.batches.types import ConversationBatch
from demo.scenes.style import Style
from demo.text.small_talk import DESCRIPTION_QUESTIONS
from demo.text.tokenizer import DemoTokenizer
from demo.training.descriptions import answer_tokens, cue_tokens, learn_descriptions
from demo.training.run import Stage, TrainingRun

TINY = Style(tile_pixels=112, max_tiles=1, max_side_pixels=224, max_aspect_ratio=1, min_digit_pixels=14)


def test_no_question_of_a_task_nor_its_answer_has_these_tokens(tokenizer: DemoTokenizer) -> None:
    trained = cue_tokens(tokenizer) | answer_tokens(tokenizer)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        batch = conversation_batch(rng, tokenizer, Style(), tile_budget=4, labelled=False, extra_questions=0)
        assert not trained & set(batch.rows.ids.flatten().tolist())


def test_each_open_question_has_a_cue(tokenizer: DemoTokenizer) -> None:
    for question in DESCRIPTION_QUESTIONS:
        assert cue_tokens(tokenizer) & set(tokenizer.encode(question)), question


def test_all_other_weights_stay_what_they_are(tmp_path: Path) -> None:
    run = TrainingRun(tmp_path, seed=1, workers=0)
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    stage = Stage("descriptions", 2, 1e-2, partial(learn_descriptions, make_batch=batch_of_two))
    stage.train(run, stage)
    after = dict(run.model.named_parameters())
    changed = {name for name, parameter in before.items() if not torch.equal(parameter, after[name])}
    assert changed == {"language.model.embed_tokens.weight", "language.lm_head.weight"}
    answer = answer_tokens(run.tokenizer)
    for name, rows in (
        ("language.model.embed_tokens.weight", answer | cue_tokens(run.tokenizer)), ("language.lm_head.weight", answer)
    ):  # fmt: skip
        different = (before[name] != after[name]).any(dim=1).nonzero().flatten().tolist()
        assert set(different) <= rows
        assert len(different) >= 8


def batch_of_two(rng: np.random.Generator, tokenizer: DemoTokenizer) -> ConversationBatch:
    return conversation_batch(rng, tokenizer, TINY, tile_budget=2, labelled=False, pair_share=0, descriptions=True)
