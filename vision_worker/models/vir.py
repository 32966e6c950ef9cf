"""The Visual Resolution Router (ViR) decides which tiles are compressed to a quarter of their visual tokens.

Source: InternVL 3.5 (arXiv:2508.18265), section "Visual Resolution Router", and `modeling_internvl_chat.py` of the published
InternVL3.5-Flash checkpoints (`pooling_before_gating`, `gating`). Each tile is scored independently from the tower's
features; a policy then decides for all tiles of one group.
"""

import enum
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.layouts.base import Thresholds

_HEADS = 16


class PoolingAttention(nn.Module):
    """`nn.MultiheadAttention` under its parameter names, with keys and values computed separately from the query.

    The router attends to the same features several times: their keys and values are computed once.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def project_in(self, x: Tensor, rows: slice) -> Tensor:
        """Apply `rows` of the fused input projection, in the order queries, keys, values."""
        return F.linear(x, self.in_proj_weight[rows], self.in_proj_bias[rows])

    def keys_and_values(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of features [n, patches, width], each [n, heads, patches, width / heads]."""
        keys, values = self.project_in(features, slice(features.shape[-1], None)).chunk(2, dim=-1)
        return _split_heads(keys), _split_heads(values)

    def forward(self, query: Tensor, keys_and_values: tuple[Tensor, Tensor]) -> Tensor:
        """Attend from `query` [n, 1, width]; the result has its shape."""
        q = _split_heads(self.project_in(query, slice(query.shape[-1])))
        pooled = F.scaled_dot_product_attention(q, *keys_and_values).transpose(1, 2).flatten(2)
        return cast(Tensor, self.out_proj(pooled))


def _split_heads(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], _HEADS, -1).transpose(1, 2)


class Pooling(nn.Module):
    """Pools a tile's patch features into one vector by a learned query: `pooling_before_gating` of the checkpoint."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_token = nn.Parameter(torch.empty(1, width))
        self.attn1, self.attn2 = PoolingAttention(width), PoolingAttention(width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, features: Tensor) -> Tensor:
        """Features [n, patches, width] to [n, width]."""
        query = self.query_token.expand(len(features), 1, -1)
        x = self.norm1(self.attn1(query, self.attn1.keys_and_values(features)))
        keys_and_values = self.attn2.keys_and_values(features)
        # three times attn2 and norm2, as in the official code: the checkpoint's attn3, attn4, norm3 and norm4 are unused
        for _ in range(3):
            x = self.norm2(self.attn2(x, keys_and_values))
        return cast(Tensor, x.squeeze(1))


class Gating(nn.Module):
    """Pooled vectors to two logits, "compress" and "keep": four residual blocks and a classifier."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block1, self.block2 = _block(width), _block(width)
        self.block3, self.block4 = _block(width), _block(width)
        self.gate = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Vectors [n, width] to logits [n, 2]."""
        for block in (self.block1, self.block2, self.block3, self.block4):
            x = x + block(x)
        return cast(Tensor, self.gate(x))


def _block(width: int) -> nn.Sequential:
    # nn.Identity stands where training had dropout, so that the layers keep the checkpoint's numbers
    return nn.Sequential(
        nn.Linear(width, 4 * width), nn.GELU(), nn.Identity(), nn.Linear(4 * width, width), nn.Identity(),
        nn.LayerNorm(width),
    )  # fmt: skip


class Mode(enum.IntEnum):
    """What a request wants of the router, with the values of `Router.Mode` in protos/vision.proto."""

    AUTO = 0
    OFF = 1
    ALL = 2


class Policy(Protocol):
    """Decides which tiles of one group are compressed.

    A group is the images of one Encode call, never a forward batch: otherwise an image's embedding would depend on the
    requests that happen to share its batch, and no cache key would be valid.
    """

    @property
    def needs_scores(self) -> bool:
        """Whether `route` reads the scores. If not, the router network does not run."""

    def route(self, scores: Tensor) -> Tensor:
        """Scores of the group's tiles, float32 [n] on the CPU, to a mask of the compressed ones, bool [n]."""


@dataclass(frozen=True)
class Learned:
    """The quantile rule: compress a tile whose score is above a quantile of the group's scores and at least `absolute`.

    A score is the router's probability of "compress". `relative` is the quantile, interpolated linearly. The comparison is
    strict, so a group of one tile is never compressed.
    """

    relative: float
    absolute: float
    needs_scores: bool = True

    def route(self, scores: Tensor) -> Tensor:
        """See `Policy.route`."""
        if len(scores) < 2:  # no score is above itself
            return torch.zeros(len(scores), dtype=torch.bool)
        return (scores > torch.quantile(scores, self.relative)) & (scores >= self.absolute)


@dataclass(frozen=True)
class Fixed:
    """Compresses every tile, or none."""

    compress: bool
    needs_scores: bool = False

    def route(self, scores: Tensor) -> Tensor:
        """See `Policy.route`."""
        return torch.full(scores.shape, self.compress)


def select_policy(mode: int, thresholds: Thresholds | None) -> Policy:
    """The policy for a request's `Router.mode`, a value of `Mode`. `thresholds` None: no router, so nothing is compressed."""
    if thresholds is None:
        return Fixed(False)
    policies: dict[int, Policy] = {
        Mode.AUTO: Learned(thresholds.relative, thresholds.absolute),
        Mode.OFF: Fixed(False),
        Mode.ALL: Fixed(True),
    }
    return policies[mode]
