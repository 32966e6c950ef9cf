"""Background textures: all are fainter than any colour that is drawn on them."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from demo.scenes.scene import Scene

Pixels = npt.NDArray[np.uint8]


def draw_texture(rng: np.random.Generator, scene: Scene) -> Pixels:
    """Return the background of a scene, [height, width, 3]."""
    return _TEXTURES[scene.texture](rng, scene)


def _plain(rng: np.random.Generator, scene: Scene) -> Pixels:
    return np.full((scene.height, scene.width, 3), scene.background, np.uint8)


def _add_light(scene: Scene, light: npt.NDArray[Any]) -> Pixels:
    """Add `light` [height, width], or anything that broadcasts to it, to the background colour."""
    whole = np.broadcast_to(light, (scene.height, scene.width)).astype(np.int16)[:, :, None]
    return np.clip(np.array(scene.background, np.int16) + whole, 0, 255).astype(np.uint8)


def _coordinates(scene: Scene) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return x [1, width] and y [height, 1] in units of the shorter side."""
    side = min(scene.width, scene.height)
    y = np.arange(scene.height, dtype=np.float32)[:, None] / side
    return np.arange(scene.width, dtype=np.float32)[None] / side, y


def _gradient(rng: np.random.Generator, scene: Scene) -> Pixels:
    x, y = _coordinates(scene)
    slope_x, slope_y = rng.uniform(-14, 14, 2)
    return _add_light(scene, slope_x * (x - x.mean()) + slope_y * (y - y.mean()))


def _noise(rng: np.random.Generator, scene: Scene) -> Pixels:
    amplitude = int(rng.integers(4, 15))
    return _add_light(scene, rng.integers(-amplitude, amplitude + 1, (scene.height, scene.width), dtype=np.int8))


def _stripes(rng: np.random.Generator, scene: Scene) -> Pixels:
    x, y = _coordinates(scene)
    angle, frequency, amplitude = rng.uniform(0, math.pi), rng.uniform(8, 40), rng.uniform(3, 10)
    return _add_light(scene, amplitude * np.sign(np.sin((x * math.cos(angle) + y * math.sin(angle)) * frequency * 2)))


def _blotches(rng: np.random.Generator, scene: Scene) -> Pixels:
    cells = int(rng.integers(4, 16))
    coarse = Image.fromarray(rng.normal(0, rng.uniform(4, 9), (cells, cells)).astype(np.float32))
    return _add_light(scene, np.asarray(coarse.resize((scene.width, scene.height), Image.Resampling.BICUBIC)))


def _checks(rng: np.random.Generator, scene: Scene) -> Pixels:
    x, y = _coordinates(scene)
    cells, amplitude = rng.uniform(6, 20), rng.uniform(3, 9)
    return _add_light(scene, amplitude * ((np.floor(x * cells) + np.floor(y * cells)) % 2))


def _waves(rng: np.random.Generator, scene: Scene) -> Pixels:
    x, y = _coordinates(scene)
    a, b, amplitude = rng.uniform(6, 30), rng.uniform(6, 30), rng.uniform(3, 9)
    return _add_light(scene, amplitude * np.sin(a * x + 2 * np.sin(b * y)))


_TEXTURES = {
    "plain": _plain,
    "gradient": _gradient,
    "noise": _noise,
    "stripes": _stripes,
    "blotches": _blotches,
    "checks": _checks,
    "waves": _waves,
}
