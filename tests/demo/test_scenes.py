import io
import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageFont

from common.tiling import select_grid
from demo import scenes
from demo.scenes import COLOURS, PATCH, SHAPES, Box, Scene, Style, Tile
from vision_worker.preprocessing import tiling

SERVED, SMALL, UNSEEN = Style(), Style(tile=224, smallest_digit=26), Style(held_out=True)
SINGLE = Style(tile=224, max_tiles=1, smallest_digit=26, largest=800)
STYLES = {"served": SERVED, "small": SMALL, "single": SINGLE, "held out": UNSEEN}

every_style = pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)


def some(style: Style, count: int, first: int = 0) -> list[Scene]:
    return [scenes.scene(np.random.default_rng([7, first + i]), style) for i in range(count)]


def boxes(scene: Scene) -> list[Box]:
    return [shape.box for shape in scene.shapes] + ([scene.number.box] if scene.number else [])


def pixels(scene: Scene) -> npt.NDArray[np.int16]:
    return np.asarray(scenes.draw(scene)).astype(np.int16)


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1)
    return out.getvalue()


@every_style
def test_a_seed_is_a_scene_and_a_picture(style: Style) -> None:
    first, again = some(style, 6), some(style, 6)
    assert first == again
    assert len({repr(scene) for scene in first}) == 6
    assert scenes.draw(first[0]).tobytes() == scenes.draw(again[0]).tobytes()
    image = scenes.draw(first[1])
    files = {scenes.encoded(image, np.random.default_rng(seed)) for seed in (1, 1, 2, 3, 4, 5)}
    assert {Image.open(io.BytesIO(file)).format for file in files} == {"PNG", "JPEG"}
    assert len(files) <= 5


@every_style
def test_sizes_are_within_bounds_and_every_number_of_tiles_occurs(style: Style) -> None:
    scale = style.tile / 448
    found = some(style, 400)
    for scene in found:
        assert math.ceil(224 * scale) <= min(scene.width, scene.height)
        assert max(scene.width, scene.height) <= style.largest * scale + 1
        assert 1 / 4.1 < scene.width / scene.height < 4.1
    counts = {math.prod(select_grid(scene.width, scene.height, style.tiling)) for scene in found}
    assert counts >= ({1} if style.max_tiles == 1 else set(scenes.TILES))


@pytest.mark.parametrize("count", scenes.TILES)
def test_a_scene_may_be_asked_for_by_its_number_of_tiles(count: int) -> None:
    for seed in range(5):
        scene = scenes.scene(np.random.default_rng(seed), SERVED, count)
        assert math.prod(select_grid(scene.width, scene.height, SERVED.tiling)) == count


@every_style
def test_everything_is_inside_the_picture_and_nothing_overlaps(style: Style) -> None:
    for scene in some(style, 300):
        for left, top, right, bottom in boxes(scene):
            assert 0 <= left < right <= scene.width
            assert 0 <= top < bottom <= scene.height
        for a, b in combinations(boxes(scene), 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (a, b)


@every_style
def test_what_is_drawn_is_where_the_scene_says(style: Style) -> None:
    """The picture without its last shape, and that without its number, differ only in what was taken away."""
    seen = 0
    for scene in some(style, 12):
        bare = replace(scene, number=None)
        taken = [(scene, bare, scene.number.box)] if scene.number else []
        taken += [(bare, replace(bare, shapes=bare.shapes[:-1]), bare.shapes[-1].box)] if bare.shapes else []
        for full, less, (left, top, right, bottom) in taken:
            rows, columns = np.nonzero(np.abs(pixels(full) - pixels(less)).max(-1))
            assert left - 1.5 <= columns.min() < columns.max() <= right + 0.5
            assert top - 1.5 <= rows.min() < rows.max() <= bottom + 0.5
            assert columns.max() - columns.min() > 0.6 * (right - left)
            assert rows.max() - rows.min() > 0.6 * (bottom - top)
            seen += 1
    assert seen > 12


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("colour", COLOURS)
def test_a_shape_has_its_colour_and_stands_out(name: str, colour: str) -> None:
    shape = scenes.Shape(name, colour, (50.0, 60.0, 150.0, 160.0))
    grey = (200, 200, 200) if colour == "black" else (120, 120, 120)
    drawn = pixels(Scene(224, 224, "plain", grey, (shape,)))
    nearest = min(COLOURS, key=lambda other: math.dist(COLOURS[other], drawn[110, 100]))
    assert nearest == colour
    assert (drawn[0, 0] == grey).all()


@every_style
def test_windows_are_the_tiles_that_the_vision_worker_cuts(style: Style) -> None:
    """Each tile is the picture, stretched as its window says, from the window's corner."""
    for scene in some(style, 4):
        picture = scenes.draw(scene)
        cut = tiling.cut(png(picture), style.tiling)
        windows = scenes.windows(scene, style)
        assert len(windows) == len(cut)
        assert [w.whole for w in windows] == ([True] if len(cut) == 1 else [False] * (len(cut) - 1) + [True])
        for window, tile in zip(windows, cut.pixels, strict=True):
            size = round(window.wide * scene.width), round(window.tall * scene.height)
            left, top = int(window.left), int(window.top)
            part = picture.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + style.tile, top + style.tile))
            assert (np.asarray(part) == tile).all()


@pytest.mark.parametrize(("style", "least"), [(SERVED, 40), (UNSEEN, 40), (SMALL, 26), (SINGLE, 26)])
def test_digits_are_tall_enough_after_tiling(style: Style, least: int) -> None:
    """But for what a font gives away by drawing whole pixels: one of the picture's own."""
    numbers = [(scene, scene.number) for scene in some(style, 300) if scene.number]
    assert len(numbers) > 100
    for scene, number in numbers:
        tall = scenes.windows(scene, style)[0].tall
        assert len(number.digits) == len(number.text)
        for _, top, _, bottom in number.digits:
            assert (bottom - top + 1) * tall >= least, (number.text, Path(number.font).name, number.size)


@every_style
def test_digits_stand_in_order_within_their_number(style: Style) -> None:
    for number in (scene.number for scene in some(style, 200) if scene.number):
        for left, top, right, bottom in number.digits:
            assert number.box[0] - 1 <= left < right <= number.box[2] + 1
            assert number.box[1] - 1 <= top < bottom <= number.box[3] + 1
        middles = [(left + right) / 2 for left, _, right, _ in number.digits]
        assert middles == sorted(middles)


def family(file: str) -> str:
    return str(ImageFont.truetype(file, 10).getname()[0]).split()[0]


def test_what_is_held_out_is_never_trained_on() -> None:
    assert not set(SERVED.fonts) & set(UNSEEN.fonts)
    assert not {family(file) for file in SERVED.fonts} & {family(file) for file in UNSEEN.fonts}
    assert not set(SERVED.textures) & set(UNSEEN.textures)
    for style in STYLES.values():
        found = some(style, 150)
        assert {scene.texture for scene in found} == set(style.textures)
        assert {scene.number.font for scene in found if scene.number} == set(style.fonts)


@pytest.mark.parametrize("texture", [*SERVED.textures, *UNSEEN.textures])
def test_a_texture_is_fainter_than_any_colour_on_it(texture: str) -> None:
    for seed in range(5):
        drawn = pixels(Scene(300, 260, texture, (215, 220, 225), seed=seed))
        assert drawn.shape == (260, 300, 3)
        assert np.quantile(np.abs(drawn - (215, 220, 225)), 0.999) <= 45


@pytest.mark.parametrize("style", [SERVED, UNSEEN], ids=["served", "held out"])
def test_a_changed_scene_differs_in_one_thing_and_is_drawn_otherwise(style: Style) -> None:
    kinds: set[str] = set()
    for i, scene in enumerate(some(style, 150)):
        other = scenes.changed(np.random.default_rng(i), scene, style)
        numbers = scene.number != other.number
        gone = len(scene.shapes) - len(other.shapes)
        different = sum(a != b for a, b in zip(scene.shapes, other.shapes, strict=False))
        if boxes(scene):
            assert numbers + (gone == 1 or different) == 1
            assert gone == 1 or numbers or different == 1
            kinds.add("number" if numbers else "gone" if gone else "shape")
        assert (scene.width, scene.height, scene.texture, scene.seed) == (other.width, other.height, other.texture, other.seed)
        if i < 12:
            assert (pixels(scene) != pixels(other)).any()
    assert kinds == {"number", "gone", "shape"}


def test_a_changed_number_is_inside_the_picture_and_touches_nothing() -> None:
    seen = 0
    for i, scene in enumerate(some(SERVED, 400)):
        other = scenes.changed(np.random.default_rng(i), scene, SERVED)
        if other.number is None or other.number == scene.number:
            continue
        seen += 1
        assert len(other.number.text) == len(scene.number.text if scene.number else "")
        left, top, right, bottom = other.number.box
        assert left >= 0
        assert top >= 0
        assert right <= scene.width
        assert bottom <= scene.height
        for box in (shape.box for shape in other.shapes):
            assert right <= box[0] or box[2] <= left or bottom <= box[1] or box[3] <= top
    assert seen > 30


# Labels


def inside(box: Box, window: Tile) -> Box:
    """A box of the picture in patches of a window."""
    left, top, right, bottom = box
    return (
        (left * window.wide - window.left) / PATCH, (top * window.tall - window.top) / PATCH,
        (right * window.wide - window.left) / PATCH, (bottom * window.tall - window.top) / PATCH,
    )  # fmt: skip


def shown(box: Box, side: int) -> float:
    """The share of a box that is within a window of so many patches."""
    wide = max(0.0, min(box[2], side) - max(box[0], 0))
    tall = max(0.0, min(box[3], side) - max(box[1], 0))
    return wide * tall / ((box[2] - box[0]) * (box[3] - box[1]))


def things(scene: Scene) -> list[tuple[int, str, Box]]:
    """Kind as labels count them, colour and box of all that can be told."""
    found = [(1 + SHAPES.index(shape.name), shape.colour, shape.box) for shape in scene.shapes]
    if scene.number:
        digits = zip(scene.number.text, scene.number.digits, strict=True)
        found += [(7 + int(digit), scene.number.colour, box) for digit, box in digits]
    return found


@every_style
def test_patches_of_a_thing_carry_its_kind_and_colour(style: Style) -> None:
    """What is well within one thing, and within no other."""
    side, seen = style.tile // PATCH, 0
    for scene in some(style, 40):
        for window in scenes.windows(scene, style):
            labels = scenes.labels(scene, window, side)
            here = [(kind, colour, inside(box, window)) for kind, colour, box in things(scene)]
            for kind, colour, box in here:
                others = [other for _, _, other in here if other != box]
                column, row = math.floor((box[0] + box[2]) / 2), math.floor((box[1] + box[3]) / 2)
                if not (0 <= column < side and 0 <= row < side) or any(_touches(other, column, row) for other in others):
                    continue
                known = shown(box, side) >= 0.6
                if known and min(box[2] - box[0], box[3] - box[1]) < 1:
                    continue  # too thin to be sure of
                assert labels.kind[row, column] == (kind if known else -1)
                assert labels.colour[row, column] == 1 + list(COLOURS).index(colour)
                assert labels.middle[row, column] == 1
                seen += known
    assert seen > 100


def _touches(box: Box, column: int, row: int) -> bool:
    return box[0] < column + 2 and box[2] > column - 1 and box[1] < row + 2 and box[3] > row - 1


@every_style
def test_patches_of_the_background_carry_nothing(style: Style) -> None:
    side, seen = style.tile // PATCH, 0
    for scene in some(style, 15):
        for window in scenes.windows(scene, style):
            labels = scenes.labels(scene, window, side)
            clear = np.ones((side, side), bool)
            for _, _, box in things(scene):
                left, top, right, bottom = inside(box, window)
                rows = slice(max(0, math.floor(top)), max(0, math.ceil(bottom)))
                clear[rows, max(0, math.floor(left)) : max(0, math.ceil(right))] = False
            assert not labels.kind[clear].any()
            assert not labels.colour[clear].any()
            assert not labels.middle[clear].any()
            assert (labels.order[clear] == -1).all()
            assert (labels.placement[clear] == -1).all()
            seen += int(clear.sum())
    assert seen > 1000


def test_a_square_covers_the_patches_within_it() -> None:
    """Rows 4 to 15 and columns 8 to 19 of 32, by counting: a patch is 14 pixels wide."""
    scene = Scene(448, 448, "plain", (220, 220, 220), (scenes.Shape("square", "blue", (112.0, 56.0, 280.0, 224.0)),))
    (window,) = scenes.windows(scene, SERVED)
    labels = scenes.labels(scene, window, 32)
    rows, columns = np.nonzero(labels.kind == 1 + SHAPES.index("square"))
    assert 4 <= rows.min() <= 5
    assert 14 <= rows.max() <= 15
    assert 8 <= columns.min() <= 9
    assert 18 <= columns.max() <= 19
    assert len(rows) == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
    assert set(labels.placement[rows, columns]) == {1}  # its middle at (196, 140): the top row's middle third
    assert np.argwhere(labels.middle).tolist() == [[10, 14]]
    assert labels.things == 1


def test_digits_are_numbered_from_the_left_in_each_tile() -> None:
    seen = 0
    for scene in some(SERVED, 60):
        for window in scenes.windows(scene, SERVED) if scene.number else []:
            digits = [inside(box, window) for _, _, box in things(replace(scene, shapes=()))]
            if min(right - left for left, _, right, _ in digits) < 1.5:
                continue  # one digit's patches are the next one's too
            orders = scenes.labels(scene, window, 32).order.max(0)
            found = [int(order) for order in orders if order >= 0]
            assert found == sorted(found)
            assert set(found) == set(range(sum(shown(box, 32) >= 0.6 for box in digits)))
            turns = {int(turn) for turn in scenes.labels(scene, window, 32).turn.flatten()} - {-1}
            assert turns <= {i for i, box in enumerate(digits) if shown(box, 32) > 0}
            assert turns >= {i for i, box in enumerate(digits) if shown(box, 32) > 0.6}
            seen += max(found, default=0) > 0
    assert seen > 20


@pytest.mark.parametrize(
    ("at", "name"),
    [((0.1, 0.1), "top left"), ((0.5, 0.2), "top"), ((0.9, 0.5), "right"), ((0.5, 0.5), "center"), ((1, 1), "bottom right")],
)
def test_places_are_thirds(at: tuple[float, float], name: str) -> None:
    assert scenes.PLACES[scenes.placement(*at)] == name
