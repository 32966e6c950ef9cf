"""Narrow embeddings back to the dtype of a language model."""

import torch
from torch import Tensor

CODE_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""Dtypes of the codes of narrow embeddings, by name."""


def dequantize(scales: Tensor, codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values `[rows, width]` in `dtype`: each code times the scale of its row, computed in float32.

    Args:
        scales: `[rows]`, float32.
        codes: `[rows, width]`, one of `CODE_DTYPES`.
        dtype: Dtype of the result.
    """
    return codes.to(torch.float32).mul_(scales[:, None]).to(dtype)
