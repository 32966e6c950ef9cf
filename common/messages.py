"""Conversion between Python values and the protobuf messages that carry them."""

from typing import cast

from common import errors
from common.checkpoint import Checkpoint
from protos import embeddings_pb2 as pb


def checkpoint_message(checkpoint: Checkpoint) -> pb.CheckpointDescription:
    """Return the description of a checkpoint as the reply to `Describe` has it."""
    description = checkpoint.description
    thresholds = description.thresholds
    return pb.CheckpointDescription(
        fingerprint=checkpoint.fingerprint,
        family=description.family,
        width=description.width,
        tile_size=description.tower.image_size,
        tokens_per_tile=description.tokens_per_tile,
        compressed_tokens_per_tile=description.compressed_tokens_per_tile,
        min_tiles=description.min_tiles,
        max_tiles=description.max_tiles,
        thumbnail=description.thumbnail,
        relative_threshold=thresholds.relative if thresholds else 0.0,
        absolute_threshold=thresholds.absolute if thresholds else 0.0,
    )


def dtype_to_proto(name: str) -> pb.Dtype:
    """Return the enum value of a dtype's name, such as `bfloat16`."""
    return cast(pb.Dtype, pb.Dtype.Value(name.upper()))


def dtype_from_proto(number: int) -> str:
    """Return the name of a dtype's enum value, such as `bfloat16`. Raises: `InvalidRequest` if the value is unknown."""
    if number not in pb.Dtype.values() or number == pb.DTYPE_UNSPECIFIED:
        known = ", ".join(f"{value} ({pb.Dtype.Name(value).lower()})" for value in pb.Dtype.values() if value)
        raise errors.InvalidRequest(f"unknown dtype number {number}: expected {known}; run the same version of all processes")
    return pb.Dtype.Name(cast(pb.Dtype, number)).lower()


def model_dtype(description: pb.LanguageDescription) -> int:
    """Return the dtype in which a language worker computes, as an enum value. One of an older version names only one dtype."""
    return description.model_dtype or description.dtype
