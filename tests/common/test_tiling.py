"""Grids of tiles are those of the official code and within the bounds."""

import pytest

from common.tiling import Tiling, has_thumbnail, resolve_tile_bounds, select_grid

TILING = Tiling(min_tiles=1, max_tiles=12, thumbnail=True)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((800, 1300), (2, 3)), ((448, 448), (1, 1)), ((1, 10_000), (1, 12)), ((10_000, 1), (12, 1)), ((1, 1), (1, 1))],
)
def test_the_grid_fits_the_aspect_ratio(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert select_grid(*size, TILING) == expected


def test_a_tie_goes_to_the_larger_grid_only_if_the_image_is_large() -> None:
    """2 × 1 and 4 × 2 fit a ratio of two equally well."""
    assert select_grid(600, 300, TILING) == (2, 1)
    assert select_grid(1600, 800, TILING) == (4, 2)


@pytest.mark.parametrize(("low", "high"), [(1, 1), (4, 4), (3, 7), (1, 40)])
def test_the_grid_is_within_the_bounds(low: int, high: int) -> None:
    for size in [(100, 100), (1000, 300), (3, 2000)]:
        columns, rows = select_grid(*size, Tiling(low, high, thumbnail=True))
        assert low <= columns * rows <= high


@pytest.mark.parametrize(
    ("requested", "defaults", "expected"),
    [
        ((0, 0), (1, 12), (1, 12)),
        ((0, 1), (1, 12), (1, 1)),
        ((0, 3), (4, 12), (3, 3)),
        ((0, 40), (1, 12), (1, 40)),
        ((14, 0), (1, 12), (14, 14)),
        ((4, 6), (1, 12), (4, 6)),
    ],
)
def test_requested_bounds_override_defaults(
    requested: tuple[int, int], defaults: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert resolve_tile_bounds(*requested, *defaults) == expected


def test_only_an_image_of_several_tiles_has_a_thumbnail() -> None:
    assert has_thumbnail(2, 1, TILING)
    assert not has_thumbnail(1, 1, TILING)
    assert not has_thumbnail(2, 1, Tiling(1, 12, thumbnail=False))
