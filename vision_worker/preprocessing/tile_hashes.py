"""Hashes of tiles, by which equal tiles of a request are found. They are computed without the GIL, which other threads need."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from vision_worker.preprocessing.resampling import compiled

_MULTIPLIER = 0x9E3779B97F4A7C15
"""2 ** 64 over the golden ratio: odd, so that no information is lost."""


def tile_hashes(pixels: npt.NDArray[np.uint8]) -> tuple[int, ...]:
    """Return a 64-bit hash for each tile of uint8 [n, side, side, 3], equal for equal tiles.

    Tiles that differ by chance have equal hashes with a probability of about 2 ** -64. This is no cryptographic hash: it is
    easy to make tiles collide. Callers who do so spoil a request of their own, since requests share no tiles.
    """
    rows = np.ascontiguousarray(pixels).reshape(len(pixels), math.prod(pixels.shape[1:]))
    result = np.empty(len(rows), np.uint64)
    whole = rows.shape[1] // 8 * 8
    _hash_words(np.ascontiguousarray(rows[:, :whole]).view(np.uint64), np.ascontiguousarray(rows[:, whole:]), result)
    return tuple(result.tolist())


@compiled
def _hash_words(words: Any, rest: Any, out: Any) -> None:
    """Hash lines [n, words] of 64 bits and the bytes after them. Each step is a bijection of the hash so far."""
    multiplier, shift = np.uint64(_MULTIPLIER), np.uint64(32)
    for i in range(len(out)):
        value = multiplier
        for j in range(words.shape[1]):
            value = (value ^ words[i, j]) * multiplier
            value ^= value >> shift
        for j in range(rest.shape[1]):
            value = (value ^ np.uint64(rest[i, j])) * multiplier
            value ^= value >> shift
        out[i] = value
