"""InternViT, 300M and 6B: patches of tiles to features. Parameters bear the checkpoint's names."""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.layouts.base import Tower
from vision_worker.models.onednn import Linear, attention

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}


def depth(tower: Tower) -> int:
    """Layers that the selected hidden state needs; the list of hidden states begins with the embeddings."""
    states = tower.layers + 1
    if not -states <= tower.select_layer < states:
        raise ValueError(f"select_layer {tower.select_layer} of a tower with {tower.layers} layers")
    return tower.select_layer % states


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """The mean of squares in float32, whatever the dtype of x."""
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def _norm(tower: Tower) -> nn.Module:
    made: dict[str, type[nn.Module]] = {"rms_norm": RMSNorm, "layer_norm": nn.LayerNorm}
    return made[tower.norm](tower.hidden_size, eps=tower.norm_eps)


class Embeddings(nn.Module):
    """Pixels [n, 3, side, side] to tokens [n, 1 + patches, width], the class token first."""

    def __init__(self, tower: Tower, positions: int) -> None:
        super().__init__()
        width, patch = tower.hidden_size, tower.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.position_embedding = nn.Parameter(torch.zeros(1, positions, width))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels)
        tokens = torch.cat([self.class_embedding.expand(len(pixels), -1, -1), patches.flatten(2).mT], dim=1)
        return tokens + interpolated(self.position_embedding, patches.shape[-1])


def interpolated(positions: Tensor, side: int) -> Tensor:
    """Positions [1, 1 + s², width] for a map of side² patches: bicubic, in float32. The class token keeps its own."""
    trained = round((positions.shape[1] - 1) ** 0.5)
    if trained == side:
        return positions
    square = positions[:, 1:].float().view(1, trained, trained, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], resized.flatten(2).mT.to(positions.dtype)], dim=1)


class Attention(nn.Module):
    def __init__(self, tower: Tower) -> None:
        super().__init__()
        width = tower.hidden_size
        self.heads = tower.heads
        self.qkv = Linear(width, 3 * width, bias=tower.qkv_bias)
        self.proj = Linear(width, width)
        self.q_norm = RMSNorm(width, tower.norm_eps) if tower.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width, tower.norm_eps) if tower.qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = self.q_norm(q), self.k_norm(k)  # over the full width, before the heads are split
        q, k, v = (t.reshape(*t.shape[:2], self.heads, -1).transpose(1, 2) for t in (q, k, v))
        return cast(Tensor, self.proj(attention(q, k, v).transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[tower.activation]
        self.fc1 = Linear(tower.hidden_size, tower.intermediate_size)
        self.fc2 = Linear(tower.intermediate_size, tower.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.fc1.then_gelu(x) if self.activation is F.gelu else self.activation(self.fc1(x))
        return cast(Tensor, self.fc2(wide))


class Layer(nn.Module):
    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(tower), MLP(tower)
        self.norm1, self.norm2 = _norm(tower), _norm(tower)
        self.ls1 = nn.Parameter(torch.ones(tower.hidden_size))
        self.ls2 = nn.Parameter(torch.ones(tower.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1 * self.attn(self.norm1(x))
        return cast(Tensor, x + self.ls2 * self.mlp(self.norm2(x)))


class Encoder(nn.Module):
    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(tower) for _ in range(depth(tower)))


class InternViT(nn.Module):
    """`positions`: those the checkpoint was trained with, class token included."""

    def __init__(self, tower: Tower, positions: int) -> None:
        super().__init__()
        self.embeddings = Embeddings(tower, positions)
        self.encoder = Encoder(tower)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [n, 3, side, side] to the selected hidden state of the patches, [n, patches, width]."""
        x: Tensor = self.embeddings(pixels)
        for layer in self.encoder.layers:
            x = layer(x)
        return x[:, 1:]
