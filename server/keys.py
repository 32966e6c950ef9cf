"""The key of an image's embedding: everything that decides its bytes, and whose it is."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from protos import embeddings_pb2 as pb
from protos import vision_pb2 as vision


@dataclass(frozen=True)
class Recipe:
    """How images become embeddings, but for the images: checkpoint, dtype, tiling and router."""

    fingerprint: str
    dtype: pb.Dtype
    tiling: vision.Tiling
    router: vision.Router

    def fields(self) -> list[bytes]:
        # spelt out: the bytes of a serialised message are not promised to be stable
        router = self.router
        thresholds = [
            repr(getattr(router, name)).encode() if router.HasField(name) else b""
            for name in ("relative_threshold", "absolute_threshold")
        ]  # fmt: skip
        tiles = f"{self.tiling.min_tiles},{self.tiling.max_tiles}".encode()
        return [self.fingerprint.encode(), pb.Dtype.Name(self.dtype).encode(), tiles,
                vision.Router.Mode.Name(router.mode).encode(), *thresholds]  # fmt: skip


def tenant(bearer: str | None) -> bytes:
    """32 bytes for a caller's bearer token: callers with different tokens never share (or time) each other's keys."""
    return hashlib.sha256((bearer or "").encode("utf-8", "surrogateescape")).digest()


def image_keys(owner: bytes, digests: Sequence[bytes], recipe: Recipe, *, grouped: bool) -> list[str]:
    """A key an image, in order: 64 hex digits.

    SHA-256 over length-prefixed fields: owner, recipe, digest of the image's bytes. `grouped` (router scope `request`):
    also the digests of the whole group and the image's place in it, because there every image decides the others' routing.
    """
    common = [b"dvd-key-1", owner, *recipe.fields()]
    if not grouped:
        return [_digest([*common, b"image", digest]) for digest in digests]
    return [_digest([*common, b"group", str(place).encode(), *digests]) for place in range(len(digests))]


def _digest(fields: Sequence[bytes]) -> str:
    digest = hashlib.sha256()
    for field in fields:
        digest.update(len(field).to_bytes(8, "big") + field)
    return digest.hexdigest()
