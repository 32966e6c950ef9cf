import torch
from torch import Tensor

from demo.batches.types import PatchTargets
from demo.training.auxiliary_losses import token_ordinals

SIDE = 8
TilePatch = tuple[int, int, int]
"""Tile, row, column."""
_UNKNOWN_BY_DEFAULT = ("order_in_tile", "digit_index", "position")


def make_targets(tiles: int, **labels: dict[TilePatch, int]) -> PatchTargets:
    """Background, except for the given labels."""

    def field(name: str) -> Tensor:
        values = torch.full((tiles, SIDE, SIDE), -1 if name in _UNKNOWN_BY_DEFAULT else 0)
        for patch, label in labels.get(name, {}).items():
            values[patch] = label
        return values.flatten(1)

    names = ("kind", "colour", "order_in_tile", "digit_index", "position", "centre")
    return PatchTargets(**{name: field(name) for name in names})


def shape_targets(tiles: int, kinds: dict[TilePatch, int], whole_scene_tile: int) -> PatchTargets:
    """Shapes of one patch each."""
    positions = {patch: 4 for patch in kinds if patch[0] == whole_scene_tile}
    return make_targets(tiles, kind=kinds, centre=dict.fromkeys(kinds, 1), position=positions)


def known(labels: Tensor) -> dict[int, int]:
    """Labels other than −1, by token."""
    return {token: int(label) for token, label in enumerate(labels) if label >= 0}


def test_digits_of_a_number_across_a_tile_border_are_indexed_in_order() -> None:
    targets = make_targets(2, digit_index={(0, 2, 7): 0, (1, 2, 1): 1, (1, 2, 2): 2})
    digits, _ = token_ordinals(targets, torch.tensor([[False, False]]))
    assert digits.shape == (1, 32)
    assert known(digits[0]) == {7: 0, 20: 1, 21: 2}
    digits, _ = token_ordinals(targets, torch.tensor([[False, True]]))
    assert digits.shape == (1, 20)
    assert known(digits[0]) == {7: 0}, "two digits in one token of the short path"


def test_shapes_are_numbered_by_kind_in_the_tile_with_the_whole_scene() -> None:
    circle, star = 1, 4
    kinds = {(0, 0, 0): circle, (1, 0, 0): circle, (1, 1, 5): circle, (1, 4, 2): star, (1, 6, 6): circle}
    targets = shape_targets(2, kinds, whole_scene_tile=1)
    _, ordinals = token_ordinals(targets, torch.tensor([[False, False]]))
    assert known(ordinals[0]) == {16: 0, 18: 1, 25: 0, 31: 2}
    _, ordinals = token_ordinals(targets, torch.tensor([[False, True]]))
    assert known(ordinals[0]) == {16: 0, 17: 1, 18: 0, 19: 2}


def test_ambiguous_shapes_have_no_ordinal() -> None:
    long_path = torch.tensor([[False]])
    thin = make_targets(1, kind={(0, 1, 1): -1}, centre={(0, 1, 1): 1}, position={(0, 1, 1): 0})
    assert known(token_ordinals(thin, long_path)[1][0]) == {}
    close = shape_targets(1, {(0, 0, 0): 2, (0, 1, 1): 2, (0, 4, 4): 2}, whole_scene_tile=0)
    assert known(token_ordinals(close, long_path)[1][0]) == {10: 2}, "two shapes in one token count, without an ordinal"
    many = shape_targets(1, {(0, 2 * (i // 4), 2 * (i % 4)): 3 for i in range(8)}, whole_scene_tile=0)
    assert list(known(token_ordinals(many, long_path)[1][0]).values()) == [0, 1, 2, 3, 4, 5]
