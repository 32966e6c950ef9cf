import torch
from torch import Tensor

from demo import batches, train

SIDE = 8
Placement = tuple[int, int, int]  # tile, row, column


def patches(tiles: int, **at: dict[Placement, int]) -> batches.Patches:
    """Nothing but what is said of a tile's row and column."""

    def filled(name: str) -> Tensor:
        value = torch.full((tiles, SIDE, SIDE), -1 if name in ("order", "turn", "place") else 0)
        for place, label in at.get(name, {}).items():
            value[place] = label
        return value.flatten(1)

    return batches.Patches(**{name: filled(name) for name in ("kind", "colour", "order", "turn", "place", "middle")})


def shapes(tiles: int, kinds: dict[Placement, int], whole: int) -> batches.Patches:
    """Shapes by their middles; `whole`: the tile that shows the whole picture."""
    return patches(tiles, kind=kinds, middle=dict.fromkeys(kinds, 1), place={at: 4 for at in kinds if at[0] == whole})


def known(found: Tensor) -> dict[int, int]:
    """What is told, by token or patch."""
    return {place: int(value) for place, value in enumerate(found) if value >= 0}


def test_a_number_that_a_border_cuts_is_in_order_through_both_tiles() -> None:
    told = patches(2, turn={(0, 2, 7): 0, (1, 2, 1): 1, (1, 2, 2): 2})
    turns, _ = train._marks(told, torch.tensor([[False, False]]))
    assert turns.shape == (1, 32)
    assert known(turns[0]) == {7: 0, 20: 1, 21: 2}
    turns, _ = train._marks(told, torch.tensor([[False, True]]))
    assert turns.shape == (1, 20)
    assert known(turns[0]) == {7: 0}, "two digits in a token of the short path"


def test_shapes_are_counted_each_by_itself_in_the_whole_picture_only() -> None:
    circle, star = 1, 4
    things = {(0, 0, 0): circle, (1, 0, 0): circle, (1, 1, 5): circle, (1, 4, 2): star, (1, 6, 6): circle}
    told = shapes(2, things, whole=1)
    _, counts = train._marks(told, torch.tensor([[False, False]]))
    assert known(counts[0]) == {16: 0, 18: 1, 25: 0, 31: 2}
    _, counts = train._marks(told, torch.tensor([[False, True]]))
    assert known(counts[0]) == {16: 0, 17: 1, 18: 0, 19: 2}


def test_what_cannot_be_told_is_not_counted() -> None:
    long = torch.tensor([[False]])
    thin = patches(1, kind={(0, 1, 1): -1}, middle={(0, 1, 1): 1}, place={(0, 1, 1): 0})
    assert known(train._marks(thin, long)[1][0]) == {}
    close = shapes(1, {(0, 0, 0): 2, (0, 1, 1): 2, (0, 4, 4): 2}, whole=0)
    assert known(train._marks(close, long)[1][0]) == {10: 2}, "two in one token are not told apart, but count"
    many = shapes(1, {(0, 2 * (i // 4), 2 * (i % 4)): 3 for i in range(8)}, whole=0)
    assert list(known(train._marks(many, long)[1][0]).values()) == [0, 1, 2, 3, 4, 5]
