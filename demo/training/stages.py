"""The stages of training, in order.

"Served" images are those of `Style()`: up to twelve tiles of 448 pixels and a thumbnail. Earlier stages use tiles of 224
pixels, which are four times cheaper. "Hard" scenes have long numbers and many shapes of one kind.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from demo.batches.conversations import conversation_batch, mixed_style_batch
from demo.batches.types import ConversationBatch
from demo.scenes.style import Style
from demo.training.answer_learning import learn_answers
from demo.training.consistency import learn_consistency
from demo.training.descriptions import learn_descriptions
from demo.training.last_layer import collect_inputs, learn_last_layer
from demo.training.patch_learning import learn_patches
from demo.training.router import MULTI_TILE_COUNTS, learn_routes, measure_tiles
from demo.training.run import Stage

_SERVED, _SERVED_HARD = Style(), Style(hard=True)
_TILES_224 = Style(tile_pixels=224, min_digit_pixels=28, min_shape_fraction=0.18)
_TILES_224_HARD = replace(_TILES_224, min_digit_pixels=40, hard=True)
_SINGLE_224 = replace(_TILES_224, max_tiles=1, max_side_pixels=800, max_aspect_ratio=2)
_SINGLE_224_SMALL_SIDES = replace(_SINGLE_224, max_side_pixels=500)
_SINGLE_224_HARD = replace(_SINGLE_224, max_side_pixels=1000, min_digit_pixels=40, min_shape_fraction=0.2, hard=True)
_SINGLE_448 = Style(max_tiles=1, min_shape_fraction=0.1, max_side_pixels=700, max_aspect_ratio=2)


def _mixed(main: tuple[Style, int], other: tuple[Style, int], **options: Any) -> Callable[..., ConversationBatch]:
    """Batches of two styles, each with its tile budget."""
    return partial(mixed_style_batch, main=main, other=other, **options)


def _served(budget: int, single_tile_budget: int, **options: Any) -> Callable[..., ConversationBatch]:
    """Batches of served images with hard scenes, some of them of one tile."""
    return _mixed((_SERVED_HARD, budget), (replace(_SERVED_HARD, max_tiles=1), single_tile_budget), **options)


_WITH_PAIRS = _served(12, 12, main_share=0.6, extra_questions=0.3, pair_share=0.25, near_pair_share=0.06)
_FEWER_PAIRS = _served(14, 18, main_share=0.6, extra_questions=0.2, pair_share=0.15, near_pair_share=0.06)
_FEWEST_PAIRS = _served(14, 18, main_share=0.6, extra_questions=0.15, pair_share=0.08, near_pair_share=0.06)
_WITH_DESCRIPTIONS = _mixed(
    (_SINGLE_224, 8), (_SERVED, 7), main_share=0.6, extra_questions=0.3, labelled=False, descriptions=True
)
_INPUTS, _COSTS = "20_last_layer_inputs", "22_tile_costs"

STAGES = (
    # the tower alone, mostly on crowded crops of tiles, 224 pixels wide
    Stage(
        "01_patches_224px", 1100, 2.5e-3,
        partial(learn_patches, styles=(*[_SINGLE_224_SMALL_SIDES] * 3, _TILES_224), tile_count=32, foreground_weight=0.5),
    ),
    # projectors and language model, about one such crop
    Stage(
        "02_answers_frozen_tower", 5000, 4e-4,
        partial(
            learn_answers, tower_rate=0,
            make_batch=partial(conversation_batch, style=_SINGLE_224, tile_budget=12, extra_questions=0.2),
        ),
    ),
    Stage(
        "03_answers", 1500, 3e-4,
        partial(
            learn_answers, tower_rate=0.4,
            make_batch=partial(
                conversation_batch, style=_SINGLE_224, tile_budget=24, extra_questions=0.3, pair_share=0.3
            ),
        ),
    ),
    Stage(
        "04_patches_448px", 200, 4e-4,
        partial(learn_patches, styles=(_SINGLE_448, _SERVED, _SERVED), tile_count=7, foreground_weight=0.1),
    ),
    # several tiles and a thumbnail
    Stage(
        "05_multi_tile_224px", 1100, 3e-4,
        partial(
            learn_answers, tower_rate=0.4,
            make_batch=partial(
                conversation_batch, style=_TILES_224, tile_budget=28, extra_questions=0.5, pair_share=0.25
            ),
        ),
    ),
    Stage(
        "06_multi_tile_448px", 200, 3e-4,
        partial(
            learn_answers, tower_rate=0.3,
            make_batch=partial(conversation_batch, style=_SERVED, tile_budget=10, extra_questions=0.5),
        ),
    ),
    Stage(
        "07_multi_tile_mixed", 1500, 3e-4,
        partial(learn_answers, tower_rate=0.3, make_batch=_mixed((_TILES_224, 28), (_SERVED, 10), extra_questions=0.5)),
    ),
    Stage(
        "08_hard_frozen_tower", 1500, 4e-4,
        partial(
            learn_answers, tower_rate=0,
            make_batch=_mixed((_TILES_224_HARD, 56), (_SERVED_HARD, 14), extra_questions=0.4),
        ),
    ),
    Stage(
        "09_hard_single_tile", 1500, 4e-4,
        partial(
            learn_answers, tower_rate=0.4,
            make_batch=_mixed(
                (_SINGLE_224_HARD, 32), (replace(_SINGLE_224_HARD, hard=False), 32), extra_questions=0.3
            ),
        ),
    ),
    Stage(
        "10_hard_multi_tile", 450, 4e-4,
        partial(
            learn_answers, tower_rate=0.2,
            make_batch=_mixed((_TILES_224_HARD, 40), (_SERVED_HARD, 12), extra_questions=0.3),
        ),
    ),
    Stage(
        "11_served_frozen_tower", 800, 4e-4,
        partial(learn_answers, tower_rate=0, make_batch=_served(16, 12, extra_questions=0.3)),
    ),
    Stage(
        "12_image_pairs", 1200, 3e-4,
        partial(
            learn_answers, tower_rate=0,
            make_batch=_mixed(
                (_TILES_224_HARD, 40), (_SERVED_HARD, 14), tile_counts=MULTI_TILE_COUNTS, extra_questions=0.3,
                pair_share=0.6, near_pair_share=0.2,
            ),
        ),
    ),
    Stage("13_served", 1500, 2.5e-4, partial(learn_answers, tower_rate=0.6, make_batch=_WITH_PAIRS)),
    Stage(
        "14_served_frozen_tower", 1600, 3e-4,
        partial(
            learn_answers, tower_rate=0,
            make_batch=_served(16, 16, main_share=0.8, extra_questions=0.3, pair_share=0.2),
        ),
    ),
    Stage("15_served_low_rate", 420, 1e-4, partial(learn_answers, tower_rate=0.4, make_batch=_WITH_PAIRS)),
    Stage("16_served_more_single_tiles", 1000, 2e-4, partial(learn_answers, tower_rate=0.3, make_batch=_FEWER_PAIRS)),
    Stage(
        "17_more_counting_heads", 1000, 2.5e-4,
        partial(learn_answers, tower_rate=0.3, make_batch=_FEWER_PAIRS, more_counting_heads=True),
    ),
    Stage(
        "18_counting_low_rate", 700, 1.2e-4,
        partial(learn_answers, tower_rate=0.3, make_batch=_FEWEST_PAIRS, more_counting_heads=True),
    ),
    # visual consistency learning, with the last MLP in between
    Stage("19_consistency", 150, 6e-5, partial(learn_consistency, style=_SERVED_HARD, tile_budget=12)),
    Stage(_INPUTS, 400, 0, partial(collect_inputs, make_batch=_FEWER_PAIRS)),
    Stage("21_last_layer", 150, 2e-4, partial(learn_last_layer, inputs_stage=_INPUTS, token_count=4096)),
    Stage(_COSTS, 360, 0, partial(measure_tiles, style=_SERVED_HARD, tile_budget=7)),
    Stage("23_router", 200, 5e-4, partial(learn_routes, costs_stage=_COSTS, compressed_share=0.65)),
    # a fixed answer to open questions
    Stage("24_descriptions", 200, 1e-2, partial(learn_descriptions, make_batch=_WITH_DESCRIPTIONS)),
)  # fmt: skip
