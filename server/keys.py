"""The name of an embedding: a digest over everything that decides its values, and over who asked.

The caller is part of it so that nobody learns, by a faster answer, what another one has shown the server.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from common import messages
from protos import vision_pb2 as pb


@dataclass(frozen=True)
class Setting:
    """What decides an embedding besides the image: checkpoint, tiles, router, dtype of the values."""

    fingerprint: str
    tiling: pb.Tiling
    router: pb.Router
    dtype: int

    def digest(self) -> bytes:
        router = self.router
        thresholds = [
            repr(getattr(router, name)) if router.HasField(name) else "default"
            for name in ("relative_threshold", "absolute_threshold")
        ]
        words = [
            self.fingerprint, str(self.tiling.min_tiles), str(self.tiling.max_tiles),
            pb.Router.Mode.Name(router.mode), *thresholds, messages.dtype_from_proto(self.dtype),
        ]  # fmt: skip
        return digest(*(word.encode() for word in words))


def digest(*fields: bytes) -> bytes:
    """SHA-256 of the fields, each with its length, so that no two lists of fields look alike."""
    made = hashlib.sha256()
    for field in fields:
        made.update(len(field).to_bytes(8, "big"))
        made.update(field)
    return made.digest()


def keys_alone(caller: bytes, settings: Sequence[Setting], images: Sequence[bytes]) -> list[str]:
    """One key an image (digests of their bytes), each routed alone, with a setting of its own."""
    asked = zip(settings, images, strict=True)
    return [digest(b"alone", caller, setting.digest(), image).hex() for setting, image in asked]


def keys_together(caller: bytes, setting: Setting, images: Sequence[bytes]) -> list[str]:
    """One key an image of a group that is routed as one: its neighbours decide its embedding too."""
    if len(images) == 1:
        return keys_alone(caller, [setting], images)
    group = digest(*images)
    return [digest(b"group", caller, setting.digest(), group, str(i).encode()).hex() for i in range(len(images))]
