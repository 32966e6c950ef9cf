"""A family without a tower: embeddings derived from a hash of each tile, to measure everything but the tower.

Embeddings are deterministic, have the checkpoint's shapes and are routed like real ones. A language
model cannot interpret them.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.checkpoint import Checkpoint
from common.tiling import Tiling
from vision_worker.encoder import FeatureGroup, GroupEmbedding, Placement, Stager
from vision_worker.preprocessing import tiling

_SCORE_LEVELS = 1 << 16


class Fake:
    """The `Encoder` of this family. A tile's hash selects its rows from one random table."""

    def __init__(self, checkpoint: Checkpoint, placement: Placement) -> None:
        self.checkpoint, self.placement = checkpoint, placement
        self.stage = Stager(torch.device("cpu")).stage
        description = checkpoint.description
        generator = torch.Generator().manual_seed(0)
        table = torch.randn(4 * description.tokens_per_tile, description.width, generator=generator)
        self._table = table.to(placement.device, placement.dtype)

    def warmup_batch_sizes(self, max_tiles: int) -> Sequence[int]:
        """The largest batch only: nothing here depends on the size."""
        return [max_tiles]

    def prepare(self, image: npt.NDArray[np.uint8], options: Tiling) -> tiling.Tiles:
        """See `Encoder.prepare`."""
        return tiling.cut(image, options)

    def forward(self, pixels: Tensor) -> Tensor:
        """A hash of 32 bits for each tile, int64 [n]."""
        digests = (hashlib.blake2b(tile.tobytes(), digest_size=4).digest() for tile in pixels.numpy())
        return torch.tensor([int.from_bytes(digest) for digest in digests])

    def project(self, groups: Sequence[FeatureGroup]) -> list[GroupEmbedding]:
        """See `Encoder.project`."""
        return list(map(self._project, groups))

    def _project(self, group: FeatureGroup) -> GroupEmbedding:
        hashes = group.features[list(group.index)]
        scores = (hashes % _SCORE_LEVELS).float() / _SCORE_LEVELS
        compressed = group.policy.route(scores).tolist()
        blocks = [self._block(value, is_compressed) for value, is_compressed in zip(hashes.tolist(), compressed, strict=True)]
        return GroupEmbedding(blocks, compressed, scores.tolist() if group.policy.needs_scores else [])

    def _block(self, value: int, compressed: bool) -> Tensor:
        description = self.checkpoint.description
        rows = description.compressed_tokens_per_tile if compressed else description.tokens_per_tile
        first = value % (len(self._table) - rows)
        return self._table[first : first + rows]


def load(checkpoint: Checkpoint, placement: Placement, dummy: bool = False) -> Fake:
    """Build the encoder. `dummy` has no effect, because no weights are read."""
    return Fake(checkpoint, placement)
