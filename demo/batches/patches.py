"""Batches of tiles to train the vision tower on."""

import numpy as np
import numpy.typing as npt
import torch

from demo.batches.tiles import cut_tiles, stack_labels, tile_crop_origins
from demo.batches.types import PatchBatch
from demo.scenes.drawing import draw_scene
from demo.scenes.generation import generate_crowded_scene, generate_scene
from demo.scenes.labels import PatchLabels, TileWindow, label_patches, tile_windows
from demo.scenes.scene import PATCH_PIXELS, Scene
from demo.scenes.style import Style

_FOREGROUND_DIFFERENCE = 45
"""Difference of a colour channel from the background, above that of any texture and below that of any object."""


def patch_batch(rng: np.random.Generator, styles: tuple[Style, ...], count: int, crowded_share: float = 0.0) -> PatchBatch:
    """Return a batch of `count` tiles, about equally many of each style.

    `crowded_share`: fraction of the one-tile scenes that are crowded.
    """
    tiles: list[npt.NDArray[np.uint8]] = []
    origins: list[tuple[int, int]] = []
    foregrounds: list[npt.NDArray[np.bool_]] = []
    labels: list[PatchLabels] = []
    while len(tiles) < count:
        style = styles[len(tiles) * len(styles) // count]
        crowded = crowded_share and style.max_tiles == 1 and rng.random() < crowded_share
        scene = generate_crowded_scene(rng, style) if crowded else generate_scene(rng, style)
        scene_tiles, windows = cut_tiles(draw_scene(scene), style), tile_windows(scene, style)
        tile_labels = [label_patches(scene, window, style.tile_patches) for window in windows]
        tile_origins = tile_crop_origins(scene, len(scene_tiles))
        for i in _choose_tiles(rng, windows, tile_labels):
            tiles.append(scene_tiles[i])
            origins.append(tile_origins[i])
            foregrounds.append(_foreground(scene_tiles[i], scene))
            labels.append(tile_labels[i])
    return PatchBatch(
        torch.from_numpy(np.stack(tiles[:count])),
        torch.tensor(origins[:count]),
        torch.from_numpy(np.stack(foregrounds[:count])),
        stack_labels(labels[:count]),
    )


def _foreground(tile: npt.NDArray[np.uint8], scene: Scene) -> npt.NDArray[np.bool_]:
    """Return which 2 × 2-pixel cells of each patch differ from the background, [patches, 49]."""
    cells = tile[::2, ::2].astype(np.int16) - np.array(scene.background, np.int16)
    side = tile.shape[0] // PATCH_PIXELS
    differs: npt.NDArray[np.bool_] = np.abs(cells).max(-1) > _FOREGROUND_DIFFERENCE
    return differs.reshape(side, 7, side, 7).swapaxes(1, 2).reshape(side * side, 49)


def _choose_tiles(rng: np.random.Generator, windows: list[TileWindow], labels: list[PatchLabels]) -> list[int]:
    """Return the tile with the whole scene, up to three tiles with objects, and in one of five cases any other."""
    parts = [i for i, window in enumerate(windows) if not window.shows_whole_scene]
    with_objects = [i for i in parts if labels[i].object_count]
    chosen = [int(i) for i in rng.permutation(with_objects)[:3]]
    if parts and rng.random() < 0.2:
        chosen.append(int(rng.choice(parts)))
    return [i for i, window in enumerate(windows) if window.shows_whole_scene] + chosen
