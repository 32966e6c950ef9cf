"""InternViT-300M and InternViT-6B, the vision towers of InternVL. Parameters have the checkpoint's names.

Source: `modeling_intern_vit.py` of OpenGVLab's checkpoints. A layer is `x + ls1 * attn(norm1(x))`, then
`x + ls2 * mlp(norm2(x))`; there is no norm after the last layer. The 300M tower has LayerNorm and a bias in `qkv`; the 6B
tower has RMSNorm, no bias there, and normalizes queries and keys. In the shapes below, n is the number of tiles.

This is plain PyTorch, gradients included. `onednn.optimize` replaces parts of a loaded tower on a CPU.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.layouts.base import Tower

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}
"""Activations of the MLP, by the name in `vision_config.hidden_act`."""


def required_layers(tower: Tower) -> int:
    """Number of layers that the selected hidden state needs. Later layers are never built.

    `select_layer` indexes the list of hidden states, whose first item is the output of the embeddings.
    Raises: ValueError if that list has no such item.
    """
    states = tower.layers + 1
    if not -states <= tower.select_layer < states:
        raise ValueError(f"select_layer {tower.select_layer} is out of range for a tower with {tower.layers} layers")
    return tower.select_layer % states


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension, always computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x` [..., width]; the result has its dtype."""
        if x.is_cuda:
            return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.eps)  # in float32 too, by one kernel instead of six
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def _norm(tower: Tower) -> nn.Module:
    norms: dict[str, type[nn.Module]] = {"rms_norm": RMSNorm, "layer_norm": nn.LayerNorm}
    return norms[tower.norm](tower.hidden_size, eps=tower.norm_eps)


class PatchEmbeddings(nn.Module):
    """Pixels to tokens: patches by a strided convolution, the class token first, positions added."""

    def __init__(self, tower: Tower, positions: int) -> None:
        super().__init__()
        width, patch = tower.hidden_size, tower.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.position_embedding = nn.Parameter(torch.zeros(1, positions, width))

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [n, 3, side, side] to tokens [n, 1 + patches, width]."""
        tokens = torch.cat([self.class_embedding.expand(len(pixels), -1, -1), self._embed(pixels)], dim=1)
        return tokens + interpolate_positions(self.position_embedding, pixels.shape[-1] // self.patch_embedding.kernel_size[0])

    def _embed(self, pixels: Tensor) -> Tensor:
        """Pixels [n, 3, side, side] to patches [n, patches, width]."""
        if not pixels.is_cuda:
            return cast(Tensor, self.patch_embedding(pixels)).flatten(2).mT
        # a matrix product: cuDNN's convolution takes longer, and rounds float32 to TF32
        patch, side = self.patch_embedding.kernel_size[0], pixels.shape[-1] // self.patch_embedding.kernel_size[0]
        whole = pixels[..., : side * patch, : side * patch]  # as a convolution, without what is no whole patch
        squares = whole.reshape(-1, 3, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5)
        values = squares.reshape(-1, side * side, 3 * patch * patch)
        return F.linear(values, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)


def interpolate_positions(positions: Tensor, side: int) -> Tensor:
    """Resize position embeddings [1, 1 + s², width] to a map of side² patches: bicubic, in float32.

    The class token's position stays as it is. `positions` itself is returned where s equals `side`.
    """
    trained_side = round((positions.shape[1] - 1) ** 0.5)
    if trained_side == side:
        return positions
    square = positions[:, 1:].float().view(1, trained_side, trained_side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], resized.flatten(2).mT.to(positions.dtype)], dim=1)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        width = tower.hidden_size
        self.heads = tower.heads
        self.qkv = nn.Linear(width, 3 * width, bias=tower.qkv_bias)
        self.proj = nn.Linear(width, width)
        self.q_norm = RMSNorm(width, tower.norm_eps) if tower.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width, tower.norm_eps) if tower.qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [n, length, width] to the same shape."""
        return cast(Tensor, self.proj(self.mix(x)))

    def mix(self, x: Tensor) -> Tensor:
        """Everything before the output projection: tokens [n, length, width] to the heads' results, concatenated."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = self.q_norm(q), self.k_norm(k)  # over the full width, before the heads are split
        q, k, v = (t.reshape(*t.shape[:2], self.heads, -1).transpose(1, 2) for t in (q, k, v))
        return self.attend(q, k, v).transpose(1, 2).flatten(2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Scaled dot-product attention of [n, heads, length, width of a head]."""
        return F.scaled_dot_product_attention(q, k, v)


class MLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[tower.activation]
        self.fc1 = nn.Linear(tower.hidden_size, tower.intermediate_size)
        self.fc2 = nn.Linear(tower.intermediate_size, tower.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [n, length, width] to the same shape."""
        return cast(Tensor, self.fc2(self.expand(x)))

    def expand(self, x: Tensor) -> Tensor:
        """First layer and activation: tokens [n, length, width] to [n, length, intermediate size]."""
        return self.activation(self.fc1(x))


class Layer(nn.Module):
    """One transformer layer: attention and MLP, each normalized before and scaled after (`ls1`, `ls2`)."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(tower), MLP(tower)
        self.norm1, self.norm2 = _norm(tower), _norm(tower)
        self.ls1 = nn.Parameter(torch.ones(tower.hidden_size))
        self.ls2 = nn.Parameter(torch.ones(tower.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [n, length, width] to the same shape."""
        x = torch.addcmul(x, self.ls1, self.attn(self.norm1(x)))
        return torch.addcmul(x, self.ls2, self.mlp(self.norm2(x)))


class LayerStack(nn.Module):
    """The layers up to the selected hidden state, under the checkpoint's name `encoder.layers`."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(tower) for _ in range(required_layers(tower)))


class InternViT(nn.Module):
    """The vision tower.

    Args:
        tower: dimensions, from the checkpoint's `vision_config`.
        positions: rows of the checkpoint's position embedding, the class token's included.
    """

    def __init__(self, tower: Tower, positions: int) -> None:
        super().__init__()
        self.embeddings = PatchEmbeddings(tower, positions)
        self.encoder = LayerStack(tower)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalized pixels [n, 3, side, side] to the patches' selected hidden state [n, patches, width].

        The class token is dropped.
        """
        return self.run(pixels, lambda layer, x: cast(Tensor, layer(x)))

    def run(self, pixels: Tensor, run_layer: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
        """As `forward`, with `run_layer(layer, tokens)` in place of each layer's own forward pass."""
        x: Tensor = self.embeddings(pixels)
        for layer in self.encoder.layers:
            x = run_layer(layer, x)
        return x[:, 1:]
