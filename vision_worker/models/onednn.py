"""Faster float32 matrix products on a CPU: `optimize` replaces layers of a loaded model with ones that call oneDNN.

PyTorch uses MKL for float32 products, which takes twice as long as oneDNN on AMD EPYC, and oneDNN for bfloat16 products.
The operator used here is the one that torch's own compiler emits. See docs/decisions/0016-products-by-onednn.md.

The replaced layers are for inference: the operator has no gradients.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_worker.models import intern_vit, vir

_QUERIES_PER_PASS = 512
"""Queries of one head whose scores are computed at a time, so that the scores fit into a core's cache."""


def is_supported(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `optimize` applies to a model of this device and dtype, with this build of torch."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and device.type == "cpu" and dtype == torch.float32


def optimize(model: nn.Module) -> None:
    """Replace the linear layers, the attention and the MLPs inside `model`, in place.

    The modules stay the same objects with the same parameters; only their class, and with it `forward`, changes. Names in
    the state dict do not change. Do not compile an optimized model: the compiler chooses operators itself.
    """
    for module in model.modules():
        replacement = _REPLACEMENTS.get(type(module))
        if replacement is not None:
            module.__class__ = replacement


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """`F.linear` through oneDNN: x [..., in] times the transpose of `weight` [out, in], plus `bias` [out].

    `activation` "gelu" applies the exact GELU in the same pass over memory.
    """
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")
    return product


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`F.scaled_dot_product_attention` through oneDNN, one head after another: [n, heads, length, width of a head]."""
    q, k, v = (q * q.shape[-1] ** -0.5).contiguous(), k.contiguous(), v.mT.contiguous()
    out = torch.empty_like(q)
    for tile in range(q.shape[0]):
        for head in range(q.shape[1]):
            _attend_one_head(q[tile, head], k[tile, head], v[tile, head], out[tile, head])
    return out


def _attend_one_head(q: Tensor, k: Tensor, v_transposed: Tensor, out: Tensor) -> None:
    parts = -(-len(q) // _QUERIES_PER_PASS)
    for queries, result in zip(q.tensor_split(parts), out.tensor_split(parts), strict=True):
        result.copy_(linear(linear(queries, k).softmax(-1), v_transposed))


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class _Attention(intern_vit.Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v)


class _MLP(intern_vit.MLP):
    def forward(self, x: Tensor) -> Tensor:
        if self.activation is not F.gelu:
            return super().forward(x)
        return linear(linear(x, self.fc1.weight, self.fc1.bias, "gelu"), self.fc2.weight, self.fc2.bias)


class _PoolingAttention(vir.PoolingAttention):
    def project_in(self, x: Tensor, rows: slice) -> Tensor:
        return linear(x, self.in_proj_weight[rows], self.in_proj_bias[rows])


_REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: _Linear,
    intern_vit.Attention: _Attention,
    intern_vit.MLP: _MLP,
    vir.PoolingAttention: _PoolingAttention,
}
