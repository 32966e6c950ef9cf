"""Terms of this system and the messages that carry them, both ways."""

from typing import cast

from common import errors
from common.checkpoint import Checkpoint
from protos import embeddings_pb2 as pb


def checkpoint_message(checkpoint: Checkpoint) -> pb.CheckpointDescription:
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


def dtype_to_proto(name: str) -> pb.Dtype:
    """`bfloat16` → the message's number."""
    return cast(pb.Dtype, pb.Dtype.Value(name.upper()))


def dtype_from_proto(number: int) -> str:
    """The message's number → `bfloat16`. Raises `InvalidRequest` where it is none we know."""
    if number not in pb.Dtype.values() or number == pb.DTYPE_UNSPECIFIED:
        raise errors.InvalidRequest(f"unknown dtype number {number}: 1 is bfloat16, 2 float16, 3 float32")
    return pb.Dtype.Name(cast(pb.Dtype, number)).lower()
