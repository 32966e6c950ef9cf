"""Parameters of scene generation, and image sizes that tile evenly."""

import math
from dataclasses import dataclass

import numpy as np

from common import tiling
from demo.scenes.fonts import font_files
from demo.scenes.scene import PATCH_PIXELS, TILE_PATCHES, TILE_PIXELS

TEXTURES = ("plain", "gradient", "noise", "stripes", "blotches")
HELD_OUT_TEXTURES = ("checks", "waves")
TILE_COUNTS = (1, 2, 3, 4, 6, 8, 9, 10, 12)
"""Tiles of the grids that an image of an aspect ratio up to 1:4 can get, thumbnail not counted."""
_MIN_SIDE_PIXELS, _MAX_SIDE_PIXELS, _MAX_ASPECT_RATIO = 224, 2000, 4.0


@dataclass(frozen=True)
class Style:
    """The distribution that scenes are drawn from.

    Attributes:
        tile_pixels: Side of a tile. 448, or less to train faster; image sizes scale with it.
        max_tiles: Largest grid, thumbnail not counted.
        min_digit_pixels: Minimum height of digits after tiling.
        min_shape_fraction: Minimum side of a shape, as a fraction of the shorter side of the image.
        max_side_pixels: Maximum longer side of an image, for tiles of 448 pixels.
        max_aspect_ratio: Maximum ratio of longer to shorter side.
        held_out: Use the fonts and textures that are never trained on.
        hard: Prefer hard cases: long numbers, and many shapes of one kind.
    """

    tile_pixels: int = TILE_PIXELS
    max_tiles: int = 12
    min_digit_pixels: float = 40.0
    min_shape_fraction: float = 0.17
    max_side_pixels: int = _MAX_SIDE_PIXELS
    max_aspect_ratio: float = _MAX_ASPECT_RATIO
    held_out: bool = False
    hard: bool = False

    @property
    def tiling(self) -> tiling.Tiling:
        """How the vision worker cuts images of this style."""
        return tiling.Tiling(1, self.max_tiles, True, self.tile_pixels)

    @property
    def tile_patches(self) -> int:
        """Side of a tile, in patches."""
        return self.tile_pixels // PATCH_PIXELS

    @property
    def textures(self) -> tuple[str, ...]:
        """Names of the background textures."""
        return HELD_OUT_TEXTURES if self.held_out else TEXTURES

    @property
    def fonts(self) -> tuple[str, ...]:
        """Paths of the font files."""
        return font_files(self.held_out)


def random_crop(rng: np.random.Generator, tile_pixels: int) -> tuple[int, int, int]:
    """Where in a full tile a smaller one lies: row, column and side in patches.

    Row and column are multiples of four patches, so that the squares that both projectors merge stay whole.
    """
    side = tile_pixels // PATCH_PIXELS
    row, column = (int(4 * v) for v in rng.integers(0, (TILE_PATCHES - side) // 4 + 1, 2))
    return row, column, side


def random_size(rng: np.random.Generator, style: Style, tile_count: int | None) -> tuple[int, int]:
    """Width and height of an image that is cut into `tile_count` tiles, or into any number, each about equally often."""
    while True:
        width, height = _propose_size(rng, style, tile_count or int(rng.choice(TILE_COUNTS)))
        if tile_count is None or math.prod(tiling.select_grid(width, height, style.tiling)) == tile_count:
            return width, height


def _propose_size(rng: np.random.Generator, style: Style, count: int) -> tuple[int, int]:
    scale = style.tile_pixels / TILE_PIXELS
    low, high = _MIN_SIDE_PIXELS * scale, style.max_side_pixels * scale
    if style.max_tiles == 1:
        ratio = style.max_aspect_ratio ** rng.uniform(-1, 1)
    else:
        grids = [
            (i, count // i)
            for i in range(1, count + 1)
            if count % i == 0 and 1 / _MAX_ASPECT_RATIO <= i * i / count <= _MAX_ASPECT_RATIO
        ]
        columns, rows = grids[rng.integers(len(grids))]
        ratio = float(np.clip(columns / rows * math.exp(rng.normal(0, 0.03)), 1 / _MAX_ASPECT_RATIO, _MAX_ASPECT_RATIO))
        if count in (1, 4, 9) and columns == rows:
            ratio, low, high = 1.0, *_square_side_range(count, style.tile_pixels, low, high)
        if count == 1 and rng.random() < 0.5:
            ratio = math.exp(rng.normal(0, 0.02))
    low = min(high, low / min(ratio, 1 / ratio))  # so that the shorter side is not too short
    long = math.exp(rng.uniform(math.log(low), math.log(high)))
    width, height = (long, long / ratio) if ratio >= 1 else (long * ratio, long)
    return max(math.ceil(_MIN_SIDE_PIXELS * scale), round(width)), max(math.ceil(_MIN_SIDE_PIXELS * scale), round(height))


def _square_side_range(count: int, tile_pixels: int, low: float, high: float) -> tuple[float, float]:
    """Range of sides for which a square image is cut into `count` tiles.

    Square grids tie in ratio; the larger one wins when the image has more than half of its pixels.
    """
    bounds = {1: (low, 1.41), 4: (1.42, 2.12), 9: (2.13, high / tile_pixels)}
    first, last = bounds[count]
    return (first if count == 1 else first * tile_pixels), last * tile_pixels
