"""How an image is cut into tiles: the official code's arithmetic, for those who cut and those who only count."""

import functools
from dataclasses import dataclass

MAX_TILES = 40
"""Largest grid of one image: what InternVL 1.5 was evaluated with."""


@dataclass(frozen=True)
class Tiling:
    """How images are cut: bounds of the grid (thumbnail not counted), side of a tile and largest image, in pixels."""

    min_tiles: int
    max_tiles: int
    thumbnail: bool
    side: int = 448
    max_pixels: int = 64_000_000


def resolve_tile_bounds(least: int, most: int, own_least: int, own_most: int) -> tuple[int, int]:
    """The bounds in force, of those asked for and the checkpoint's own: one that is 0 gives way to the other."""
    chosen = most or max(own_most, least)
    return least or min(own_least, chosen), chosen


def select_grid(width: int, height: int, tiling: Tiling) -> tuple[int, int]:
    """(columns, rows) whose ratio is nearest to the image's.

    On an exact tie the later candidate wins if the image has more than half of that grid's pixels.
    """
    best, best_distance = (1, 1), float("inf")
    for columns, rows in _candidates(tiling.min_tiles, tiling.max_tiles):
        distance = abs(width / height - columns / rows)
        large = width * height > 0.5 * tiling.side**2 * columns * rows
        if distance < best_distance or (distance == best_distance and large):
            best, best_distance = (columns, rows), distance
    return best


def has_thumbnail(columns: int, rows: int, tiling: Tiling) -> bool:
    """Whether the whole image comes once more as a last tile: not where it is one tile anyway."""
    return tiling.thumbnail and columns * rows > 1


@functools.cache
def _candidates(least: int, most: int) -> list[tuple[int, int]]:
    # sorted is stable, so among grids of equal size the order is that of the set: built as the official code builds it
    found = {(i, j) for n in range(least, most + 1) for i in range(1, n + 1) for j in range(1, n + 1) if least <= i * j <= most}
    return sorted(found, key=lambda grid: grid[0] * grid[1])
