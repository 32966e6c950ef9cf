"""A scene: coloured shapes and a number on a background, with the bounding box of each."""

from dataclasses import dataclass

TILE_PIXELS, PATCH_PIXELS = 448, 14
"""Side of a full tile and of a patch, in pixels."""
TILE_PATCHES = TILE_PIXELS // PATCH_PIXELS
"""Side of a full tile, in patches."""
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
POSITIONS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the image."""


@dataclass(frozen=True)
class Shape:
    """A coloured shape. Its box is square."""

    name: str
    colour: str
    box: Box


@dataclass(frozen=True)
class Number:
    """A printed number. `font` is a file, `size` its size in pixels, `digits` has the box of each digit."""

    text: str
    colour: str
    font: str
    size: int
    box: Box
    digits: tuple[Box, ...]


@dataclass(frozen=True)
class Scene:
    """Everything that is drawn on one image.

    Attributes:
        extra_numbers: More numbers than `number`. Only crowded scenes have them; no question is about them.
        seed: Seed of all that is drawn and not named here: the grain of the texture, the tint and tilt of a shape.
        crop: First row, first column and side, in patches of a full tile. Training cuts scenes into crops of tiles.
    """

    width: int
    height: int
    texture: str
    background: tuple[int, int, int]
    shapes: tuple[Shape, ...] = ()
    number: Number | None = None
    extra_numbers: tuple[Number, ...] = ()
    seed: int = 0
    crop: tuple[int, int, int] = (0, 0, TILE_PATCHES)

    @property
    def all_numbers(self) -> tuple[Number, ...]:
        """`number`, if there is one, and `extra_numbers`."""
        return (*([self.number] if self.number else []), *self.extra_numbers)


def relative_centre(scene: Scene, box: Box) -> tuple[float, float]:
    """Centre of a box, from 0 to 1 across and down the full tile that the scene is a crop of."""
    row, column, side = scene.crop
    x, y = (box[0] + box[2]) / 2 / scene.width, (box[1] + box[3]) / 2 / scene.height
    return (column + side * x) / TILE_PATCHES, (row + side * y) / TILE_PATCHES


def position_index(x: float, y: float) -> int:
    """Index into `POSITIONS` of a point whose coordinates are fractions of the image."""
    return 3 * min(2, int(3 * y)) + min(2, int(3 * x))
