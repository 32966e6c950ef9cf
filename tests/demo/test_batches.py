import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common import tiling
from demo import batches, scenes
from demo.scenes import Style
from demo.words import Words, counts

TINY = Style(tile=112, smallest_digit=16)
DRILL = replace(TINY, drill=True)
SINGLE = Style(tile=112, max_tiles=1, smallest_digit=16)
SIDE = 112 // scenes.PATCH


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng([13, *seed])


def flat(value: Any) -> Iterator[Any]:
    """Everything in a batch that can be compared, tensors as bytes."""
    if isinstance(value, Tensor):
        yield tuple(value.shape), value.numpy().tobytes()
    elif is_dataclass(value):
        for one in fields(value):
            yield from flat(getattr(value, one.name))
    else:
        yield value


def same(one: Any, other: Any) -> bool:
    return list(flat(one)) == list(flat(other))


MAKERS = ["dense", "talk"]


def maker(name: str, words: Words) -> Any:
    if name == "dense":
        return partial(batches.dense, styles=(TINY,), count=6)
    return partial(batches.talk, words=words, style=TINY, budget=8)


@pytest.mark.parametrize("name", MAKERS)
def test_a_seed_a_stage_and_a_step_are_a_batch(words: Words, name: str) -> None:
    """Also where a run goes on from the middle."""
    make = maker(name, words)
    whole = batches.Batches(make, seed=1, stage="one", first=0, steps=5)
    rest = batches.Batches(make, seed=1, stage="one", first=3, steps=5)
    assert len(whole) == 5
    assert len(rest) == 2
    fourth = whole[3]
    assert same(fourth, whole[3])
    assert same(fourth, rest[0])
    assert not same(fourth, rest[1])
    for seed, stage in ((2, "one"), (1, "two")):
        assert not same(fourth, batches.Batches(make, seed, stage, 3, 5)[0])


@pytest.fixture(scope="module")
def talks(words: Words) -> list[batches.Talk]:
    return [batches.talk(rng(i), words, TINY, 12) for i in range(60)]


def prefixes(talk: batches.Talk) -> Tensor:
    """`compressed` of each prefix's tiles."""
    return talk.compressed.reshape(len(talk.compressed) // talk.together, -1)


def test_as_many_tiles_are_compressed_in_each_prefix(talks: list[batches.Talk]) -> None:
    shares = []
    for talk in talks:
        numbers = prefixes(talk).sum(1)
        assert len(set(numbers.tolist())) == 1
        shares.append(float(talk.compressed.float().mean()))
    assert {0.0, 1.0} < set(shares), "all, none and some should occur"


def test_the_parts_of_a_batch_agree_in_number(talks: list[batches.Talk]) -> None:
    for talk in talks:
        tiles = talk.compressed.numel()
        assert talk.tiles.shape == (tiles, 112, 112, 3)
        assert talk.told is not None
        assert talk.told.kind.shape == (tiles, SIDE * SIDE)
        assert len(talk.rows.ids) == len(prefixes(talk))
        assert sorted(set(talk.rows.numbers.flatten().tolist()) - {-1}) == list(range(len(talk.tasks)))
    assert {talk.compressed.shape[1] for talk in talks} >= {1, 3, 4, 5}
    assert {talk.together for talk in talks} == {1, 2}


def test_only_pairs_are_compared(talks: list[batches.Talk], words: Words) -> None:
    for talk in talks:
        assert (set(talk.tasks) == {"same"}) == (talk.together == 2)
        if talk.together == 2:
            pictures = talk.tiles.reshape(len(prefixes(talk)), 2, -1)
            for (first, second), row in zip(pictures, talk.rows.answers, strict=True):
                said = words.decode(row[row >= 0].tolist())
                assert said == ("yes" if torch.equal(first, second) else "no")


def test_what_follows_a_prefix_is_a_turn_with_its_answer(talks: list[batches.Talk], words: Words) -> None:
    end = words.encode("<|im_end|>")
    start = words.encode("<|im_start|>")[0]
    for talk in talks:
        for number in range(len(talk.tasks)):
            here = talk.rows.numbers == number
            ids, answers = talk.rows.ids[here], talk.rows.answers[here]
            assert talk.rows.places[here].tolist() == list(range(len(ids)))
            asked = (answers >= 0).nonzero().flatten()
            assert (ids[asked + 1] == answers[asked]).all()
            assert answers[asked[-1]].item() == end[0]
            assert words.decode(ids[:1].tolist()) == "\n"
        assert talk.opening[0] == start
        assert talk.opening[-1] == words.encode("<img>")[0]


def test_a_text_alone_is_what_the_chat_template_makes_of_it(talks: list[batches.Talk], words: Words) -> None:
    start = words.encode("<|im_start|>user\n")
    for talk in talks:
        assert len(talk.texts.ids) == 1
        for number in range(6):
            assert talk.texts.ids[talk.texts.numbers == number][: len(start)].tolist() == start


def test_pairs_are_of_one_size_and_half_are_equal() -> None:
    counts = [scenes.TILES[i % len(scenes.TILES)] for i in range(300)]
    pairs = [scenes.pair(rng(i), TINY, count) for i, count in enumerate(counts)]
    others = [(a, b) for a, b in pairs if a != b]
    assert 0.4 < len(others) / len(pairs) < 0.6
    assert 0.35 < sum(a.background == b.background for a, b in others) / len(others) < 0.65
    assert all((a.shapes, a.number) != (b.shapes, b.number) for a, b in others)
    pairs += [scenes.near_pair(rng(i), TINY, count) for i, count in enumerate(counts)]
    for count, two in zip(counts * 2, pairs, strict=True):
        assert {math.prod(tiling.select_grid(scene.width, scene.height, TINY.tiling)) for scene in two} == {count}


def test_a_drill_has_long_numbers_and_much_to_count() -> None:
    found = {style: [scenes.scene(rng(i), style) for i in range(200)] for style in (TINY, DRILL)}
    digits = {style: np.mean([len(s.number.text) for s in some if s.number]) for style, some in found.items()}
    asked = {style: [int(q.answer) for s in some for q in counts(s)] for style, some in found.items()}
    assert digits[TINY] + 0.3 < digits[DRILL]
    assert np.mean(asked[DRILL]) > 1.1 * np.mean(asked[TINY])
    assert set(asked[DRILL]) == {1, 2, 3, 4, 5, 6}


def test_a_drill_leaves_digits_to_the_long_path(words: Words) -> None:
    """More than other tiles, where some of an image are compressed."""
    long: dict[bool, list[float]] = {True: [], False: []}
    for i in range(60):
        talk = batches.talk(rng(i), words, DRILL, 12, pairs=0)
        assert talk.told is not None
        if talk.path == "mixed":
            digits = (talk.told.kind >= 7).any(-1).view(talk.compressed.shape)
            for kind in (True, False):
                long[kind] += (~talk.compressed[digits == kind]).float().tolist()
    assert np.mean(long[True]) > np.mean(long[False]) + 0.3


def test_tiles_to_learn_patches_from_come_with_their_labels() -> None:
    found = batches.dense(rng(1), (SINGLE, TINY), 24)
    assert found.tiles.shape == (24, 112, 112, 3)
    assert found.tiles.dtype == torch.uint8
    for name in ("kind", "colour", "order", "turn", "place", "middle"):
        labels = getattr(found.told, name)
        assert labels.shape == (24, SIDE * SIDE)
        assert labels.dtype == torch.int64
    told = found.told
    assert set(told.middle.flatten().tolist()) == {0, 1}
    known = told.kind > 0
    assert (told.colour[known] > 0).all()
    assert (told.order[known & (told.kind < 7)] == -1).all()
    assert (told.order[told.kind >= 7] >= 0).all()


def test_a_data_loader_gives_the_batches_in_order(words: Words) -> None:
    data = batches.Batches(maker("dense", words), 5, "one", 2, 4)
    loaded = list(batches.loaded(data, 0))
    assert len(loaded) == 2
    assert same(loaded[0], data[0])
    assert same(loaded[1], data[1])
