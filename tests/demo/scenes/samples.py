"""Scenes that several tests share."""

import numpy as np
import pytest

from demo.scenes.generation import generate_scene
from demo.scenes.scene import Box, Scene
from demo.scenes.style import Style

SERVED, SMALL, HELD_OUT = Style(), Style(tile_pixels=224, min_digit_pixels=26), Style(held_out=True)
SINGLE_TILE = Style(tile_pixels=224, max_tiles=1, min_digit_pixels=26, max_side_pixels=800)
STYLES = {"served": SERVED, "small": SMALL, "single tile": SINGLE_TILE, "held out": HELD_OUT}

every_style = pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)


def sample_scenes(style: Style, count: int) -> list[Scene]:
    """The same scenes in every call."""
    return [generate_scene(np.random.default_rng([7, i]), style) for i in range(count)]


def object_boxes(scene: Scene) -> list[Box]:
    return [shape.box for shape in scene.shapes] + ([scene.number.box] if scene.number else [])
