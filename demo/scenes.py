"""Pictures of shapes and a number on a plain or lightly textured background, and what is known of each.

Everything is drawn here, with free fonts that come as Python packages; no photograph and no other data set is used.
Faces and textures of the "held out" sets are never trained on.
"""

import functools
import importlib.util
import io
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from common import tiling

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
COLOURS = {
    "red": (215, 35, 35),
    "green": (35, 155, 60),
    "blue": (40, 80, 215),
    "yellow": (245, 215, 40),
    "orange": (245, 135, 25),
    "purple": (135, 50, 165),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
}
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
TEXTURES = ("plain", "gradient", "noise", "stripes", "blotches")
HELD_OUT_TEXTURES = ("checks", "waves")
TILES = (1, 2, 3, 4, 6, 8, 9, 10, 12)  # of grids that a picture up to 1:4 can get
FULL, PATCH = 448, 14  # side of a tile and of its patches, in pixels
GRID = FULL // PATCH  # a tile's side in patches
SMALLEST, LARGEST, LONGEST = 224, 2000, 4.0  # side in pixels, and ratio of sides

_FONTS = {
    "matplotlib": (
        "mpl-data/fonts/ttf",
        ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono", "cmr10", "cmb10", "cmss10"),
    ),
    "font_roboto": (
        "files",
        ("Roboto-Regular", "Roboto-Bold", "Roboto-Medium", "Roboto-Italic", "Roboto-Light", "Roboto-Black"),
    ),
    "font_source_sans_pro": (
        "files",
        ("SourceSansPro-Regular", "SourceSansPro-Bold", "SourceSansPro-Semibold", "SourceSansPro-It"),
    ),
    "font_source_serif_pro": ("files", ("SourceSerifPro-Regular", "SourceSerifPro-Bold", "SourceSerifPro-Semibold")),
    "font_caladea": ("files", ("Caladea-Regular", "Caladea-Bold", "Caladea-Italic")),
}
_HELD_OUT_FONTS = {
    "font_hanken_grotesk": ("files", ("HankenGrotesk-Regular", "HankenGrotesk-Bold")),
    "matplotlib": ("mpl-data/fonts/ttf", ("STIXGeneral", "STIXGeneralBol")),
}

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the picture."""


@dataclass(frozen=True)
class Shape:
    name: str
    colour: str
    box: Box


@dataclass(frozen=True)
class Number:
    text: str
    colour: str
    font: str
    size: int  # of the font, in pixels
    box: Box
    digits: tuple[Box, ...]


@dataclass(frozen=True)
class Scene:
    width: int
    height: int
    texture: str
    background: tuple[int, int, int]
    shapes: tuple[Shape, ...] = ()
    number: Number | None = None
    others: tuple[Number, ...] = ()
    """More numbers: in crowds only, of which nothing is asked."""
    seed: int = 0
    """Of everything that is drawn and not named above: the texture's grain, a shape's tint and tilt."""
    piece: tuple[int, int, int] = (0, 0, GRID)
    """First row and column, and side, in patches of a full tile: pictures to train on are cut into pieces of tiles."""

    @property
    def numbers(self) -> tuple[Number, ...]:
        return (*([self.number] if self.number else []), *self.others)


@dataclass(frozen=True)
class Style:
    """What scenes are drawn from. `tile` in pixels: 448, or less to train faster; all sizes go with it."""

    tile: int = 448
    max_tiles: int = 12
    smallest_digit: float = 40.0
    """Height of a number's digits after tiling, in pixels, at the least."""
    smallest_shape: float = 0.17
    """Side of a shape as a share of the picture's shorter side, at the least."""
    largest: int = LARGEST
    """Longest side of a picture, in pixels, for tiles of 448."""
    longest: float = LONGEST
    """Ratio of a picture's sides, at the most."""
    held_out: bool = False
    drill: bool = False
    """Rather what is learned last: long numbers, and many of one shape."""

    @property
    def tiling(self) -> tiling.Tiling:
        return tiling.Tiling(1, self.max_tiles, True, self.tile)

    @property
    def textures(self) -> tuple[str, ...]:
        return HELD_OUT_TEXTURES if self.held_out else TEXTURES

    @property
    def fonts(self) -> tuple[str, ...]:
        return _files(self.held_out)


@functools.cache
def _files(held_out: bool) -> tuple[str, ...]:
    found: list[str] = []
    for package, (folder, names) in (_HELD_OUT_FONTS if held_out else _FONTS).items():
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(f"the package {package} is missing, with fonts to draw: pip install -e '.[demo]'")
        for name in names:
            found.append(str(_file(Path(spec.submodule_search_locations[0]) / folder, name)))
    return tuple(found)


def _file(folder: Path, name: str) -> Path:
    for suffix in (".ttf", ".otf"):
        if (folder / (name + suffix)).exists():
            return folder / (name + suffix)
    raise FileNotFoundError(f"no font {name} in {folder}")


@functools.lru_cache(maxsize=512)
def _font(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def _digit_height(file: str) -> float:
    """Height of a zero, in ems."""
    box = _font(file, 200).getbbox("0")
    return (box[3] - box[1]) / 200


# What stands where


def scene(rng: np.random.Generator, style: Style = Style(), tiles: int | None = None) -> Scene:
    """One scene. Half are about counting (many of one shape), half have every shape at most once.

    `tiles`: how many tiles it is to be cut into, thumbnail not counted; one of TILES.
    """
    width, height = _size(rng, style, tiles)
    background = _background(rng)
    texture = str(rng.choice(style.textures))
    colours = _visible(background)
    taken: list[Box] = []
    number = _place_number(rng, style, width, height, colours, taken) if rng.random() < (0.9 if style.drill else 0.65) else None
    shapes = _place_shapes(rng, style, width, height, colours, taken)
    return Scene(width, height, texture, background, shapes, number, (), int(rng.integers(2**31)), corner(rng, style.tile))


def crowd(rng: np.random.Generator, style: Style) -> Scene:
    """As many shapes and numbers as find room: for a tower to learn from, since an image costs the same whatever is on it."""
    width, height = _size(rng, style, 1)
    background = _background(rng)
    colours, taken = _visible(background), list[Box]()
    shapes: list[Shape] = []
    numbers: list[Number] = []
    for _ in range(28):
        if rng.random() < 0.6:
            number = _place_number(rng, style, width, height, colours, taken, most=0.32)
            numbers += [number] if number else []
        else:
            size = min(width, height) * math.exp(rng.uniform(math.log(style.smallest_shape), math.log(0.4)))
            box = _free(rng, width, height, size, size, taken, margin=0.01, tries=8)
            if box:
                taken.append(_grown(box, 1.0))
                shapes.append(Shape(str(rng.choice(SHAPES)), str(rng.choice(colours)), box))
    texture, piece = str(rng.choice(style.textures)), corner(rng, style.tile)
    return Scene(width, height, texture, background, tuple(shapes), None, tuple(numbers), int(rng.integers(2**31)), piece)


def corner(rng: np.random.Generator, tile: int) -> tuple[int, int, int]:
    """Where in a full tile a smaller one is: its row, column and side in patches. Both projectors' squares stay whole."""
    side = tile // PATCH
    row, column = (int(4 * v) for v in rng.integers(0, (GRID - side) // 4 + 1, 2))
    return row, column, side


def _size(rng: np.random.Generator, style: Style, tiles: int | None) -> tuple[int, int]:
    """Sizes for which every number of tiles occurs about equally often."""
    while True:
        width, height = _drawn_size(rng, style, tiles or int(rng.choice(TILES)))
        if tiles is None or math.prod(tiling.select_grid(width, height, style.tiling)) == tiles:
            return width, height


def _drawn_size(rng: np.random.Generator, style: Style, count: int) -> tuple[int, int]:
    scale = style.tile / FULL
    least, most = SMALLEST * scale, style.largest * scale
    if style.max_tiles == 1:
        ratio = style.longest ** rng.uniform(-1, 1)
    else:
        grids = [(i, count // i) for i in range(1, count + 1) if count % i == 0 and 1 / LONGEST <= i * i / count <= LONGEST]
        columns, rows = grids[rng.integers(len(grids))]
        ratio = float(np.clip(columns / rows * math.exp(rng.normal(0, 0.03)), 1 / LONGEST, LONGEST))
        if count in (1, 4, 9) and columns == rows:
            ratio, least, most = 1.0, *_square_sides(count, style.tile, least, most)
        if count == 1 and rng.random() < 0.5:
            ratio = math.exp(rng.normal(0, 0.02))
    least = min(most, least / min(ratio, 1 / ratio))  # so that the short side is not too short
    long = math.exp(rng.uniform(math.log(least), math.log(most)))
    width, height = (long, long / ratio) if ratio >= 1 else (long * ratio, long)
    return max(math.ceil(SMALLEST * scale), round(width)), max(math.ceil(SMALLEST * scale), round(height))


def _square_sides(count: int, tile: int, least: float, most: float) -> tuple[float, float]:
    """Sides of a square picture that is cut into `count` tiles: above half of a grid's pixels the grid is taken."""
    bounds = {1: (least, 1.41), 4: (1.42, 2.12), 9: (2.13, most / tile)}
    low, high = bounds[count]
    return (low if count == 1 else low * tile), high * tile


def _background(rng: np.random.Generator) -> tuple[int, int, int]:
    kind = rng.random()
    if kind < 0.65:  # light
        base = rng.integers(205, 246) + rng.integers(-8, 9, 3)
    elif kind < 0.85:  # grey
        base = rng.integers(120, 170) + rng.integers(-6, 7, 3)
    else:  # dark
        base = rng.integers(40, 70) + rng.integers(-6, 7, 3)
    red, green, blue = (int(v) for v in np.clip(base, 0, 255))
    return red, green, blue


def _visible(background: tuple[int, int, int]) -> list[str]:
    """Colours that stand out."""
    return [name for name, rgb in COLOURS.items() if math.dist(rgb, background) > 110]


def _place_number(
    rng: np.random.Generator, style: Style, width: int, height: int, colours: list[str], taken: list[Box], most: float = 0.45
) -> Number | None:
    """`most`: height of its digits, as a share of the picture's."""
    columns, rows = tiling.select_grid(width, height, style.tiling)
    tall, wide = rows * style.tile / height, columns * style.tile / width  # what tiling stretches by
    least = style.smallest_digit / tall * 1.02
    text = str(_integer(rng, style))
    file = str(rng.choice(style.fonts))
    most = min(most * height, 0.9 * width / (0.75 * len(text)), 220 * style.tile / FULL / min(tall, wide) * 1.6)
    if most <= least:
        return None
    digit = math.exp(rng.uniform(math.log(least), math.log(most)))
    size = math.ceil(digit / _digit_height(file))
    font = _font(file, size)
    left, top, right, bottom = font.getbbox(text)
    free = _free(rng, width, height, right - left, bottom - top, taken, margin=0.02)
    if free is None:
        return None
    taken.append(_grown(free, 0.15 * digit))
    return _number(text, str(rng.choice(colours)), file, size, (free[0], free[1]))


def _number(text: str, colour: str, file: str, size: int, at: tuple[float, float]) -> Number:
    font = _font(file, size)
    left, top, right, bottom = font.getbbox(text)
    x, y = at[0] - left, at[1] - top
    digits: list[Box] = []
    for i, character in enumerate(text):
        glyph, shift = font.getbbox(character), font.getlength(text[:i])
        digits.append((x + shift + glyph[0], y + glyph[1], x + shift + glyph[2], y + glyph[3]))
    return Number(text, colour, file, size, (at[0], at[1], at[0] + right - left, at[1] + bottom - top), tuple(digits))


def _integer(rng: np.random.Generator, style: Style) -> int:
    digits = int(rng.choice(4, p=(0.1, 0.2, 0.3, 0.4))) + 1 if style.drill else int(rng.integers(1, 5))
    return int(rng.integers(0 if digits == 1 else 10 ** (digits - 1), 10**digits))


def _place_shapes(
    rng: np.random.Generator, style: Style, width: int, height: int, colours: list[str], taken: list[Box]
) -> tuple[Shape, ...]:
    if rng.random() < (0.85 if style.drill else 0.5):  # for counting: many of one shape, a few others
        main, many = str(rng.choice(SHAPES)), int(rng.integers(1, 7))
        others = (str(shape) for shape in rng.choice(SHAPES, int(rng.integers(0, 3))))
        names = [main] * many + [shape for shape in others if shape != main]
        kinds = list(rng.choice(colours, len(names)))
        largest = 0.3 if len(names) < 4 else 0.22
    else:
        count = int(rng.integers(1, 5))
        names = [str(s) for s in rng.permutation(SHAPES)[:count]]
        kinds = list(rng.permutation(colours)[:count])
        largest = 0.4 if count < 3 else 0.3
    shapes: list[Shape] = []
    side = min(width, height)
    for name, colour in zip(names, kinds, strict=False):
        size = side * math.exp(rng.uniform(math.log(style.smallest_shape), math.log(max(largest, 1.4 * style.smallest_shape))))
        box = _free(rng, width, height, size, size, taken, margin=0.01)
        if box is not None:
            taken.append(_grown(box, 0.04 * side))
            shapes.append(Shape(str(name), str(colour), box))
    return tuple(shapes)


def _free(
    rng: np.random.Generator,
    width: int,
    height: int,
    wide: float,
    tall: float,
    taken: list[Box],
    margin: float,
    tries: int = 24,
) -> Box | None:
    edge = margin * min(width, height)
    if wide + 2 * edge >= width or tall + 2 * edge >= height:
        return None
    for _ in range(tries):
        left, top = float(rng.uniform(edge, width - wide - edge)), float(rng.uniform(edge, height - tall - edge))
        box = (left, top, left + wide, top + tall)
        if not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken):
            return box
    return None


def _grown(box: Box, by: float) -> Box:
    return box[0] - by, box[1] - by, box[2] + by, box[3] + by


def changed(rng: np.random.Generator, scene: Scene, style: Style) -> Scene:
    """The scene with one thing of another colour, another shape, another number, or gone."""
    kinds = ["number"] if scene.number else []
    kinds += ["colour", "shape", "gone"] if scene.shapes else []
    if not kinds:
        return replace(scene, shapes=_place_shapes(rng, style, scene.width, scene.height, _visible(scene.background), []))
    kind = str(rng.choice(kinds))
    if kind == "number" and scene.number:
        return replace(scene, number=_renumbered(rng, scene.number))
    i = int(rng.integers(len(scene.shapes)))
    shape = scene.shapes[i]
    if kind == "gone":
        return replace(scene, shapes=scene.shapes[:i] + scene.shapes[i + 1 :])
    if kind == "colour":
        shape = replace(shape, colour=str(rng.choice([c for c in _visible(scene.background) if c != shape.colour])))
    else:
        shape = replace(shape, name=str(rng.choice([s for s in SHAPES if s != shape.name])))
    return replace(scene, shapes=(*scene.shapes[:i], shape, *scene.shapes[i + 1 :]))


def pair(rng: np.random.Generator, style: Style, tiles: int) -> tuple[Scene, Scene]:
    """Two scenes of as many tiles: half are equal, half are of other things, half of these on the same background."""
    first = scene(rng, style, tiles)
    if rng.random() < 0.5:
        return first, first
    while True:
        other = scene(rng, style, tiles)
        if rng.random() < 0.5:
            other = replace(other, background=first.background, texture=first.texture)
        if (other.shapes, other.number) != (first.shapes, first.number):
            return first, other


def near_pair(rng: np.random.Generator, style: Style, tiles: int) -> tuple[Scene, Scene]:
    """Two scenes that differ in one thing."""
    first = scene(rng, style, tiles)
    return first, changed(rng, first, style)


def _renumbered(rng: np.random.Generator, number: Number) -> Number:
    """Another number of as many digits at the same place."""
    i = int(rng.integers(len(number.text)))
    other = str(rng.choice([d for d in "123456789" if d != number.text[i]]))
    text = number.text[:i] + other + number.text[i + 1 :]
    return _number(text, number.colour, number.font, number.size, (number.box[0], number.box[1]))


# Drawing


def draw(scene: Scene) -> Image.Image:
    """The picture, RGB. The same scene is drawn the same every time."""
    rng = np.random.default_rng(scene.seed)
    image = Image.fromarray(_TEXTURE[scene.texture](rng, scene))
    for shape in scene.shapes:
        _draw_shape(rng, image, shape)
    for number in scene.numbers:
        font = _font(number.font, number.size)
        offset = font.getbbox(number.text)
        at = round(number.box[0] - offset[0]), round(number.box[1] - offset[1])
        ImageDraw.Draw(image).text(at, number.text, fill=_tint(rng, number.colour), font=font)
    return image


def _tint(rng: np.random.Generator, colour: str) -> tuple[int, int, int]:
    red, green, blue = (int(v) for v in np.clip(np.array(COLOURS[colour]) + rng.integers(-14, 15, 3), 0, 255))
    return red, green, blue


def _draw_shape(rng: np.random.Generator, image: Image.Image, shape: Shape) -> None:
    left, top, right, _ = shape.box
    size = max(2, round(right - left))
    fine = 4 if size < 160 else 2  # drawn larger and shrunk: Pillow's polygons have hard edges
    mask = Image.new("L", (size * fine, size * fine), 0)
    side = size * fine - 1
    pen = ImageDraw.Draw(mask)
    if shape.name == "circle":
        pen.ellipse((0, 0, side, side), fill=255)
    else:
        tilt = rng.uniform(-0.12, 0.12)
        pen.polygon([(side * x, side * y) for x, y in _outline(shape.name, tilt)], fill=255)
    image.paste(_tint(rng, shape.colour), (round(left), round(top)), mask.reduce(fine))


def _outline(name: str, tilt: float) -> list[tuple[float, float]]:
    """Corners in a square of side 1, turned by `tilt` radians about its middle."""
    points = _CORNERS[name]
    cos, sin = math.cos(tilt), math.sin(tilt)
    return [(0.5 + x * cos - y * sin, 0.5 + x * sin + y * cos) for x, y in points]


def _star() -> list[tuple[float, float]]:
    points: list[tuple[float, float]] = []
    for i in range(10):
        radius, angle = (0.5, 0.22)[i % 2], math.pi * (i / 5 - 0.5)
        points.append((radius * math.cos(angle), radius * math.sin(angle)))
    return points


_A = 0.15  # half the width of a cross's arm
_CORNERS: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.44, -0.44), (0.44, -0.44), (0.44, 0.44), (-0.44, 0.44)],
    "triangle": [(0, -0.46), (0.46, 0.4), (-0.46, 0.4)],
    "star": _star(),
    "cross": [
        (-_A, -0.47), (_A, -0.47), (_A, -_A), (0.47, -_A), (0.47, _A), (_A, _A),
        (_A, 0.47), (-_A, 0.47), (-_A, _A), (-0.47, _A), (-0.47, -_A), (-_A, -_A),
    ],
    "diamond": [(0, -0.49), (0.38, 0), (0, 0.49), (-0.38, 0)],
}  # fmt: skip

Pixels = npt.NDArray[np.uint8]


def _plain(rng: np.random.Generator, scene: Scene) -> Pixels:
    return np.full((scene.height, scene.width, 3), scene.background, np.uint8)


def _lit(scene: Scene, light: npt.NDArray[Any]) -> Pixels:
    """The background with `light` [height, width] added, or anything that broadcasts to it."""
    whole = np.broadcast_to(light, (scene.height, scene.width)).astype(np.int16)[:, :, None]
    return np.clip(np.array(scene.background, np.int16) + whole, 0, 255).astype(np.uint8)


def _axes(scene: Scene) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Both coordinates in units of the shorter side."""
    side = min(scene.width, scene.height)
    y = np.arange(scene.height, dtype=np.float32)[:, None] / side
    return np.arange(scene.width, dtype=np.float32)[None] / side, y


def _gradient(rng: np.random.Generator, scene: Scene) -> Pixels:
    x, y = _axes(scene)
    across, down = rng.uniform(-14, 14, 2)
    return _lit(scene, across * (x - x.mean()) + down * (y - y.mean()))


def _noise(rng: np.random.Generator, scene: Scene) -> Pixels:
    reach = int(rng.integers(4, 15))
    return _lit(scene, rng.integers(-reach, reach + 1, (scene.height, scene.width), dtype=np.int8))


def _stripes(rng: np.random.Generator, scene: Scene) -> Pixels:
    x, y = _axes(scene)
    angle, pitch, reach = rng.uniform(0, math.pi), rng.uniform(8, 40), rng.uniform(3, 10)
    return _lit(scene, reach * np.sign(np.sin((x * math.cos(angle) + y * math.sin(angle)) * pitch * 2)))


def _blotches(rng: np.random.Generator, scene: Scene) -> Pixels:
    cells = int(rng.integers(4, 16))
    coarse = Image.fromarray(rng.normal(0, rng.uniform(4, 9), (cells, cells)).astype(np.float32))
    return _lit(scene, np.asarray(coarse.resize((scene.width, scene.height), Image.Resampling.BICUBIC)))


def _checks(rng: np.random.Generator, scene: Scene) -> Pixels:
    x, y = _axes(scene)
    cells, reach = rng.uniform(6, 20), rng.uniform(3, 9)
    return _lit(scene, reach * ((np.floor(x * cells) + np.floor(y * cells)) % 2))


def _waves(rng: np.random.Generator, scene: Scene) -> Pixels:
    x, y = _axes(scene)
    a, b, reach = rng.uniform(6, 30), rng.uniform(6, 30), rng.uniform(3, 9)
    return _lit(scene, reach * np.sin(a * x + 2 * np.sin(b * y)))


_TEXTURE = {
    "plain": _plain,
    "gradient": _gradient,
    "noise": _noise,
    "stripes": _stripes,
    "blotches": _blotches,
    "checks": _checks,
    "waves": _waves,
}


def encoded(image: Image.Image, rng: np.random.Generator) -> bytes:
    """A PNG, or a JPEG of quality 80 to 95."""
    out = io.BytesIO()
    if rng.random() < 0.5:
        image.save(out, "PNG", compress_level=1)
    else:
        image.save(out, "JPEG", quality=int(rng.integers(80, 96)))
    return out.getvalue()


# What a tower can be taught patch by patch


@dataclass(frozen=True)
class Tile:
    """A window of a scene: `left`, `top` in stretched pixels, `wide` and `tall` the stretch from the picture's own."""

    left: float
    top: float
    wide: float
    tall: float
    whole: bool


def windows(scene: Scene, style: Style) -> list[Tile]:
    """The tiles that `vision_worker.preprocessing.tiling.cut` makes of it, in order."""
    columns, rows = tiling.select_grid(scene.width, scene.height, style.tiling)
    side, wide, tall = style.tile, columns * style.tile / scene.width, rows * style.tile / scene.height
    found = [Tile(c * side, r * side, wide, tall, columns * rows == 1) for r in range(rows) for c in range(columns)]
    if len(found) > 1:
        found.append(Tile(0, 0, side / scene.width, side / scene.height, True))
    return found


@dataclass
class Labels:
    """Of one tile's patches, int8 [side, side] each: what covers a patch, −1 where it cannot be told."""

    kind: npt.NDArray[np.int8]  # 0 nothing, 1 to 6 a shape, 7 to 16 a digit
    colour: npt.NDArray[np.int8]  # 0 nothing, 1 to 8
    order: npt.NDArray[np.int8]  # of a digit among those of its number in this tile, from the left
    turn: npt.NDArray[np.int8]  # of a digit in the whole number, from the left, whatever of it is in this tile
    place: npt.NDArray[np.int8]  # of the thing's middle in its tile, where the tile shows the whole picture
    middle: npt.NDArray[np.int8]  # 1 where the middle of a thing is
    things: int = field(default=0)


_COLOUR_NUMBER = {name: i + 1 for i, name in enumerate(COLOURS)}

_LEAST = 0.6  # patches; what is thinner cannot be told in a thumbnail


def labels(scene: Scene, tile: Tile, side: int) -> Labels:
    """Patch labels of one window, `side` patches wide."""
    nothing, unknown = np.zeros((side, side), np.int8), np.full((side, side), -1, np.int8)
    found = Labels(nothing, nothing.copy(), unknown, unknown.copy(), unknown.copy(), nothing.copy())
    for shape in scene.shapes:
        _label(found, tile, scene, shape.box, SHAPES.index(shape.name) + 1, shape.colour, -1, -1, 0.06)
    for number in scene.numbers:
        order = 0
        for turn, (digit, box) in enumerate(zip(number.text, number.digits, strict=True)):
            order += _label(found, tile, scene, box, 7 + int(digit), number.colour, order, turn, 0.0)
    return found


def _label(
    found: Labels, tile: Tile, scene: Scene, box: Box, kind: int, colour: str, order: int, turn: int, inset: float
) -> bool:
    """Whether the thing is seen well enough to be told."""
    side = found.kind.shape[0]
    left, right = ((box[i] * tile.wide - tile.left) / PATCH for i in (0, 2))
    top, bottom = ((box[i] * tile.tall - tile.top) / PATCH for i in (1, 3))
    area = (right - left) * (bottom - top)
    seen = max(0.0, min(right, side) - max(left, 0)) * max(0.0, min(bottom, side) - max(top, 0)) / area
    if seen == 0:
        return False
    x, y = (left + right) / 2, (top + bottom) / 2
    dx, dy = inset * (right - left), inset * (bottom - top)
    # patches whose middle lies within, and the one that the thing's own middle is in
    columns = slice(max(0, math.ceil(left + dx - 0.5)), max(0, min(side, math.floor(right - dx - 0.5) + 1)))
    rows = slice(max(0, math.ceil(top + dy - 0.5)), max(0, min(side, math.floor(bottom - dy - 0.5) + 1)))
    known = seen >= 0.6 and min(right - left, bottom - top) >= _LEAST and max(right - left, bottom - top) >= 1
    patches = [(rows, columns)]
    if 0 <= x < side and 0 <= y < side:
        patches.append((slice(int(y), int(y) + 1), slice(int(x), int(x) + 1)))
        found.middle[int(y), int(x)] = 1
    for r, c in patches:
        found.kind[r, c] = kind if known else -1
        found.colour[r, c] = _COLOUR_NUMBER[colour]
        found.order[r, c] = order if known else -1
        found.turn[r, c] = turn
        if tile.whole:
            found.place[r, c] = place(*shares(scene, box))
    found.things += known
    return known


def shares(scene: Scene, box: Box) -> tuple[float, float]:
    """Where the middle of a box is, from 0 to 1 across and down the full tile."""
    row, column, side = scene.piece
    x, y = (box[0] + box[2]) / 2 / scene.width, (box[1] + box[3]) / 2 / scene.height
    return (column + side * x) / GRID, (row + side * y) / GRID


def place(x: float, y: float) -> int:
    """Index into PLACES of a point, both coordinates as shares of the picture."""
    return 3 * min(2, int(3 * y)) + min(2, int(3 * x))
