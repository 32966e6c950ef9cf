import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from demo import batches, looking, model
from demo.scenes import Style
from demo.words import Words

STYLE = Style(tile=224, smallest_digit=28, drill=True)


def talk(words: Words, seed: int, compressed: bool = False) -> batches.Talk:
    found = batches.talk(np.random.default_rng(seed), words, STYLE, 6, sizes=(2, 4), pairs=0, extras=0)
    found.compressed.fill_(compressed)
    return found


def seen(trainee: model.Trainee, batch: batches.Talk) -> model.Read:
    return trainee.read(trainee.prefixes(batch, trainee.forward(batch.tiles, batch.corners), batch.compressed))


@pytest.mark.parametrize("seed", range(3))
def test_attention_is_the_one_that_the_language_model_has(trainee: model.Trainee, words: Words, seed: int) -> None:
    batch = talk(words, seed, compressed=True)
    prefix = trainee.prefixes(batch, trainee.forward(batch.tiles, batch.corners), batch.compressed)
    attentions, read = looking.Looking(trainee), trainee.read(prefix)
    trainee.answer(read, batch.rows)
    number = int(batch.rows.numbers.max())
    here = batch.rows.numbers[-1] == number
    row = int(here.nonzero()[-1])
    at = torch.tensor([[len(prefix) - 1, row]])
    found = {(layer, head): attentions._attention(read, batch.rows, layer, head, at)[0].exp() for layer, head in looking.COUNTS}
    attentions.close()
    trainee.language.set_attn_implementation("eager")
    whole = torch.cat([prefix[-1], trainee.embed(batch.rows.ids[-1][here])])[None]
    told = trainee.language.model(inputs_embeds=whole, output_attentions=True).attentions
    trainee.language.set_attn_implementation("sdpa")
    for (layer, head), seen in found.items():
        assert torch.allclose(seen[: prefix.shape[1]], told[layer][0, head, -1, : prefix.shape[1]], atol=1e-5)
        assert torch.allclose(seen.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("compressed", [False, True])
def test_each_shape_of_the_whole_picture_has_the_same_share(words: Words, compressed: bool) -> None:
    several = 0
    for seed in range(12):
        batch = talk(words, seed, compressed)
        assert batch.told is not None
        before = (batch.compressed.shape[1] - 1) * (16 if compressed else 64) + len(batch.opening)
        images, tiles = batch.compressed.shape
        span, side = (4, 4) if compressed else (2, 8)
        shapes = ((batch.told.kind >= 1) & (batch.told.kind <= 6)) | (batch.told.middle == 1)
        covered = shapes.view(images, tiles, side, span, side, span).any(5).any(3).flatten(1)
        counts = [many for task, (_, many) in zip(batch.tasks, batch.sought, strict=True) if task == "count"]
        found = list(looking.counting(batch, batch.told))
        assert len(found) <= len(counts)
        for one in found:
            assert one.sets[0] == 0, "the first token stands for none"
            assert not (one.sets[1:before] >= 0).any(), "shapes in other tiles"
            assert not (one.sets[len(one.sets) - len(batch.end) :] >= 0).any()
            assert set(one.sets[one.sets >= 0].tolist()) == set(range(len(one.shares))), "none is empty"
            seen = one.sets[len(batch.opening) : len(one.sets) - len(batch.end)] >= 0
            assert bool((covered[one.prefix] | ~seen).all()), "a digit, or nothing, taken for a shape"
            many = round(looking.NONE / float(one.shares[0]) - looking.NONE)
            assert many in counts
            assert torch.isclose(one.shares.sum(), torch.tensor(1.0))
            several += many > 2
    assert several, "none of the pictures had more than two of a shape"


def test_a_shape_has_the_tokens_that_are_nearest_to_its_middle() -> None:
    here, area = torch.zeros(16), torch.zeros(16, dtype=torch.bool)
    here[5] = here[14] = 1
    area[[1, 4, 5, 10, 11, 15]] = True
    found = looking._nearest(here, area, 4)
    assert found.tolist() == [-1, 1, -1, -1, 1, 1, -1, -1, -1, -1, 2, 2, -1, -1, 2, 2]
    assert looking._nearest(torch.zeros(16), area, 4).tolist() == [-1] * 16


def test_a_digit_is_looked_for_where_those_of_its_turn_are(words: Words) -> None:
    spelled = 0
    for seed in range(12):
        batch = talk(words, seed)
        assert batch.told is not None
        images, tiles = batch.compressed.shape
        turn = batch.told.turn.view(images, tiles, 8, 2, 8, 2)
        turns = torch.stack([(turn == i).any(5).any(3).flatten(1) for i in range(4)], dim=1)
        for one in looking.reading(batch, batch.told):
            inner = one.sets[len(batch.opening) : len(one.sets) - len(batch.end)] == 0
            assert any(torch.equal(inner, seen) for seen in turns[one.prefix])
            spelled += 1
    assert spelled > 4


def test_looking_where_it_should_costs_nothing() -> None:
    one = looking.Wanted(0, 0, torch.tensor([0, -1, 1, 1, 2]), torch.tensor([0.5, 0.25, 0.25]))
    right = torch.tensor([0.5, 1e-9, 0.2, 0.05, 0.25]).log()
    assert abs(float(looking._lost(right, one))) < 1e-6
    astray = torch.tensor([0.25, 0.5, 0.1, 0.025, 0.125]).log()
    assert float(looking._lost(astray, one)) == pytest.approx(0.693, abs=1e-3)


def test_a_count_weighs_by_how_many_there_are(trainee: model.Trainee, words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = talk(words, 1)
    assert batch.told is not None
    monkeypatch.setattr(looking, "reading", lambda *_: iter(()))
    attentions = looking.Looking(trainee)
    read = seen(trainee, batch)
    trainee.answer(read, batch.rows)
    monkeypatch.setattr(looking, "_lost", lambda _, one: torch.tensor(float(len(one.shares) > 2)))
    sizes = [len(one.shares) for one in looking.counting(batch, batch.told)]
    assert min(sizes) <= 2 < max(sizes)
    loss, _ = attentions.loss(read, batch)
    attentions.close()
    assert float(loss) == pytest.approx(sum(size for size in sizes if size > 2) / sum(sizes))


def test_each_attention_that_counts_is_asked_for_and_weighs_the_same(trainee: model.Trainee, words: Words) -> None:
    batch = talk(words, 1)

    def loss(**chosen: Any) -> tuple[float, dict[str, float]]:
        attentions = looking.Looking(trainee, **chosen)
        read = seen(trainee, batch)
        trainee.answer(read, batch.rows)
        attentions.close()
        lost, shown = attentions.loss(read, batch)
        return float(lost), shown

    few, first = loss()
    more, every = loss(counts=looking.RECOUNTS)
    new = every.keys() - first.keys()
    assert new == {f"finds counts {at}" for at in ("2.0", "2.1", "3.2", "3.3")}
    added = sum(-math.log(every[name]) for name in new)
    assert more - few == pytest.approx(0.5 * added, rel=1e-3)
    assert loss(stress=1.0)[0] == pytest.approx(2 * few, rel=1e-5)


def test_without_labels_nothing_is_asked_of_the_attentions(trainee: model.Trainee, words: Words) -> None:
    batch = talk(words, 1)
    attentions = looking.Looking(trainee)
    read = seen(trainee, batch)
    attentions.close()
    for unlabelled in (dataclasses.replace(batch, told=None), dataclasses.replace(batch, together=2)):
        loss, shown = attentions.loss(read, unlabelled)
        assert (float(loss), shown) == (0.0, {})
