from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from demo.batches.conversations import conversation_batch
from demo.batches.loading import StepBatches, load_batches
from demo.batches.patches import patch_batch
from demo.batches.types import ConversationBatch, PatchTargets
from demo.scenes.scene import PATCH_PIXELS
from demo.scenes.style import Style
from demo.text.tokenizer import DemoTokenizer

TINY = Style(tile_pixels=112, min_digit_pixels=16)
TINY_SINGLE_TILE = replace(TINY, max_tiles=1)
TINY_HARD = replace(TINY, hard=True)
SIDE_PATCHES = 112 // PATCH_PIXELS


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng([13, *seed])


def flatten(value: Any) -> Iterator[Any]:
    """Everything in a batch that can be compared, tensors as bytes."""
    if isinstance(value, Tensor):
        yield tuple(value.shape), value.numpy().tobytes()
    elif is_dataclass(value):
        for field in fields(value):
            yield from flatten(getattr(value, field.name))
    else:
        yield value


def equal(a: Any, b: Any) -> bool:
    return list(flatten(a)) == list(flatten(b))


def batch_maker(kind: str, tokenizer: DemoTokenizer) -> Any:
    if kind == "patches":
        return partial(patch_batch, styles=(TINY,), count=6)
    return partial(conversation_batch, tokenizer=tokenizer, style=TINY, tile_budget=8)


@pytest.mark.parametrize("kind", ["patches", "conversations"])
def test_seed_stage_and_step_determine_a_batch(tokenizer: DemoTokenizer, kind: str) -> None:
    """Also where a run resumes in the middle."""
    make = batch_maker(kind, tokenizer)
    from_start = StepBatches(make, seed=1, stage="one", first=0, steps=5)
    resumed = StepBatches(make, seed=1, stage="one", first=3, steps=5)
    assert len(from_start) == 5
    assert len(resumed) == 2
    fourth = from_start[3]
    assert equal(fourth, from_start[3])
    assert equal(fourth, resumed[0])
    assert not equal(fourth, resumed[1])
    for seed, stage in ((2, "one"), (1, "two")):
        assert not equal(fourth, StepBatches(make, seed, stage, 3, 5)[0])


@pytest.fixture(scope="module")
def conversations(tokenizer: DemoTokenizer) -> list[ConversationBatch]:
    return [conversation_batch(rng(i), tokenizer, TINY, 12) for i in range(60)]


def compressed_by_prefix(batch: ConversationBatch) -> Tensor:
    return batch.compressed.reshape(len(batch.compressed) // batch.images_per_prefix, -1)


def patch_targets(batch: ConversationBatch) -> PatchTargets:
    assert batch.targets is not None
    return batch.targets


def test_every_prefix_has_the_same_number_of_compressed_tiles(conversations: list[ConversationBatch]) -> None:
    shares = []
    for batch in conversations:
        assert len(set(compressed_by_prefix(batch).sum(1).tolist())) == 1
        shares.append(float(batch.compressed.float().mean()))
    assert {0.0, 1.0} < set(shares), "all, none and some should occur"


def test_shapes_of_a_batch_agree(conversations: list[ConversationBatch]) -> None:
    for batch in conversations:
        tiles = batch.compressed.numel()
        assert batch.tiles.shape == (tiles, 112, 112, 3)
        assert patch_targets(batch).kind.shape == (tiles, SIDE_PATCHES * SIDE_PATCHES)
        assert len(batch.rows.ids) == len(compressed_by_prefix(batch))
        assert sorted(set(batch.rows.conversations.flatten().tolist()) - {-1}) == list(range(len(batch.tasks)))
    assert {batch.compressed.shape[1] for batch in conversations} >= {1, 3, 4, 5}
    assert {batch.images_per_prefix for batch in conversations} == {1, 2}


def test_only_pairs_have_comparison_questions(conversations: list[ConversationBatch], tokenizer: DemoTokenizer) -> None:
    for batch in conversations:
        assert (set(batch.tasks) == {"same"}) == (batch.images_per_prefix == 2)
        if batch.images_per_prefix == 2:
            images = batch.tiles.reshape(len(compressed_by_prefix(batch)), 2, -1)
            for (first, second), row in zip(images, batch.rows.labels, strict=True):
                answer = tokenizer.decode(row[row >= 0].tolist())
                assert answer == ("yes" if torch.equal(first, second) else "no")


def test_rows_hold_conversations_with_labels_for_their_answers(
    conversations: list[ConversationBatch], tokenizer: DemoTokenizer
) -> None:
    end = tokenizer.encode("<|im_end|>")
    start = tokenizer.encode("<|im_start|>")[0]
    for batch in conversations:
        for index in range(len(batch.tasks)):
            own = batch.rows.conversations == index
            ids, labels = batch.rows.ids[own], batch.rows.labels[own]
            assert batch.rows.positions[own].tolist() == list(range(len(ids)))
            answered = (labels >= 0).nonzero().flatten()
            assert (ids[answered + 1] == labels[answered]).all()
            assert labels[answered[-1]].item() == end[0]
            assert tokenizer.decode(ids[:1].tolist()) == "\n"
        assert batch.opening[0] == start
        assert batch.opening[-1] == tokenizer.encode("<img>")[0]


def test_text_rows_start_as_in_the_chat_template(conversations: list[ConversationBatch], tokenizer: DemoTokenizer) -> None:
    start = tokenizer.encode("<|im_start|>user\n")
    for batch in conversations:
        assert len(batch.text_rows.ids) == 1
        for index in range(6):
            assert batch.text_rows.ids[batch.text_rows.conversations == index][: len(start)].tolist() == start


def test_hard_batches_compress_tiles_with_digits_less_often(tokenizer: DemoTokenizer) -> None:
    uncompressed: dict[bool, list[float]] = {True: [], False: []}
    for i in range(60):
        batch = conversation_batch(rng(i), tokenizer, TINY_HARD, 12, pair_share=0)
        if batch.path == "mixed":
            with_digits = (patch_targets(batch).kind >= 7).any(-1).view(batch.compressed.shape)
            for key in (True, False):
                uncompressed[key] += (~batch.compressed[with_digits == key]).float().tolist()
    assert np.mean(uncompressed[True]) > np.mean(uncompressed[False]) + 0.3


def test_patch_batch_has_consistent_labels() -> None:
    batch = patch_batch(rng(1), (TINY_SINGLE_TILE, TINY), 24)
    assert batch.tiles.shape == (24, 112, 112, 3)
    assert batch.tiles.dtype == torch.uint8
    for field in fields(PatchTargets):
        labels = getattr(batch.targets, field.name)
        assert labels.shape == (24, SIDE_PATCHES * SIDE_PATCHES)
        assert labels.dtype == torch.int64
    targets = batch.targets
    assert set(targets.centre.flatten().tolist()) == {0, 1}
    known = targets.kind > 0
    assert (targets.colour[known] > 0).all()
    assert (targets.order_in_tile[known & (targets.kind < 7)] == -1).all()
    assert (targets.order_in_tile[targets.kind >= 7] >= 0).all()


def test_data_loader_yields_batches_in_order(tokenizer: DemoTokenizer) -> None:
    batches = StepBatches(batch_maker("patches", tokenizer), 5, "one", 2, 4)
    loaded = list(load_batches(batches, 0))
    assert len(loaded) == 2
    assert equal(loaded[0], batches[0])
    assert equal(loaded[1], batches[1])
