"""A family without a tower: embeddings from a hash of each tile, to price everything else of a deployment.

Deterministic, of true shapes and routed like true ones; means nothing to a language model.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from common.checkpoint import Checkpoint
from common.tiling import Tiling
from vision_worker.encoder import Embedded, Placement, Stager
from vision_worker.models.vir import Policy
from vision_worker.preprocessing import tiling

_SCORES = 1 << 16


class Fake:
    def __init__(self, checkpoint: Checkpoint, place: Placement) -> None:
        self.checkpoint, self.placement = checkpoint, place
        self.stage = Stager(torch.device("cpu")).stage
        said = checkpoint.description
        generator = torch.Generator().manual_seed(0)
        table = torch.randn(4 * said.tokens_per_tile, said.width, generator=generator)
        self._table = table.to(place.device, place.dtype)

    def sizes(self, largest: int) -> Sequence[int]:
        return [largest]

    def prepare(self, data: bytes, options: Tiling) -> tiling.Tiles:
        return tiling.cut(data, options)

    def forward(self, pixels: Tensor) -> Tensor:
        """A number of 32 bits a tile, int64 [n]."""
        digests = (hashlib.blake2b(tile.tobytes(), digest_size=4).digest() for tile in pixels.numpy())
        return torch.tensor([int.from_bytes(digest) for digest in digests])

    def project(self, features: Tensor, copies: Sequence[int], policy: Policy) -> Embedded:
        numbers = features[list(copies)]
        scores = (numbers % _SCORES).float() / _SCORES
        compressed = policy.route(scores).tolist()
        blocks = [self._block(n, small) for n, small in zip(numbers.tolist(), compressed, strict=True)]
        return Embedded(blocks, compressed, scores.tolist() if policy.needs_scores else [])

    def _block(self, number: int, compressed: bool) -> Tensor:
        said = self.checkpoint.description
        rows = said.compressed_tokens_per_tile if compressed else said.tokens_per_tile
        first = number % (len(self._table) - rows)
        return self._table[first : first + rows]


def load(checkpoint: Checkpoint, place: Placement, dummy: bool = False) -> Fake:
    return Fake(checkpoint, place)
