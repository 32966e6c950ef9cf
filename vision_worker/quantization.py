"""Embeddings as bytes, in any dtype that a language worker may request. The narrow ones have a scale per row.

All arithmetic is float32 and rounds to nearest, ties to even, so that equal embeddings have equal bytes on every device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from common import errors
from common.embedding import LARGEST_CODES, MAX_NARROW_MAGNITUDE
from vision_worker.weights import DTYPES

NARROW_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
EMBEDDING_DTYPES = {**DTYPES, **NARROW_DTYPES}
"""Dtypes in which embeddings are delivered, by name."""

_LARGEST_CODES = {dtype: LARGEST_CODES[name] for name, dtype in NARROW_DTYPES.items()}
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""Below it, devices differ in how they compute."""


def convert(tokens: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return the parts of a payload, where the tokens are: the values, or the scales and the codes of a narrow dtype.

    Args:
        tokens: Visual tokens `[rows, width]` in the dtype of the tower.
        dtype: One of `EMBEDDING_DTYPES`.

    Raises:
        InternalError: A value is infinite or NaN, or too large for a narrow dtype.
    """
    if dtype in _LARGEST_CODES:
        return quantize(tokens, dtype)
    values = tokens.to(dtype)
    if not bool(torch.isfinite(values).all()):
        raise _not_finite(values.dtype)
    return (values,)


def quantize(tokens: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale each row so that its largest magnitude becomes the largest code, and round.

    A row of zeros, and one that is smaller than float32's normal numbers, has the scale 0.

    Args:
        tokens: Visual tokens `[rows, width]` in any floating-point dtype.
        dtype: `torch.int8` or `torch.float8_e4m3fn`.

    Returns:
        The scales `[rows]` in float32, and the codes `[rows, width]`. A value is about its code times its row's scale.

    Raises:
        InternalError: A value is infinite or NaN, or larger than float16 can represent.
    """
    values, largest = tokens.to(torch.float32, copy=True), _LARGEST_CODES[dtype]
    magnitudes = torch.linalg.vector_norm(values, ord=torch.inf, dim=1)  # unlike abs().amax(), it needs no copy
    if not bool((magnitudes <= MAX_NARROW_MAGNITUDE).all()):
        raise _too_large(magnitudes, tokens.dtype)
    scales = magnitudes / torch.full_like(magnitudes, largest)  # by a number, a GPU would multiply with its rounded inverse
    scales = torch.where(scales < _SMALLEST_SCALE, 0.0, scales)
    codes = values.div_(torch.where(scales == 0, torch.inf, scales)[:, None])
    codes.clamp_(-largest, largest)  # a division may round up
    return scales, (codes.round_() if dtype == torch.int8 else codes).to(dtype)


def join(parts: Sequence[Tensor], rows: slice) -> Tensor:
    """Return the payload of some rows, uint8 `[bytes]`, from the parts of `convert`. A single part is not copied."""
    pieces = [part[rows].contiguous().view(torch.uint8).flatten() for part in parts]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def view(payload: Tensor) -> memoryview:
    """Return the bytes of a payload that is on the CPU, as a view that keeps it alive."""
    return payload.numpy().data.cast("B")


def _too_large(magnitudes: Tensor, dtype: torch.dtype) -> errors.InternalError:
    largest = float(magnitudes.max())
    if not torch.isfinite(magnitudes).all():
        return _not_finite(dtype)
    return errors.InternalError(
        f"the vision tower computed the value {largest:g}, and narrow embeddings have at most {MAX_NARROW_MAGNITUDE:g}; "
        "start the language worker with --embedding-dtype=auto"
    )


def _not_finite(dtype: torch.dtype) -> errors.InternalError:
    return errors.InternalError(
        f"the vision tower computed infinite or undefined values in {dtype}; run it in bfloat16 or float32"
    )
