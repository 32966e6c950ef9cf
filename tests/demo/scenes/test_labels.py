import math
from dataclasses import replace

import numpy as np
import pytest

from demo.scenes.labels import TileWindow, label_patches, tile_windows
from demo.scenes.scene import COLOURS, PATCH_PIXELS, POSITIONS, SHAPES, Box, Scene, Shape, position_index
from demo.scenes.style import Style
from tests.demo.scenes.samples import SERVED, every_style, sample_scenes


def in_patches(box: Box, window: TileWindow) -> Box:
    """Box of the image, in patches of a window."""
    left, top, right, bottom = box
    return (
        (left * window.scale_x - window.left) / PATCH_PIXELS, (top * window.scale_y - window.top) / PATCH_PIXELS,
        (right * window.scale_x - window.left) / PATCH_PIXELS, (bottom * window.scale_y - window.top) / PATCH_PIXELS,
    )  # fmt: skip


def visible_share(box: Box, side: int) -> float:
    """Fraction of a box that lies in a window of `side` patches."""
    wide = max(0.0, min(box[2], side) - max(box[0], 0))
    tall = max(0.0, min(box[3], side) - max(box[1], 0))
    return wide * tall / ((box[2] - box[0]) * (box[3] - box[1]))


def labelled_objects(scene: Scene) -> list[tuple[int, str, Box]]:
    """Kind, colour and box of each shape and digit."""
    objects = [(1 + SHAPES.index(shape.name), shape.colour, shape.box) for shape in scene.shapes]
    if scene.number:
        digits = zip(scene.number.text, scene.number.digits, strict=True)
        objects += [(7 + int(digit), scene.number.colour, box) for digit, box in digits]
    return objects


@every_style
def test_patches_of_an_object_have_its_kind_and_colour(style: Style) -> None:
    """Checks the centre patch of objects whose centre touches no other object."""
    side, seen = style.tile_pixels // PATCH_PIXELS, 0
    for scene in sample_scenes(style, 40):
        for window in tile_windows(scene, style):
            labels = label_patches(scene, window, side)
            here = [(kind, colour, in_patches(box, window)) for kind, colour, box in labelled_objects(scene)]
            for kind, colour, box in here:
                others = [other for _, _, other in here if other != box]
                column, row = math.floor((box[0] + box[2]) / 2), math.floor((box[1] + box[3]) / 2)
                if not (0 <= column < side and 0 <= row < side) or any(_touches(other, column, row) for other in others):
                    continue
                known = visible_share(box, side) >= 0.6
                if known and min(box[2] - box[0], box[3] - box[1]) < 1:
                    continue  # too thin: the label is unknown
                assert labels.kind[row, column] == (kind if known else -1)
                assert labels.colour[row, column] == 1 + list(COLOURS).index(colour)
                assert labels.centre[row, column] == 1
                seen += known
    assert seen > 100


def _touches(box: Box, column: int, row: int) -> bool:
    return box[0] < column + 2 and box[2] > column - 1 and box[1] < row + 2 and box[3] > row - 1


@every_style
def test_patches_of_the_background_have_no_label(style: Style) -> None:
    side, seen = style.tile_pixels // PATCH_PIXELS, 0
    for scene in sample_scenes(style, 15):
        for window in tile_windows(scene, style):
            labels = label_patches(scene, window, side)
            clear = np.ones((side, side), bool)
            for _, _, box in labelled_objects(scene):
                left, top, right, bottom = in_patches(box, window)
                rows = slice(max(0, math.floor(top)), max(0, math.ceil(bottom)))
                clear[rows, max(0, math.floor(left)) : max(0, math.ceil(right))] = False
            assert not labels.kind[clear].any()
            assert not labels.colour[clear].any()
            assert not labels.centre[clear].any()
            assert (labels.order_in_tile[clear] == -1).all()
            assert (labels.position[clear] == -1).all()
            seen += int(clear.sum())
    assert seen > 1000


def test_labels_of_a_square_match_a_count_by_hand() -> None:
    """It covers rows 4 to 15 and columns 8 to 19 of 32: a patch is 14 pixels wide."""
    scene = Scene(448, 448, "plain", (220, 220, 220), (Shape("square", "blue", (112.0, 56.0, 280.0, 224.0)),))
    (window,) = tile_windows(scene, SERVED)
    labels = label_patches(scene, window, 32)
    rows, columns = np.nonzero(labels.kind == 1 + SHAPES.index("square"))
    assert 4 <= rows.min() <= 5
    assert 14 <= rows.max() <= 15
    assert 8 <= columns.min() <= 9
    assert 18 <= columns.max() <= 19
    assert len(rows) == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
    assert set(labels.position[rows, columns]) == {1}  # its centre (196, 140) is in the top third, in the middle
    assert np.argwhere(labels.centre).tolist() == [[10, 14]]
    assert labels.object_count == 1


def test_digits_are_numbered_from_the_left_in_each_tile() -> None:
    seen = 0
    for scene in sample_scenes(SERVED, 60):
        for window in tile_windows(scene, SERVED) if scene.number else []:
            digits = [in_patches(box, window) for _, _, box in labelled_objects(replace(scene, shapes=()))]
            if min(right - left for left, _, right, _ in digits) < 1.5:
                continue  # neighbouring digits share patches
            orders = label_patches(scene, window, 32).order_in_tile.max(0)
            visible_orders = [int(order) for order in orders if order >= 0]
            assert visible_orders == sorted(visible_orders)
            assert set(visible_orders) == set(range(sum(visible_share(box, 32) >= 0.6 for box in digits)))
            indices = {int(index) for index in label_patches(scene, window, 32).digit_index.flatten()} - {-1}
            assert indices <= {i for i, box in enumerate(digits) if visible_share(box, 32) > 0}
            assert indices >= {i for i, box in enumerate(digits) if visible_share(box, 32) > 0.6}
            seen += max(visible_orders, default=0) > 0
    assert seen > 20


@pytest.mark.parametrize(
    ("at", "name"),
    [((0.1, 0.1), "top left"), ((0.5, 0.2), "top"), ((0.9, 0.5), "right"), ((0.5, 0.5), "center"), ((1, 1), "bottom right")],
)
def test_positions_are_thirds(at: tuple[float, float], name: str) -> None:
    assert POSITIONS[position_index(*at)] == name
