"""The Visual Resolution Router (ViR): which tiles are compressed to a quarter of their tokens."""

from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.layouts.base import Thresholds
from protos import vision_pb2 as pb
from vision_worker.models.onednn import Linear, product

_HEADS = 16


class PoolingAttention(nn.Module):
    """`nn.MultiheadAttention` of a few queries over a tile's features, with keys and values computed apart."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = Linear(width, width)

    def remember(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of features [n, patches, width], each [n, heads, patches, width / heads]."""
        width = features.shape[-1]
        keys, values = product(features, self.in_proj_weight[width:], self.in_proj_bias[width:]).chunk(2, dim=-1)
        return _split(keys), _split(values)

    def forward(self, query: Tensor, memory: tuple[Tensor, Tensor]) -> Tensor:
        width = query.shape[-1]
        q = _split(product(query, self.in_proj_weight[:width], self.in_proj_bias[:width]))
        pooled = F.scaled_dot_product_attention(q, *memory).transpose(1, 2).flatten(2)
        return cast(Tensor, self.out_proj(pooled))


def _split(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], _HEADS, -1).transpose(1, 2)


class Pooling(nn.Module):
    """Features [n, patches, width] to one vector a tile, [n, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_token = nn.Parameter(torch.empty(1, width))
        self.attn1, self.attn2 = PoolingAttention(width), PoolingAttention(width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, features: Tensor) -> Tensor:
        query = self.query_token.expand(len(features), 1, -1)
        x = self.norm1(self.attn1(query, self.attn1.remember(features)))
        memory = self.attn2.remember(features)
        for _ in range(3):  # the checkpoint's attn3, attn4, norm3 and norm4 are unused: trained that way
            x = self.norm2(self.attn2(x, memory))
        return cast(Tensor, x.squeeze(1))


class Gating(nn.Module):
    """Pooled vectors [n, width] to logits [n, 2]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block1, self.block2 = _block(width), _block(width)
        self.block3, self.block4 = _block(width), _block(width)
        self.gate = nn.Sequential(nn.LayerNorm(width), Linear(width, 2))

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.block1, self.block2, self.block3, self.block4):
            x = x + block(x)
        return cast(Tensor, self.gate(x))


def _block(width: int) -> nn.Sequential:
    # identities stand where training had dropout: they keep the checkpoint's numbering
    return nn.Sequential(
        Linear(width, 4 * width), nn.GELU(), nn.Identity(), Linear(4 * width, width), nn.Identity(),
        nn.LayerNorm(width),
    )  # fmt: skip


class Policy(Protocol):
    """Decides from the scores of one group's tiles, float32 [n] on the CPU, which are compressed, bool [n].

    The group is the images of one call, never a forward batch: else an image's embedding would depend on strangers'.
    """

    @property
    def needs_scores(self) -> bool: ...

    def route(self, scores: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Learned:
    """The checkpoint's rule. `scores` are its probabilities of "compress"."""

    relative: float
    absolute: float
    needs_scores: bool = True

    def route(self, scores: Tensor) -> Tensor:
        return (scores > torch.quantile(scores, self.relative)) & (scores >= self.absolute)


@dataclass(frozen=True)
class Fixed:
    """Every tile alike."""

    compress: bool
    needs_scores: bool = False

    def route(self, scores: Tensor) -> Tensor:
        return torch.full(scores.shape, self.compress)


def policy(mode: int, thresholds: Thresholds | None) -> Policy:
    """The policy of a request's `Router.mode`; without thresholds, hence without a router, nothing is compressed."""
    if thresholds is None:
        return Fixed(False)
    policies: dict[int, Policy] = {
        pb.Router.AUTO: Learned(thresholds.relative, thresholds.absolute),
        pb.Router.OFF: Fixed(False),
        pb.Router.ALL: Fixed(True),
    }
    return policies[mode]
