import pytest
import torch

from demo.text.tokenizer import DemoTokenizer
from demo.training.attention_targets import FIRST_TOKEN_WEIGHT, _nearest_centres, counting_targets, reading_targets
from tests.demo.training.samples import hard_batch, patch_targets


@pytest.mark.parametrize("compressed", [False, True])
def test_each_shape_of_the_whole_scene_has_an_equal_share(tokenizer: DemoTokenizer, compressed: bool) -> None:
    large_counts = 0
    for seed in range(12):
        batch = hard_batch(tokenizer, seed, compressed)
        labels = patch_targets(batch)
        before = (batch.compressed.shape[1] - 1) * (16 if compressed else 64) + len(batch.opening)
        images, tiles = batch.compressed.shape
        span, side = (4, 4) if compressed else (2, 8)
        is_shape = ((labels.kind >= 1) & (labels.kind <= 6)) | (labels.centre == 1)
        covered = is_shape.view(images, tiles, side, span, side, span).any(5).any(3).flatten(1)
        counts = [count for task, (_, count) in zip(batch.tasks, batch.counted, strict=True) if task == "count"]
        targets = list(counting_targets(batch, labels))
        assert len(targets) <= len(counts)
        for target in targets:
            sets = target.sets
            assert sets[0] == 0, "the first token has a share"
            assert not (sets[1:before] >= 0).any(), "shapes in other tiles"
            assert not (sets[len(sets) - len(batch.closing) :] >= 0).any()
            assert set(sets[sets >= 0].tolist()) == set(range(len(target.shares))), "no set is empty"
            in_a_set = sets[len(batch.opening) : len(sets) - len(batch.closing)] >= 0
            assert bool((covered[target.prefix] | ~in_a_set).all()), "a digit or background in a set"
            count = round(FIRST_TOKEN_WEIGHT / float(target.shares[0]) - FIRST_TOKEN_WEIGHT)
            assert count in counts
            assert torch.isclose(target.shares.sum(), torch.tensor(1.0))
            large_counts += count > 2
    assert large_counts, "no scene had more than two shapes of a kind"


def test_tokens_of_a_shape_belong_to_the_nearest_centre() -> None:
    centres, area = torch.zeros(16), torch.zeros(16, dtype=torch.bool)
    centres[5] = centres[14] = 1
    area[[1, 4, 5, 10, 11, 15]] = True
    nearest = _nearest_centres(centres, area, 4)
    assert nearest.tolist() == [-1, 1, -1, -1, 1, 1, -1, -1, -1, -1, 2, 2, -1, -1, 2, 2]
    assert _nearest_centres(torch.zeros(16), area, 4).tolist() == [-1] * 16


def test_a_digit_is_read_from_all_tokens_with_its_index(tokenizer: DemoTokenizer) -> None:
    checked = 0
    for seed in range(12):
        batch = hard_batch(tokenizer, seed)
        labels = patch_targets(batch)
        images, tiles = batch.compressed.shape
        index = labels.digit_index.view(images, tiles, 8, 2, 8, 2)
        by_index = torch.stack([(index == i).any(5).any(3).flatten(1) for i in range(4)], dim=1)
        for target in reading_targets(batch, labels):
            inner = target.sets[len(batch.opening) : len(target.sets) - len(batch.closing)] == 0
            assert any(torch.equal(inner, tokens) for tokens in by_index[target.prefix])
            checked += 1
    assert checked > 4
