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
from demo.scenes.drawing import draw_scene, encode_image
from demo.scenes.generation import change_one_object, generate_scene
from demo.scenes.labels import tile_windows
from demo.scenes.scene import COLOURS, SHAPES, Scene, Shape
from demo.scenes.style import TILE_COUNTS, Style
from tests.demo.scenes.samples import HELD_OUT, SERVED, SINGLE_TILE, SMALL, STYLES, every_style, object_boxes, sample_scenes
from vision_worker.preprocessing import tiling


def pixels(scene: Scene) -> npt.NDArray[np.int16]:
    return np.asarray(draw_scene(scene)).astype(np.int16)


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1)
    return out.getvalue()


@every_style
def test_equal_seeds_give_equal_scenes_and_pixels(style: Style) -> None:
    first, again = sample_scenes(style, 6), sample_scenes(style, 6)
    assert first == again
    assert len({repr(scene) for scene in first}) == 6
    assert draw_scene(first[0]).tobytes() == draw_scene(again[0]).tobytes()
    image = draw_scene(first[1])
    files = {encode_image(image, np.random.default_rng(seed)) for seed in (1, 1, 2, 3, 4, 5)}
    assert {Image.open(io.BytesIO(file)).format for file in files} == {"PNG", "JPEG"}
    assert len(files) <= 5


@every_style
def test_sizes_are_within_bounds_and_every_tile_count_occurs(style: Style) -> None:
    scale = style.tile_pixels / 448
    scenes = sample_scenes(style, 400)
    for scene in scenes:
        assert math.ceil(224 * scale) <= min(scene.width, scene.height)
        assert max(scene.width, scene.height) <= style.max_side_pixels * scale + 1
        assert 1 / 4.1 < scene.width / scene.height < 4.1
    counts = {math.prod(select_grid(scene.width, scene.height, style.tiling)) for scene in scenes}
    assert counts >= ({1} if style.max_tiles == 1 else set(TILE_COUNTS))


@pytest.mark.parametrize("count", TILE_COUNTS)
def test_tile_count_of_a_scene_can_be_chosen(count: int) -> None:
    for seed in range(5):
        scene = generate_scene(np.random.default_rng(seed), SERVED, count)
        assert math.prod(select_grid(scene.width, scene.height, SERVED.tiling)) == count


@every_style
def test_objects_lie_inside_the_image_and_do_not_overlap(style: Style) -> None:
    for scene in sample_scenes(style, 300):
        for left, top, right, bottom in object_boxes(scene):
            assert 0 <= left < right <= scene.width
            assert 0 <= top < bottom <= scene.height
        for a, b in combinations(object_boxes(scene), 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (a, b)


@every_style
def test_objects_are_drawn_in_their_boxes(style: Style) -> None:
    """Removing an object changes pixels inside its box only, and across most of it."""
    seen = 0
    for scene in sample_scenes(style, 12):
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
def test_shape_has_its_colour_and_differs_from_the_background(name: str, colour: str) -> None:
    shape = Shape(name, colour, (50.0, 60.0, 150.0, 160.0))
    grey = (200, 200, 200) if colour == "black" else (120, 120, 120)
    drawn = pixels(Scene(224, 224, "plain", grey, (shape,)))
    nearest = min(COLOURS, key=lambda other: math.dist(COLOURS[other], drawn[110, 100]))
    assert nearest == colour
    assert (drawn[0, 0] == grey).all()


@every_style
def test_windows_match_the_tiles_of_the_vision_worker(style: Style) -> None:
    """A tile is the resized image, cropped at the window."""
    for scene in sample_scenes(style, 4):
        picture = draw_scene(scene)
        cut = tiling.cut(np.asarray(picture), style.tiling)
        windows = tile_windows(scene, style)
        assert len(windows) == len(cut)
        assert [w.shows_whole_scene for w in windows] == ([True] if len(cut) == 1 else [False] * (len(cut) - 1) + [True])
        for window, tile in zip(windows, cut.pixels, strict=True):
            size = round(window.scale_x * scene.width), round(window.scale_y * scene.height)
            left, top = int(window.left), int(window.top)
            part = picture.resize(size, Image.Resampling.BICUBIC).crop(
                (left, top, left + style.tile_pixels, top + style.tile_pixels)
            )
            assert (np.asarray(part) == tile).all()


@pytest.mark.parametrize(("style", "least"), [(SERVED, 40), (HELD_OUT, 40), (SMALL, 26), (SINGLE_TILE, 26)])
def test_digits_have_the_minimum_height_after_tiling(style: Style, least: int) -> None:
    """Fonts draw whole pixels, so a digit may be one pixel of the image smaller."""
    numbers = [(scene, scene.number) for scene in sample_scenes(style, 300) if scene.number]
    assert len(numbers) > 100
    for scene, number in numbers:
        scale_y = tile_windows(scene, style)[0].scale_y
        assert len(number.digits) == len(number.text)
        for _, top, _, bottom in number.digits:
            assert (bottom - top + 1) * scale_y >= least, (number.text, Path(number.font).name, number.size)


@every_style
def test_digit_boxes_are_ordered_and_inside_the_number(style: Style) -> None:
    for number in (scene.number for scene in sample_scenes(style, 200) if scene.number):
        for left, top, right, bottom in number.digits:
            assert number.box[0] - 1 <= left < right <= number.box[2] + 1
            assert number.box[1] - 1 <= top < bottom <= number.box[3] + 1
        middles = [(left + right) / 2 for left, _, right, _ in number.digits]
        assert middles == sorted(middles)


def family(file: str) -> str:
    return str(ImageFont.truetype(file, 10).getname()[0]).split()[0]


def test_held_out_fonts_and_textures_are_not_in_training() -> None:
    assert not set(SERVED.fonts) & set(HELD_OUT.fonts)
    assert not {family(file) for file in SERVED.fonts} & {family(file) for file in HELD_OUT.fonts}
    assert not set(SERVED.textures) & set(HELD_OUT.textures)
    for style in STYLES.values():
        scenes = sample_scenes(style, 150)
        assert {scene.texture for scene in scenes} == set(style.textures)
        assert {scene.number.font for scene in scenes if scene.number} == set(style.fonts)


@pytest.mark.parametrize("texture", [*SERVED.textures, *HELD_OUT.textures])
def test_textures_are_fainter_than_objects(texture: str) -> None:
    for seed in range(5):
        drawn = pixels(Scene(300, 260, texture, (215, 220, 225), seed=seed))
        assert drawn.shape == (260, 300, 3)
        assert np.quantile(np.abs(drawn - (215, 220, 225)), 0.999) <= 45


@pytest.mark.parametrize("style", [SERVED, HELD_OUT], ids=["served", "held out"])
def test_changed_scene_differs_in_one_object_and_in_pixels(style: Style) -> None:
    kinds: set[str] = set()
    for i, scene in enumerate(sample_scenes(style, 150)):
        other = change_one_object(np.random.default_rng(i), scene, style)
        numbers = scene.number != other.number
        gone = len(scene.shapes) - len(other.shapes)
        different = sum(a != b for a, b in zip(scene.shapes, other.shapes, strict=False))
        if object_boxes(scene):
            assert numbers + (gone == 1 or different) == 1
            assert gone == 1 or numbers or different == 1
            kinds.add("number" if numbers else "gone" if gone else "shape")
        assert (scene.width, scene.height, scene.texture, scene.seed) == (other.width, other.height, other.texture, other.seed)
        if i < 12:
            assert (pixels(scene) != pixels(other)).any()
    assert kinds == {"number", "gone", "shape"}


def test_changed_number_is_inside_the_image_and_does_not_overlap() -> None:
    seen = 0
    for i, scene in enumerate(sample_scenes(SERVED, 400)):
        other = change_one_object(np.random.default_rng(i), scene, SERVED)
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
