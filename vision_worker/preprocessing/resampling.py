"""Pillow's bicubic resampling of RGB images, bit for bit, for the vectors of today's processors.

Pillow's own is plain C over interleaved channels. The arithmetic here is its own (`src/libImaging/Resample.c` of Pillow 13):
weights in doubles, rounded to 22 bits; two passes, each rounded to bytes. What differs is the order of the data: both passes
run along lines that lie together in memory, so that the compiler takes many bytes at once. Runs without the interpreter.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

_BITS = 22
_HALF = 1 << (_BITS - 1)
_BLOCK = 64
"""Side of the squares that are transposed at a time: both ends of one stay in the first cache."""

_compiled: Any = numba.njit(nogil=True)


@dataclass(frozen=True)
class Weights:
    """What makes target i of `size` sources: `taps[i, :count[i]]` of those from `first[i]` on, in units of 2 ** -22."""

    first: npt.NDArray[np.int64]
    count: npt.NDArray[np.int64]
    taps: npt.NDArray[np.int32]


def weights(size: int, target: int) -> Weights:
    """Of a line of `size` pixels that becomes one of `target`."""
    most = math.ceil(2.0 * max(size / target, 1.0)) * 2 + 1
    made = Weights(np.empty(target, np.int64), np.empty(target, np.int64), np.zeros((target, most), np.int32))
    _weigh(size, made.first, made.count, made.taps)
    return made


def warm() -> None:
    """Compile now, a second or two, and not while a first image waits."""
    resized(np.zeros((2, 2, 3), np.uint8), [(1, 1)])


def resized(pixels: Bytes, sizes: Sequence[tuple[int, int]]) -> list[Bytes]:
    """One picture [h, w, 3] in several sizes (width, height), [height, width, 3] each."""
    height, width = pixels.shape[:2]
    upright = np.ascontiguousarray(pixels).reshape(height, width * 3)
    turned = functools.cache(lambda: _transposed(upright))  # a good part of the work: once, and only where it is wanted
    return [
        _down_first(upright, size) if _is_down_first((width, height), size) else _across_first(turned(), height, size)
        for size in sizes
    ]


def _is_down_first(size: tuple[int, int], to: tuple[int, int]) -> bool:
    """Since Pillow 13: where the height shrinks by more than twice what the width does, in pixels. It shows in the last bit."""
    narrower, lower = size[0] - to[0], size[1] - to[1]
    return lower > 0 and lower > 2 * narrower


def _across_first(turned: Bytes, height: int, size: tuple[int, int]) -> Bytes:
    """`turned`: [w · 3, h]."""
    return _down(_across(turned, height, size[0]), size[1]).reshape(size[1], size[0], 3)


def _down_first(upright: Bytes, size: tuple[int, int]) -> Bytes:
    """`upright`: [h, w · 3]."""
    lower = _down(upright, size[1])
    return _across(_transposed(lower), size[1], size[0]).reshape(size[1], size[0], 3)


def _across(turned: Bytes, height: int, to: int) -> Bytes:
    """[w · 3, h] to [h, to · 3]."""
    return _transposed(_down(turned.reshape(-1, 3 * height), to).reshape(3 * to, height))


def _down(lines: Bytes, to: int) -> Bytes:
    """[n, length] to [to, length]."""
    by = weights(len(lines), to)
    made = np.empty((to, lines.shape[1]), np.uint8)
    _filter(lines, by.first, by.count, by.taps, made)
    return made


def _transposed(lines: Bytes) -> Bytes:
    made = np.empty(lines.shape[::-1], np.uint8)
    _transpose(lines, made)
    return made


@_compiled
def _filter(lines: Any, first: Any, count: Any, taps: Any, out: Any) -> None:
    """Lines [n, length] to [target, length], each the weighted sum of neighbours."""
    length = lines.shape[1]
    sums = np.empty(length, np.int32)
    for i in range(len(first)):
        sums[:] = np.int32(_HALF)
        for k in range(count[i]):
            tap, line = taps[i, k], lines[first[i] + k]
            for j in range(length):
                sums[j] += np.int32(line[j]) * tap
        made = out[i]
        for j in range(length):
            made[j] = np.uint8(min(max(sums[j] >> _BITS, np.int32(0)), np.int32(255)))


@_compiled
def _transpose(lines: Any, out: Any) -> None:
    height, width = lines.shape
    for top in range(0, height, _BLOCK):
        for left in range(0, width, _BLOCK):
            for j in range(left, min(left + _BLOCK, width)):
                for i in range(top, min(top + _BLOCK, height)):
                    out[j, i] = lines[i, j]


@_compiled
def _weigh(size: int, first: Any, count: Any, taps: Any) -> None:
    """In the order in which Pillow adds and multiplies; in place, since a line of a million pixels has long rows of taps."""
    scale = size / len(first)
    wide = max(scale, 1.0)
    support, inverse = 2.0 * wide, 1.0 / wide
    values = np.empty(taps.shape[1])
    for i in range(len(first)):
        center = (i + 0.5) * scale
        first[i] = max(int(center - support + 0.5), 0)
        count[i] = min(int(center + support + 0.5), size) - first[i]
        total = 0.0
        for k in range(count[i]):
            values[k] = _bicubic((k + first[i] - center + 0.5) * inverse)
            total += values[k]
        for k in range(count[i]):
            value = values[k] / total * (1 << _BITS)
            taps[i, k] = int(value - 0.5 if value < 0 else value + 0.5)


@_compiled
def _bicubic(x: float) -> float:
    x = abs(x)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    if x < 2.0:
        return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return 0.0
