"""Hashes of tiles: equal for equal tiles only."""

import numpy as np
import pytest

from vision_worker.preprocessing.tile_hashes import tile_hashes


@pytest.mark.parametrize("side", [1, 2, 3, 28, 448])
def test_tiles_that_differ_in_a_byte_have_different_hashes(side: int) -> None:
    size = side * side * 3
    changes = [(position, value) for position in sorted({0, size // 3, size // 2, size - 1}) for value in (1, 2, 128, 255)]
    tiles = np.zeros((2 + len(changes), size), np.uint8)
    for i, (position, value) in enumerate(changes, 2):
        tiles[i, position] = value
    hashes = tile_hashes(tiles.reshape(-1, side, side, 3))
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 1 + len(changes)


def test_the_order_of_pixels_counts() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, 28, 28, 3), np.uint8)
    turned = [pixels, pixels[:, ::-1], pixels[:, :, ::-1], pixels[..., ::-1], pixels.swapaxes(1, 2)]
    assert len({tile_hashes(np.ascontiguousarray(tile)) for tile in turned}) == len(turned)
    assert tile_hashes(turned[1]) == tile_hashes(np.ascontiguousarray(turned[1])), "whatever its layout in memory"


def test_high_bytes_of_words_are_mixed() -> None:
    tiles = np.zeros((1 << 16, 2, 4, 3), np.uint8)
    flat = tiles.reshape(-1, 24)
    flat[:, 7], flat[:, 15] = np.arange(1 << 16) >> 8, np.arange(1 << 16) & 255
    assert len(set(tile_hashes(tiles))) == 1 << 16


def test_no_tiles_have_no_hashes() -> None:
    assert tile_hashes(np.empty((0, 448, 448, 3), np.uint8)) == ()
