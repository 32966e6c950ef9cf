"""Random scenes, crowded scenes, and pairs of scenes to compare.

The order in which random numbers are drawn is part of the data: evaluation asks about the same images in every version.
"""

import math
from dataclasses import replace

import numpy as np

from common import tiling
from demo.scenes.fonts import digit_height, load_font
from demo.scenes.scene import COLOURS, SHAPES, TILE_PIXELS, Box, Number, Scene, Shape
from demo.scenes.style import Style, random_crop, random_size


def generate_scene(rng: np.random.Generator, style: Style, tile_count: int | None = None) -> Scene:
    """Return a random scene. Half have many of one shape, for counting; half have every shape at most once.

    Args:
        rng: Source of all randomness.
        style: The distribution.
        tile_count: Tiles that the image is cut into, thumbnail not counted; one of `TILE_COUNTS`, by default any.
    """
    width, height = random_size(rng, style, tile_count)
    background = _random_background(rng)
    texture = str(rng.choice(style.textures))
    colours = _visible_colours(background)
    occupied: list[Box] = []
    has_number = rng.random() < (0.9 if style.hard else 0.65)
    number = _place_number(rng, style, (width, height), colours, occupied) if has_number else None
    shapes = _place_shapes(rng, style, (width, height), colours, occupied)
    seed = int(rng.integers(2**31))
    return Scene(width, height, texture, background, shapes, number, (), seed, random_crop(rng, style.tile_pixels))


def generate_crowded_scene(rng: np.random.Generator, style: Style) -> Scene:
    """Return a one-tile scene with as many shapes and numbers as fit: more to learn from for the same cost."""
    width, height = random_size(rng, style, 1)
    background = _random_background(rng)
    colours, occupied = _visible_colours(background), list[Box]()
    shapes: list[Shape] = []
    numbers: list[Number] = []
    for _ in range(28):
        if rng.random() < 0.6:
            number = _place_number(rng, style, (width, height), colours, occupied, max_fraction=0.32)
            numbers += [number] if number else []
        else:
            size = min(width, height) * math.exp(rng.uniform(math.log(style.min_shape_fraction), math.log(0.4)))
            box = _random_free_box(rng, (width, height), (size, size), occupied, margin=0.01, attempts=8)
            if box:
                occupied.append(_grow(box, 1.0))
                shapes.append(Shape(str(rng.choice(SHAPES)), str(rng.choice(colours)), box))
    texture, crop = str(rng.choice(style.textures)), random_crop(rng, style.tile_pixels)
    return Scene(width, height, texture, background, tuple(shapes), None, tuple(numbers), int(rng.integers(2**31)), crop)


def generate_pair(rng: np.random.Generator, style: Style, tile_count: int) -> tuple[Scene, Scene]:
    """Return two scenes of equal tile count. Half are equal; of the others, half share texture and background."""
    first = generate_scene(rng, style, tile_count)
    if rng.random() < 0.5:
        return first, first
    while True:
        other = generate_scene(rng, style, tile_count)
        if rng.random() < 0.5:
            other = replace(other, background=first.background, texture=first.texture)
        if (other.shapes, other.number) != (first.shapes, first.number):
            return first, other


def generate_near_pair(rng: np.random.Generator, style: Style, tile_count: int) -> tuple[Scene, Scene]:
    """Return two scenes that differ in exactly one object."""
    first = generate_scene(rng, style, tile_count)
    return first, change_one_object(rng, first, style)


def change_one_object(rng: np.random.Generator, scene: Scene, style: Style) -> Scene:
    """Return the scene with one object of another colour, shape or number, or without it. An empty one gets shapes."""
    changes = ["number"] if scene.number else []
    changes += ["colour", "shape", "removal"] if scene.shapes else []
    if not changes:
        size, colours = (scene.width, scene.height), _visible_colours(scene.background)
        return replace(scene, shapes=_place_shapes(rng, style, size, colours, []))
    change = str(rng.choice(changes))
    if change == "number" and scene.number:
        return replace(scene, number=_change_digit(rng, scene.number))
    i = int(rng.integers(len(scene.shapes)))
    shape = scene.shapes[i]
    if change == "removal":
        return replace(scene, shapes=scene.shapes[:i] + scene.shapes[i + 1 :])
    if change == "colour":
        shape = replace(shape, colour=str(rng.choice([c for c in _visible_colours(scene.background) if c != shape.colour])))
    else:
        shape = replace(shape, name=str(rng.choice([s for s in SHAPES if s != shape.name])))
    return replace(scene, shapes=(*scene.shapes[:i], shape, *scene.shapes[i + 1 :]))


def _random_background(rng: np.random.Generator) -> tuple[int, int, int]:
    kind = rng.random()
    if kind < 0.65:  # light
        base = rng.integers(205, 246) + rng.integers(-8, 9, 3)
    elif kind < 0.85:  # grey
        base = rng.integers(120, 170) + rng.integers(-6, 7, 3)
    else:  # dark
        base = rng.integers(40, 70) + rng.integers(-6, 7, 3)
    red, green, blue = (int(v) for v in np.clip(base, 0, 255))
    return red, green, blue


def _visible_colours(background: tuple[int, int, int]) -> list[str]:
    return [name for name, rgb in COLOURS.items() if math.dist(rgb, background) > 110]


def _place_number(
    rng: np.random.Generator,
    style: Style,
    size: tuple[int, int],
    colours: list[str],
    occupied: list[Box],
    max_fraction: float = 0.45,
) -> Number | None:
    """Place a random number, and add its box to `occupied`. Return None where it does not fit.

    `max_fraction`: maximum height of its digits, as a fraction of the height of the image.
    """
    width, height = size
    columns, rows = tiling.select_grid(width, height, style.tiling)
    scale_y, scale_x = rows * style.tile_pixels / height, columns * style.tile_pixels / width
    low = style.min_digit_pixels / scale_y * 1.02
    text = str(_random_integer(rng, style))
    file = str(rng.choice(style.fonts))
    high = min(
        max_fraction * height,
        0.9 * width / (0.75 * len(text)),
        220 * style.tile_pixels / TILE_PIXELS / min(scale_y, scale_x) * 1.6,
    )
    if high <= low:
        return None
    digit = math.exp(rng.uniform(math.log(low), math.log(high)))
    font_size = math.ceil(digit / digit_height(file))
    left, top, right, bottom = load_font(file, font_size).getbbox(text)
    box = _random_free_box(rng, size, (right - left, bottom - top), occupied, margin=0.02)
    if box is None:
        return None
    occupied.append(_grow(box, 0.15 * digit))
    return _lay_out_number(text, str(rng.choice(colours)), file, font_size, (box[0], box[1]))


def _lay_out_number(text: str, colour: str, file: str, size: int, top_left: tuple[float, float]) -> Number:
    """Return the number with the boxes of its digits."""
    font = load_font(file, size)
    left, top, right, bottom = font.getbbox(text)
    x, y = top_left[0] - left, top_left[1] - top
    digits: list[Box] = []
    for i, character in enumerate(text):
        glyph, shift = font.getbbox(character), font.getlength(text[:i])
        digits.append((x + shift + glyph[0], y + glyph[1], x + shift + glyph[2], y + glyph[3]))
    box = (top_left[0], top_left[1], top_left[0] + right - left, top_left[1] + bottom - top)
    return Number(text, colour, file, size, box, tuple(digits))


def _random_integer(rng: np.random.Generator, style: Style) -> int:
    digits = int(rng.choice(4, p=(0.1, 0.2, 0.3, 0.4))) + 1 if style.hard else int(rng.integers(1, 5))
    return int(rng.integers(0 if digits == 1 else 10 ** (digits - 1), 10**digits))


def _change_digit(rng: np.random.Generator, number: Number) -> Number:
    """Return the number with another digit in one place, printed at the same position."""
    i = int(rng.integers(len(number.text)))
    digit = str(rng.choice([d for d in "123456789" if d != number.text[i]]))
    text = number.text[:i] + digit + number.text[i + 1 :]
    return _lay_out_number(text, number.colour, number.font, number.size, (number.box[0], number.box[1]))


def _place_shapes(
    rng: np.random.Generator, style: Style, size: tuple[int, int], colours: list[str], occupied: list[Box]
) -> tuple[Shape, ...]:
    """Place random shapes, and add their boxes to `occupied`. Shapes that do not fit are left out."""
    names, shape_colours, max_fraction = _choose_shapes(rng, style, colours)
    shapes: list[Shape] = []
    side = min(size)
    low, high = math.log(style.min_shape_fraction), math.log(max(max_fraction, 1.4 * style.min_shape_fraction))
    for name, colour in zip(names, shape_colours, strict=False):
        shape_side = side * math.exp(rng.uniform(low, high))
        box = _random_free_box(rng, size, (shape_side, shape_side), occupied, margin=0.01)
        if box is not None:
            occupied.append(_grow(box, 0.04 * side))
            shapes.append(Shape(str(name), str(colour), box))
    return tuple(shapes)


def _choose_shapes(rng: np.random.Generator, style: Style, colours: list[str]) -> tuple[list[str], list[str], float]:
    """Return names, colours, and the maximum side as a fraction of the shorter side of the image."""
    if rng.random() < (0.85 if style.hard else 0.5):  # for counting: many of one shape, a few others
        counted, count = str(rng.choice(SHAPES)), int(rng.integers(1, 7))
        others = (str(shape) for shape in rng.choice(SHAPES, int(rng.integers(0, 3))))
        names = [counted] * count + [shape for shape in others if shape != counted]
        return names, list(rng.choice(colours, len(names))), 0.3 if len(names) < 4 else 0.22
    count = int(rng.integers(1, 5))
    names = [str(shape) for shape in rng.permutation(SHAPES)[:count]]
    return names, list(rng.permutation(colours)[:count]), 0.4 if count < 3 else 0.3


def _random_free_box(
    rng: np.random.Generator,
    image_size: tuple[int, int],
    box_size: tuple[float, float],
    occupied: list[Box],
    margin: float,
    attempts: int = 24,
) -> Box | None:
    """Return a box that touches no occupied one, or None. `margin`: fraction of the shorter side left free at edges."""
    (width, height), (box_width, box_height) = image_size, box_size
    edge = margin * min(width, height)
    if box_width + 2 * edge >= width or box_height + 2 * edge >= height:
        return None
    for _ in range(attempts):
        left, top = float(rng.uniform(edge, width - box_width - edge)), float(rng.uniform(edge, height - box_height - edge))
        box = (left, top, left + box_width, top + box_height)
        if not any(box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in occupied):
            return box
    return None


def _grow(box: Box, margin: float) -> Box:
    return box[0] - margin, box[1] - margin, box[2] + margin, box[3] + margin
