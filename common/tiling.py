"""Computes the tile grid of an image with the arithmetic of the official code (`dynamic_preprocess` of InternVL).

The vision worker cuts images into this grid (`vision_worker/preprocessing/tiling.py`); the gateway counts visual tokens by it.
"""

import functools
from dataclasses import dataclass

MAX_TILES = 40
"""Maximum number of tiles of an image, thumbnail not counted: the number that InternVL 1.5 was evaluated with."""


@dataclass(frozen=True)
class Tiling:
    """How images are cut into tiles.

    Attributes:
        min_tiles: minimum number of tiles, thumbnail not counted.
        max_tiles: maximum number of tiles, thumbnail not counted.
        thumbnail: whether an image of several tiles gets a thumbnail of the whole as its last tile.
        side: side of a tile in pixels.
    """

    min_tiles: int
    max_tiles: int
    thumbnail: bool
    side: int = 448


def resolve_tile_bounds(min_tiles: int, max_tiles: int, default_min: int, default_max: int) -> tuple[int, int]:
    """Return the bounds in force, (minimum, maximum) number of tiles.

    Args:
        min_tiles: requested minimum; 0: the default, or the requested maximum if that is smaller.
        max_tiles: requested maximum; 0: the default, or the requested minimum if that is larger.
        default_min: the checkpoint's minimum.
        default_max: the checkpoint's maximum.
    """
    resolved_max = max_tiles or max(default_max, min_tiles)
    return min_tiles or min(default_min, resolved_max), resolved_max


def select_grid(width: int, height: int, tiling: Tiling) -> tuple[int, int]:
    """Return the grid, (columns, rows), whose aspect ratio is nearest to the image's.

    On an exact tie the later candidate wins if the image has more than half of that grid's pixels.
    """
    best, best_distance = (1, 1), float("inf")
    for columns, rows in _candidate_grids(tiling.min_tiles, tiling.max_tiles):
        distance = abs(width / height - columns / rows)
        large = width * height > 0.5 * tiling.side**2 * columns * rows
        if distance < best_distance or (distance == best_distance and large):
            best, best_distance = (columns, rows), distance
    return best


def has_thumbnail(columns: int, rows: int, tiling: Tiling) -> bool:
    """Return whether the image gets a thumbnail as its last tile. An image of one tile does not."""
    return tiling.thumbnail and columns * rows > 1


@functools.cache
def _candidate_grids(low: int, high: int) -> list[tuple[int, int]]:
    # sorted is stable: grids of equal size keep the order of the set, which is therefore built as the official code builds it
    grids = {(i, j) for n in range(low, high + 1) for i in range(1, n + 1) for j in range(1, n + 1) if low <= i * j <= high}
    return sorted(grids, key=lambda grid: grid[0] * grid[1])
