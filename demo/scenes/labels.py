"""Labels of the patches of each tile: what the vision tower is trained on."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common import tiling
from demo.scenes.scene import COLOURS, PATCH_PIXELS, SHAPES, Box, Scene, position_index, relative_centre
from demo.scenes.style import Style

FIRST_SHAPE, LAST_SHAPE, FIRST_DIGIT = 1, len(SHAPES), len(SHAPES) + 1
"""Values of `PatchLabels.kind`: 0 is background, then the shapes in order, then the digits 0 to 9."""
_COLOUR_INDEX = {name: i + 1 for i, name in enumerate(COLOURS)}
_MIN_VISIBLE = 0.6
"""Fraction of an object that must lie in the tile for its kind to be labelled."""
_MIN_THICKNESS_PATCHES = 0.6
"""Thinner objects are not recognisable in a thumbnail."""


@dataclass(frozen=True)
class TileWindow:
    """The part of a scene that a tile shows.

    Attributes:
        left: Left edge in pixels of the resized image.
        top: Top edge in pixels of the resized image.
        scale_x: Width of the resized image over width of the scene.
        scale_y: Height of the resized image over height of the scene.
        shows_whole_scene: True for the thumbnail, and for the only tile.
    """

    left: float
    top: float
    scale_x: float
    scale_y: float
    shows_whole_scene: bool


def tile_windows(scene: Scene, style: Style) -> list[TileWindow]:
    """Return the windows of the tiles that `vision_worker.preprocessing.tiling.cut` makes of the scene, in order."""
    columns, rows = tiling.select_grid(scene.width, scene.height, style.tiling)
    side = style.tile_pixels
    scale_x, scale_y = columns * side / scene.width, rows * side / scene.height
    single = columns * rows == 1
    windows = [TileWindow(c * side, r * side, scale_x, scale_y, single) for r in range(rows) for c in range(columns)]
    if len(windows) > 1:
        windows.append(TileWindow(0, 0, side / scene.width, side / scene.height, True))
    return windows


@dataclass
class PatchLabels:
    """Labels of one tile's patches, int8 [side, side] each; −1 for unknown.

    Attributes:
        kind: What covers the patch: 0 background, 1–6 a shape, 7–16 a digit.
        colour: 0 background, 1–8 a colour.
        order_in_tile: Index of a digit among the digits of its number that this tile shows.
        digit_index: Index of a digit in its whole number.
        position: Index into `POSITIONS` of the object's centre, in tiles that show the whole scene.
        centre: 1 where the centre of an object is, else 0.
        object_count: Number of objects whose kind is labelled.
    """

    kind: npt.NDArray[np.int8]
    colour: npt.NDArray[np.int8]
    order_in_tile: npt.NDArray[np.int8]
    digit_index: npt.NDArray[np.int8]
    position: npt.NDArray[np.int8]
    centre: npt.NDArray[np.int8]
    object_count: int = 0


def label_patches(scene: Scene, window: TileWindow, side: int) -> PatchLabels:
    """Return the labels of one tile of `side` × `side` patches."""
    zeros, unknown = np.zeros((side, side), np.int8), np.full((side, side), -1, np.int8)
    labels = PatchLabels(zeros, zeros.copy(), unknown, unknown.copy(), unknown.copy(), zeros.copy())
    for shape in scene.shapes:
        kind = FIRST_SHAPE + SHAPES.index(shape.name)
        _add_object(labels, window, scene, _Object(shape.box, kind, shape.colour, inset=0.06))
    for number in scene.all_numbers:
        order = 0
        for index, (digit, box) in enumerate(zip(number.text, number.digits, strict=True)):
            labelled = _Object(box, FIRST_DIGIT + int(digit), number.colour, order, index)
            order += _add_object(labels, window, scene, labelled)
    return labels


@dataclass(frozen=True)
class _Object:
    """A shape or a digit. `inset`: fraction of the box at each side that the shape hardly covers."""

    box: Box
    kind: int
    colour: str
    order_in_tile: int = -1
    digit_index: int = -1
    inset: float = 0.0


def _add_object(labels: PatchLabels, window: TileWindow, scene: Scene, labelled: _Object) -> bool:
    """Write one object into the labels. Return whether enough of it is visible for its kind to be labelled."""
    side, box = labels.kind.shape[0], labelled.box
    left, right = ((box[i] * window.scale_x - window.left) / PATCH_PIXELS for i in (0, 2))
    top, bottom = ((box[i] * window.scale_y - window.top) / PATCH_PIXELS for i in (1, 3))
    width, height = right - left, bottom - top
    visible = max(0.0, min(right, side) - max(left, 0)) * max(0.0, min(bottom, side) - max(top, 0)) / (width * height)
    if visible == 0:
        return False
    known = visible >= _MIN_VISIBLE and min(width, height) >= _MIN_THICKNESS_PATCHES and max(width, height) >= 1
    # patches whose centre lies inside, and the patch with the object's own centre
    dx, dy = labelled.inset * width, labelled.inset * height
    columns = slice(max(0, math.ceil(left + dx - 0.5)), max(0, min(side, math.floor(right - dx - 0.5) + 1)))
    rows = slice(max(0, math.ceil(top + dy - 0.5)), max(0, min(side, math.floor(bottom - dy - 0.5) + 1)))
    patches = [(rows, columns)]
    x, y = (left + right) / 2, (top + bottom) / 2
    if 0 <= x < side and 0 <= y < side:
        patches.append((slice(int(y), int(y) + 1), slice(int(x), int(x) + 1)))
        labels.centre[int(y), int(x)] = 1
    for patch in patches:
        labels.kind[patch] = labelled.kind if known else -1
        labels.colour[patch] = _COLOUR_INDEX[labelled.colour]
        labels.order_in_tile[patch] = labelled.order_in_tile if known else -1
        labels.digit_index[patch] = labelled.digit_index
        if window.shows_whole_scene:
            labels.position[patch] = position_index(*relative_centre(scene, box))
    labels.object_count += known
    return known
