"""Products of matrices. Those of float32 on a CPU go to oneDNN: torch gives them to MKL, which on an EPYC takes twice as long.

bfloat16 torch gives to oneDNN itself. The operator is the one that torch's own compiler emits for such products.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
_ROWS = 512
"""Queries whose scores are held at once, which is what fits into a core's cache."""


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)

    def then_gelu(self, x: Tensor) -> Tensor:
        """The exact one, by erf; in the same pass over memory where oneDNN multiplies."""
        return _product(x, self.weight, self.bias, "gelu") if _for_onednn(x) else F.gelu(self(x))


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times the transpose of `weight` [out, in], plus `bias` [out]: `F.linear`."""
    return _product(x, weight, bias) if _for_onednn(x) else F.linear(x, weight, bias)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`F.scaled_dot_product_attention`, of queries, keys and values [n, heads, length, width of a head]."""
    if not _for_onednn(q):
        return F.scaled_dot_product_attention(q, k, v)
    q, k, v = (q * q.shape[-1] ** -0.5).contiguous(), k.contiguous(), v.mT.contiguous()
    out = torch.empty_like(q)
    for image in range(q.shape[0]):
        for head in range(q.shape[1]):
            _one_head(q[image, head], k[image, head], v[image, head], out[image, head])
    return out


def _one_head(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """`v` is transposed."""
    parts = -(-len(q) // _ROWS)
    for queries, found in zip(q.tensor_split(parts), out.tensor_split(parts), strict=True):
        found.copy_(_product(_product(queries, k).softmax(-1), v))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None, then: str = "none") -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], "none")
    return found


def _for_onednn(x: Tensor) -> bool:
    """The operator knows no gradients, and a compiler chooses for itself."""
    return (
        _ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32
        and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    )  # fmt: skip
