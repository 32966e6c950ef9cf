"""Scenes as images, and images as files."""

import io
import math

import numpy as np
from PIL import Image, ImageDraw

from demo.scenes.fonts import load_font
from demo.scenes.scene import COLOURS, Scene, Shape
from demo.scenes.textures import draw_texture


def draw_scene(scene: Scene) -> Image.Image:
    """Return the RGB image. The same scene gives the same pixels every time."""
    rng = np.random.default_rng(scene.seed)
    image = Image.fromarray(draw_texture(rng, scene))
    for shape in scene.shapes:
        _draw_shape(rng, image, shape)
    for number in scene.all_numbers:
        font = load_font(number.font, number.size)
        offset = font.getbbox(number.text)
        top_left = round(number.box[0] - offset[0]), round(number.box[1] - offset[1])
        ImageDraw.Draw(image).text(top_left, number.text, fill=_random_tint(rng, number.colour), font=font)
    return image


def encode_image(image: Image.Image, rng: np.random.Generator) -> bytes:
    """Return a PNG or, as often, a JPEG of quality 80 to 95."""
    out = io.BytesIO()
    if rng.random() < 0.5:
        image.save(out, "PNG", compress_level=1)
    else:
        image.save(out, "JPEG", quality=int(rng.integers(80, 96)))
    return out.getvalue()


def _random_tint(rng: np.random.Generator, colour: str) -> tuple[int, int, int]:
    red, green, blue = (int(v) for v in np.clip(np.array(COLOURS[colour]) + rng.integers(-14, 15, 3), 0, 255))
    return red, green, blue


def _draw_shape(rng: np.random.Generator, image: Image.Image, shape: Shape) -> None:
    left, top, right, _ = shape.box
    size = max(2, round(right - left))
    factor = 4 if size < 160 else 2  # drawn larger, then reduced: Pillow does not antialias polygons
    mask = Image.new("L", (size * factor, size * factor), 0)
    side = size * factor - 1
    pen = ImageDraw.Draw(mask)
    if shape.name == "circle":
        pen.ellipse((0, 0, side, side), fill=255)
    else:
        tilt = rng.uniform(-0.12, 0.12)
        pen.polygon([(side * x, side * y) for x, y in _outline(shape.name, tilt)], fill=255)
    image.paste(_random_tint(rng, shape.colour), (round(left), round(top)), mask.reduce(factor))


def _outline(name: str, tilt: float) -> list[tuple[float, float]]:
    """Corners in the unit square, rotated by `tilt` radians about its centre."""
    points = _CORNERS[name]
    cos, sin = math.cos(tilt), math.sin(tilt)
    return [(0.5 + x * cos - y * sin, 0.5 + x * sin + y * cos) for x, y in points]


def _star_corners() -> list[tuple[float, float]]:
    points: list[tuple[float, float]] = []
    for i in range(10):
        radius, angle = (0.5, 0.22)[i % 2], math.pi * (i / 5 - 0.5)
        points.append((radius * math.cos(angle), radius * math.sin(angle)))
    return points


_A = 0.15  # half the width of a cross's arm
_CORNERS: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.44, -0.44), (0.44, -0.44), (0.44, 0.44), (-0.44, 0.44)],
    "triangle": [(0, -0.46), (0.46, 0.4), (-0.46, 0.4)],
    "star": _star_corners(),
    "cross": [
        (-_A, -0.47), (_A, -0.47), (_A, -_A), (0.47, -_A), (0.47, _A), (_A, _A),
        (_A, 0.47), (-_A, 0.47), (-_A, _A), (-0.47, _A), (-0.47, -_A), (-_A, -_A),
    ],
    "diamond": [(0, -0.49), (0.38, 0), (0, 0.49), (-0.38, 0)],
}  # fmt: skip
