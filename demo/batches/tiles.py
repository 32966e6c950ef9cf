"""Tiles of scenes with their labels, as tensors."""

from dataclasses import fields

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from demo.batches.types import PatchTargets
from demo.scenes.labels import PatchLabels, label_patches, tile_windows
from demo.scenes.scene import PATCH_PIXELS, Scene
from demo.scenes.style import Style, random_crop
from vision_worker.preprocessing import tiling


def cut_tiles(image: Image.Image, style: Style) -> npt.NDArray[np.uint8]:
    """Return the tiles that the vision worker cuts, uint8 [n, side, side, 3]."""
    return tiling.cut(np.asarray(image), style.tiling).pixels


def tile_crop_origins(scene: Scene, tile_count: int) -> list[tuple[int, int]]:
    """Return row and column of each tile in a full tile. The last tile shows the whole scene.

    Scenes of equal seed get equal origins, also when they differ in one object.
    """
    rng = np.random.default_rng(scene.seed)
    others = [random_crop(rng, scene.crop[2] * PATCH_PIXELS)[:2] for _ in range(tile_count - 1)]
    return [*others, scene.crop[:2]]


def scene_targets(scenes: list[Scene], style: Style) -> PatchTargets:
    """Return the labels of all tiles of the scenes, in order."""
    windows = [(scene, window) for scene in scenes for window in tile_windows(scene, style)]
    return stack_labels([label_patches(scene, window, style.tile_patches) for scene, window in windows])


def stack_labels(labels: list[PatchLabels]) -> PatchTargets:
    """Return the labels of many tiles as tensors."""
    arrays = (np.stack([getattr(tile, field.name) for tile in labels]) for field in fields(PatchTargets))
    return PatchTargets(*(torch.from_numpy(array).flatten(1).long() for array in arrays))
