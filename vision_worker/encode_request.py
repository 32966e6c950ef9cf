"""Parses and validates an Encode request."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from common import errors, messages
from common.checkpoint import Checkpoint
from common.embedding import validate_key
from common.layouts.base import Description, Thresholds
from common.options import ADDRESS_PATTERN
from common.tiling import MAX_TILES, Tiling, resolve_tile_bounds
from protos import vision_pb2 as pb
from vision_worker.models import vir

_MAX_IMAGES = 4096
_MAX_TEXT_LENGTH = 512
"""Maximum length of the caller's id, of its scope, and of an address."""


@dataclass(frozen=True)
class ParsedRequest:
    """A valid Encode request. Its images are one group: they are routed together."""

    images: Sequence[pb.Image]
    tiling: Tiling
    policy: vir.Policy
    dtype: str
    deliver_to: str
    """Address of the sink; empty for a dry run."""
    caller: str
    """Opaque id of the caller; callers that send none share the empty one."""

    scope: bytes
    """Opaque; only calls of one scope share embeddings."""


def parse_request(request: pb.EncodeRequest, checkpoint: Checkpoint) -> ParsedRequest:
    """Validate a request against the checkpoint that this worker serves.

    Raises: CheckpointMismatch if the caller expects another checkpoint; InvalidRequest.
    """
    if request.fingerprint and request.fingerprint != checkpoint.fingerprint:
        raise errors.CheckpointMismatch(
            f"the caller expects checkpoint {request.fingerprint[:64]!a}, this vision worker serves {checkpoint.fingerprint}: "
            "start all workers from the same checkpoint"
        )
    if not 0 < len(request.images) <= _MAX_IMAGES:
        raise errors.InvalidRequest(f"Encode has {len(request.images)} images: expected 1 to {_MAX_IMAGES}")
    for i, image in enumerate(request.images):
        _validate_key(image.key, i)
    if bool(request.deliver_to) == request.dry_run:
        raise errors.InvalidRequest("Encode needs either deliver_to or dry_run, and not both")
    _validate_text("caller", request.caller)
    _validate_text("scope", request.scope)
    _validate_text("deliver_to", request.deliver_to)
    if request.deliver_to and not re.fullmatch(ADDRESS_PATTERN, request.deliver_to):
        raise errors.InvalidRequest(f"deliver_to {request.deliver_to!a}: expected HOST:PORT, [IPV6]:PORT or unix:/PATH")
    return ParsedRequest(
        images=request.images,
        tiling=_parse_tiling(request.tiling, checkpoint.description),
        policy=_parse_router(request.router, checkpoint.description.thresholds),
        dtype=messages.dtype_from_proto(request.dtype),
        deliver_to=request.deliver_to,
        caller=request.caller,
        scope=request.scope,
    )


def _validate_key(key: str, index: int) -> None:
    try:
        validate_key(key)
    except errors.InvalidRequest as error:
        raise errors.InvalidRequest(f"images[{index}].key: {error}", param=f"images[{index}]") from None


def _validate_text(name: str, text: str | bytes) -> None:
    if len(text) > _MAX_TEXT_LENGTH:
        raise errors.InvalidRequest(f"{name} has length {len(text)}: expected at most {_MAX_TEXT_LENGTH}")


def _parse_tiling(tiling: pb.Tiling, description: Description) -> Tiling:
    min_tiles, max_tiles = resolve_tile_bounds(tiling.min_tiles, tiling.max_tiles, description.min_tiles, description.max_tiles)
    if min_tiles > max_tiles or max_tiles > MAX_TILES:
        raise errors.InvalidRequest(
            f"min_tiles {min_tiles} and max_tiles {max_tiles}: min_tiles must not exceed max_tiles, nor max_tiles {MAX_TILES}"
        )
    return Tiling(min_tiles, max_tiles, description.thumbnail, description.tower.image_size)


def _parse_router(router: pb.Router, defaults: Thresholds | None) -> vir.Policy:
    """The policy that the request names; `defaults` are the checkpoint's thresholds, None without a router."""
    if router.mode not in pb.Router.Mode.values():
        raise errors.InvalidRequest(f"unknown router mode {router.mode}; known modes: {', '.join(pb.Router.Mode.keys())}")
    for name in ("relative_threshold", "absolute_threshold"):
        value = getattr(router, name)
        if not (math.isfinite(value) and 0 <= value <= 1):
            raise errors.InvalidRequest(f"{name} {value} is not between 0 and 1")
    if defaults is None:
        if router.mode == pb.Router.ALL:
            raise errors.InvalidRequest("this checkpoint has no router and cannot compress: use a Flash checkpoint, or off")
        return vir.select_policy(router.mode, None)
    thresholds = Thresholds(
        relative=router.relative_threshold if router.HasField("relative_threshold") else defaults.relative,
        absolute=router.absolute_threshold if router.HasField("absolute_threshold") else defaults.absolute,
    )
    return vir.select_policy(router.mode, thresholds)
