"""What the gateway and the vision worker both decide about an encoded image file, from its bytes alone.

Both open files with Pillow, which rejects some that every viewer shows. The functions here repair those: metadata of a PNG that
is damaged or larger than Pillow allows, and the missing end marker of a JPEG. Pixels are never changed.
"""

import zlib
from collections.abc import Iterator

from common import errors

_MAGIC = {
    "PNG": (0, b"\x89PNG\r\n\x1a\n"), "JPEG": (0, b"\xff\xd8\xff"), "WEBP": (8, b"WEBP"), "GIF": (0, b"GIF8"),
    "BMP": (0, b"BM"),
}  # fmt: skip
"""By format: offset and value of the bytes that identify it."""

IMAGE_FORMATS = tuple(_MAGIC)
"""Supported image formats, by Pillow's names. The gateway and the vision worker accept the same."""

_PNG_METADATA = frozenset({b"tEXt", b"zTXt", b"iTXt", b"iCCP"})
"""Chunks without influence on the decoded pixels, whose decompressed size Pillow limits."""

_MAX_PNG_CHUNKS = 100_000
"""Chunks that are examined; no encoder writes nearly as many, and a loop over more would hold the GIL for long."""

_JPEG_END = b"\xff\xd9"
_JPEG_JUNK = bytes((0x55, 0xA3, 0x1C, 0xE6, 0x39, 0x92, 0x4D, 0x7B)) * 32
"""Entropy-coded nonsense: a decoder reads it as pixels where pixels are missing."""
_JPEG_RESTARTS = [bytes((0xFF, 0xD0 + i)) for i in range(8)]


def format_of(data: bytes) -> str | None:
    """Return the format of a file by its first bytes, by Pillow's name, or None if it is not a supported one."""
    return next((name for name, (offset, magic) in _MAGIC.items() if data[offset : offset + len(magic)] == magic), None)


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Check the size that a file's header states. Raises `InvalidImage` or `ImageTooLarge`."""
    if width * height > max_pixels:
        raise errors.ImageTooLarge(
            f"The image has {width} × {height} pixels; the maximum is {max_pixels} (--max-image-pixels)."
        )
    if width * height == 0:
        raise errors.InvalidImage(f"The image has {width} × {height} pixels.")


def without_png_metadata(data: bytes) -> bytes:
    """Return a PNG file without texts, without colour profile and without ancillary chunks whose checksum is wrong.

    libpng, the reference decoder, ignores such chunks too. Critical chunks stay, damaged ones included. Other files are
    returned as they are.
    """
    if format_of(data) != "PNG":
        return data
    signature_size = len(_MAGIC["PNG"][1])
    return b"".join((data[:signature_size], *_kept_chunks(memoryview(data), signature_size)))


def _kept_chunks(data: memoryview, start: int) -> Iterator[memoryview]:
    """Yield the bytes from `start` on except those of dropped chunks, in as few pieces as possible."""
    kept_from = position = start
    for _ in range(_MAX_PNG_CHUNKS):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        if end > len(data):
            break
        if _is_dropped(data[position:end]):
            yield data[kept_from:position]
            kept_from = end
        position = end
    yield data[kept_from:]


def _is_dropped(chunk: memoryview) -> bool:
    """Return whether a chunk is metadata or damaged; only ancillary chunks are, which have a lower-case first letter."""
    is_ancillary = chunk[4] & 0x20
    return bool(is_ancillary) and (
        bytes(chunk[4:8]) in _PNG_METADATA or zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big")
    )


def with_jpeg_end(data: bytes) -> tuple[bytes, bytes] | None:
    """Return a JPEG file with an end marker, and the same with nonsense before the marker; None if it is not a JPEG.

    Where only the marker was missing, both have the same pixels. Where pixels are missing too, as in an interrupted
    download, the nonsense stands for them and the pixels differ.
    """
    if format_of(data) != "JPEG":
        return None
    image = data.rstrip(b"\xff")  # half a marker
    return image + _JPEG_END, image + _jpeg_filler(image) + _JPEG_END


def _jpeg_filler(data: bytes) -> bytes:
    """Return nonsense, first as it is and then behind the restart markers that would follow."""
    positions = [data.rfind(marker) for marker in _JPEG_RESTARTS]
    following = (positions.index(max(positions)) + 1) % 8 if max(positions) > 0 else 0
    markers = _JPEG_RESTARTS[following:] + _JPEG_RESTARTS[:following]
    return _JPEG_JUNK + b"".join(marker + _JPEG_JUNK for marker in markers)
