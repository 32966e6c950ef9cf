import torch
from torch import Tensor

from demo import batches, train

SIDE = 8


def patches(tiles: int, **at: dict[tuple[int, int, int], int]) -> batches.Patches:
    """Nothing but what is said of a tile's row and column."""

    def filled(name: str) -> Tensor:
        value = torch.full((tiles, SIDE, SIDE), -1 if name in ("order", "turn", "place") else 0)
        for place, label in at.get(name, {}).items():
            value[place] = label
        return value.flatten(1)

    return batches.Patches(**{name: filled(name) for name in ("kind", "colour", "order", "turn", "place", "middle")})


def marks(found: Tensor) -> dict[int, list[int]]:
    """Which are set, by token, of the only image."""
    return {token: row.nonzero().flatten().tolist() for token, row in enumerate(found[0]) if row.any()}


def test_a_number_that_a_border_cuts_is_marked_in_order_through_both_tiles() -> None:
    told = patches(2, kind={(0, 2, 7): 9, (1, 2, 1): 8}, turn={(0, 2, 7): 0, (1, 2, 1): 1, (1, 2, 2): 2})
    long = train._marks(told, torch.tensor([[False, False]]))
    assert long.shape == (1, 32, train.MARKS)
    assert marks(long) == {7: [0], 20: [1], 21: [2]}
    short = train._marks(told, torch.tensor([[False, True]]))
    assert short.shape == (1, 20, train.MARKS)
    assert marks(short) == {7: [0], 16: [1, 2]}


def test_shapes_are_counted_in_the_whole_picture_only_each_by_itself() -> None:
    circle, star = 1, 4
    things = {(0, 0, 0): circle, (1, 0, 0): circle, (1, 1, 5): circle, (1, 4, 2): star, (1, 6, 6): circle, (1, 7, 6): circle}
    middles = dict.fromkeys(things, 1)
    told = patches(2, kind=things, middle=middles, place={at: 4 for at in things if at[0] == 1})
    found = marks(train._marks(told, torch.tensor([[False, False]])))
    assert found == {16: [4], 18: [5], 25: [4], 31: [7]}, "two middles in one token count as two"


def test_a_middle_that_cannot_be_told_is_not_counted() -> None:
    told = patches(1, kind={(0, 1, 1): -1}, middle={(0, 1, 1): 1}, place={(0, 1, 1): 0})
    assert marks(train._marks(told, torch.tensor([[False]]))) == {}
