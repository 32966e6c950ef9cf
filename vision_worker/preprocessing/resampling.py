"""Pillow's bicubic resampling of RGB images, bit for bit, compiled for the vector instructions of the CPU.

Source: `src/libImaging/Resample.c` of Pillow 13. Weights are computed in doubles and rounded to 22 bits; there are two passes,
each rounded to bytes. Pillow loops over interleaved channels; here both passes run along lines that are contiguous in memory,
so that the compiler vectorizes them. The loops run without the GIL.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

_WEIGHT_BITS = 22
_ROUNDING = 1 << (_WEIGHT_BITS - 1)
_TRANSPOSE_BLOCK = 64
"""Side of the squares that are transposed at a time, so that source and target stay in the L1 cache."""


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function at its first call, or load what an earlier process of this machine compiled."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the home folder can be written
        return numba.njit(nogil=True)(function)


@dataclass(frozen=True)
class Weights:
    """The filter of one pass: target pixel i is the sum of source pixels times weights.

    Attributes:
        first: index of the first source pixel of each target pixel.
        count: number of source pixels of each target pixel.
        taps: weights [target, largest count] in units of 2 ** -22; only `taps[i, :count[i]]` are used.
    """

    first: npt.NDArray[np.int64]
    count: npt.NDArray[np.int64]
    taps: npt.NDArray[np.int32]


def weights(size: int, target: int) -> Weights:
    """Weights that resize a line of `size` pixels to `target` pixels."""
    max_taps = math.ceil(2.0 * max(size / target, 1.0)) * 2 + 1
    result = Weights(np.empty(target, np.int64), np.empty(target, np.int64), np.zeros((target, max_taps), np.int32))
    _compute_weights(size, result.first, result.count, result.taps)
    return result


def resize(pixels: Bytes, sizes: Sequence[tuple[int, int]]) -> list[Bytes]:
    """Resize one image to several sizes.

    Args:
        pixels: [h, w, 3].
        sizes: (width, height) of each result.

    Returns: [height, width, 3] for each size.
    """
    height, width = pixels.shape[:2]
    rows = np.ascontiguousarray(pixels).reshape(height, width * 3)
    transposed = functools.cache(lambda: _transpose(rows))  # expensive: done once, and only if a size needs it
    return [
        _vertical_first(rows, size)
        if _is_vertical_first((width, height), size)
        else _horizontal_first(transposed(), height, size)
        for size in sizes
    ]


def _is_vertical_first(source: tuple[int, int], target: tuple[int, int]) -> bool:
    """Whether Pillow (since 13) runs the vertical pass first: the order changes the last bit.

    It does if the height shrinks by more than twice as many pixels as the width. Sizes are (width, height).
    """
    fewer_columns, fewer_rows = source[0] - target[0], source[1] - target[1]
    return fewer_rows > 0 and fewer_rows > 2 * fewer_columns


def _horizontal_first(transposed: Bytes, height: int, size: tuple[int, int]) -> Bytes:
    """`transposed`: [w · 3, h]."""
    return _resize_rows(_resize_columns(transposed, height, size[0]), size[1]).reshape(size[1], size[0], 3)


def _vertical_first(rows: Bytes, size: tuple[int, int]) -> Bytes:
    """`rows`: [h, w · 3]."""
    resized = _resize_rows(rows, size[1])
    return _resize_columns(_transpose(resized), size[1], size[0]).reshape(size[1], size[0], 3)


def _resize_columns(transposed: Bytes, height: int, target: int) -> Bytes:
    """[w · 3, h] to [h, target · 3]."""
    return _transpose(_resize_rows(transposed.reshape(-1, 3 * height), target).reshape(3 * target, height))


def _resize_rows(lines: Bytes, target: int) -> Bytes:
    """[n, length] to [target, length]."""
    by = weights(len(lines), target)
    out = np.empty((target, lines.shape[1]), np.uint8)
    _filter(lines, by.first, by.count, by.taps, out)
    return out


def _transpose(lines: Bytes) -> Bytes:
    out = np.empty(lines.shape[::-1], np.uint8)
    _transpose_into(lines, out)
    return out


@compiled
def _filter(lines: Any, first: Any, count: Any, taps: Any, out: Any) -> None:
    """Lines [n, length] to [target, length]: each is a weighted sum of neighbouring lines."""
    length = lines.shape[1]
    sums = np.empty(length, np.int32)
    for i in range(len(first)):
        sums[:] = np.int32(_ROUNDING)
        for k in range(count[i]):
            tap, line = taps[i, k], lines[first[i] + k]
            for j in range(length):
                sums[j] += np.int32(line[j]) * tap
        target = out[i]
        for j in range(length):
            target[j] = np.uint8(min(max(sums[j] >> _WEIGHT_BITS, np.int32(0)), np.int32(255)))


@compiled
def _transpose_into(lines: Any, out: Any) -> None:
    height, width = lines.shape
    for top in range(0, height, _TRANSPOSE_BLOCK):
        for left in range(0, width, _TRANSPOSE_BLOCK):
            for j in range(left, min(left + _TRANSPOSE_BLOCK, width)):
                for i in range(top, min(top + _TRANSPOSE_BLOCK, height)):
                    out[j, i] = lines[i, j]


@compiled
def _compute_weights(size: int, first: Any, count: Any, taps: Any) -> None:
    """Fill the arrays of `Weights` in place, adding and multiplying in Pillow's order, so that rounding is the same."""
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
            value = values[k] / total * (1 << _WEIGHT_BITS)
            taps[i, k] = int(value - 0.5 if value < 0 else value + 0.5)


@compiled
def _bicubic(x: float) -> float:
    x = abs(x)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    if x < 2.0:
        return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return 0.0
