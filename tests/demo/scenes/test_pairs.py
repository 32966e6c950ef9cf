import math
from dataclasses import replace

import numpy as np

from common import tiling
from demo.scenes.generation import generate_near_pair, generate_pair, generate_scene
from demo.scenes.style import TILE_COUNTS, Style
from demo.text.questions import count_questions

TINY = Style(tile_pixels=112, min_digit_pixels=16)
TINY_HARD = replace(TINY, hard=True)


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng([13, *seed])


def test_pairs_have_one_tile_count_and_half_are_equal() -> None:
    tile_counts = [TILE_COUNTS[i % len(TILE_COUNTS)] for i in range(300)]
    pairs = [generate_pair(rng(i), TINY, count) for i, count in enumerate(tile_counts)]
    different = [(a, b) for a, b in pairs if a != b]
    assert 0.4 < len(different) / len(pairs) < 0.6
    assert 0.35 < sum(a.background == b.background for a, b in different) / len(different) < 0.65
    assert all((a.shapes, a.number) != (b.shapes, b.number) for a, b in different)
    pairs += [generate_near_pair(rng(i), TINY, count) for i, count in enumerate(tile_counts)]
    for count, pair in zip(tile_counts * 2, pairs, strict=True):
        assert {math.prod(tiling.select_grid(scene.width, scene.height, TINY.tiling)) for scene in pair} == {count}


def test_hard_scenes_have_longer_numbers_and_more_to_count() -> None:
    by_style = {style: [generate_scene(rng(i), style) for i in range(200)] for style in (TINY, TINY_HARD)}
    digits = {style: np.mean([len(s.number.text) for s in scenes if s.number]) for style, scenes in by_style.items()}
    counts = {style: [int(q.answer) for s in scenes for q in count_questions(s)] for style, scenes in by_style.items()}
    assert digits[TINY] + 0.3 < digits[TINY_HARD]
    assert np.mean(counts[TINY_HARD]) > 1.1 * np.mean(counts[TINY])
    assert set(counts[TINY_HARD]) == {1, 2, 3, 4, 5, 6}
