"""A checkpoint's description as it goes over the wire; both kinds of worker give it, the gateway compares the two."""

from protos import embeddings_pb2 as pb
from wire.checkpoint import Checkpoint


def describe(checkpoint: Checkpoint) -> pb.CheckpointDescription:
    """The message that `Describe` of either worker answers with."""
    said = checkpoint.description
    thresholds = said.thresholds
    return pb.CheckpointDescription(
        fingerprint=checkpoint.fingerprint,
        family=said.family,
        width=said.width,
        tile_size=said.tower.image_size,
        tokens_per_tile=said.tokens_per_tile,
        compressed_tokens_per_tile=said.compressed_tokens_per_tile,
        min_tiles=said.min_tiles,
        max_tiles=said.max_tiles,
        thumbnail=said.thumbnail,
        relative_threshold=thresholds.relative if thresholds else 0.0,
        absolute_threshold=thresholds.absolute if thresholds else 0.0,
    )
