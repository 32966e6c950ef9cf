"""Faster float32 inference on a CPU: `optimize` replaces layers of a loaded model with ones that call oneDNN.

Weights are packed in oneDNN's own layout. Layer scales are part of the weights, and the addition to the residual stream is
part of the product before it. The operators are those that torch's own compiler emits. See
docs/decisions/0016-products-by-onednn.md and docs/decisions/0043-fused-products.md.

The replaced layers are for inference: the operators have no gradients.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_worker.models import intern_vit, vir

_PACKED_FOR_ROWS = 1024
"""Rows of a product that the layout of packed weights is chosen for; it serves any number."""

_QUERIES_PER_PASS = 512
"""Queries of one head whose scores are computed at a time, so that the scores fit into a core's cache."""

_HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
"""Whether oneDNN's kernels beat torch's own for attention and GELU; with AVX2 alone they take twice as long."""


def is_supported(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `optimize` applies to a model of this device and dtype, with this build of torch."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and device.type == "cpu" and dtype == torch.float32


def optimize(model: nn.Module) -> None:
    """Replace the linear layers, the attention, the MLPs and the layers of a tower inside `model`, in place.

    The modules stay the same objects; their class, and with it `forward`, changes. Names in the state dict do not change,
    but layer scales move into the weights before them, and weights of linear layers are packed: only oneDNN's operators
    read them. There is no second copy. Do not compile an optimized model: the compiler chooses operators itself.
    """
    for module in model.modules():  # a layer comes before the linear layers in it, so that it finds their weights unpacked
        replacement = _REPLACEMENTS.get(type(module))
        if replacement is not None:
            module.__class__ = replacement
            if isinstance(module, _Layer | _Linear):
                module.prepare()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """`F.linear` through oneDNN: x [..., in] times the transpose of `weight` [out, in], plus `bias` [out].

    `activation` "gelu" applies the exact GELU in the same pass over memory.
    """
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")
    return product


def linear_plus(x: Tensor, layer: nn.Linear, residual: Tensor) -> Tensor:
    """`residual` plus `layer` of x [..., in], in one pass over memory; the result has the shape of `residual` [..., out]."""
    total: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, layer.weight, layer.bias, "add")
    return total


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
    def prepare(self) -> None:
        """Pack the weight."""
        packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), _PACKED_FOR_ROWS)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class _Layer(intern_vit.Layer):
    def prepare(self) -> None:
        """Move the layer scales into the products that they scale; what is left of them is ones."""
        for scale, layer in (self.ls1, self.attn.proj), (self.ls2, self.mlp.fc2):
            layer.weight.data = scale[:, None] * layer.weight
            layer.bias.data = scale * layer.bias
            scale.data = torch.ones_like(scale)

    def forward(self, x: Tensor) -> Tensor:
        x = linear_plus(self.attn.mix(self.norm1(x)), self.attn.proj, x)
        return linear_plus(self.mlp.expand(self.norm2(x)), self.mlp.fc2, x)


class _Attention(intern_vit.Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v) if _HAS_AVX512 else super().attend(q, k, v)


class _MLP(intern_vit.MLP):
    def expand(self, x: Tensor) -> Tensor:
        if self.activation is not F.gelu:
            return super().expand(x)
        if _HAS_AVX512:
            return linear(x, self.fc1.weight, self.fc1.bias, "gelu")
        # in place: a second tensor of this size costs more than the function
        activated: Tensor = torch.ops.aten.gelu_(self.fc1(x))
        return activated


class _PoolingAttention(vir.PoolingAttention):
    def project_in(self, x: Tensor, rows: slice) -> Tensor:
        return linear(x, self.in_proj_weight[rows], self.in_proj_bias[rows])


_REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: _Linear,
    intern_vit.Layer: _Layer,
    intern_vit.Attention: _Attention,
    intern_vit.MLP: _MLP,
    vir.PoolingAttention: _PoolingAttention,
}
