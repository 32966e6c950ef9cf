"""Keys of embeddings: a digest over everything that determines the values, and over the caller.

The caller is part of the key so that response times do not reveal which images other callers have sent.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from common import messages
from common.digest import digest
from protos import vision_pb2 as pb


@dataclass(frozen=True)
class EncodeSetting:
    """What determines an embedding besides the image: checkpoint, tiling, router, and dtype of the values."""

    fingerprint: str
    tiling: pb.Tiling
    router: pb.Router
    dtype: int

    def digest(self) -> bytes:
        """Return the SHA-256 digest of the setting."""
        router = self.router
        thresholds = [
            repr(getattr(router, name)) if router.HasField(name) else "default"
            for name in ("relative_threshold", "absolute_threshold")
        ]
        fields = [
            self.fingerprint, str(self.tiling.min_tiles), str(self.tiling.max_tiles),
            pb.Router.Mode.Name(router.mode), *thresholds, messages.dtype_from_proto(self.dtype),
        ]  # fmt: skip
        return digest(*(field.encode() for field in fields))


def image_keys(caller: bytes, settings: Sequence[EncodeSetting], images: Sequence[bytes]) -> list[str]:
    """Return a key for each image, each routed by itself.

    Args:
        caller: Digest of the caller's credentials.
        settings: Setting of each image.
        images: SHA-256 digest of each image file.
    """
    return [digest(b"alone", caller, setting.digest(), image).hex() for setting, image in zip(settings, images, strict=True)]


def group_keys(caller: bytes, setting: EncodeSetting, images: Sequence[bytes]) -> list[str]:
    """Return a key for each image of a group that is routed together: the other images determine its embedding too."""
    if len(images) == 1:
        return image_keys(caller, [setting], images)
    group = digest(*images)
    return [digest(b"group", caller, setting.digest(), group, str(i).encode()).hex() for i in range(len(images))]
