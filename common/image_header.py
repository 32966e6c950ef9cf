"""Reads the size of an image from the header of its file, in bounded time: no decoder is called, and no loop is without limit.

Gateway and vision worker check files with it before anything is decoded. It follows Pillow where formats are ambiguous, so that
a file that decodes has the size that was read here.
"""

import re
import struct
import zlib
from collections.abc import Callable

from common import errors
from common.image_files import IMAGE_FORMATS, check_size, format_of

MAX_JPEG_SCANS = 64
"""Scans of a JPEG. Encoders write about 10. Each may cost as much as a whole image."""

_MAX_SEGMENTS = 10_000
"""Segments of a JPEG that are examined. Those of the largest metadata are 64 KiB each."""

_MAX_JPEG_GAP_BYTES = 1 << 16
"""Bytes that are skipped between two segments of a JPEG's header; Pillow skips any."""

_MAX_GIF_BLOCKS = 50_000
"""Blocks of metadata before the first image of a GIF, at most 255 bytes each."""

_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xDE}
"""Second bytes of the JPEG markers whose segment has the size of the image."""

_WITH_LENGTH = frozenset({*range(0xC0, 0xD0), *range(0xDA, 0xF0), 0xFE}) - {0xC8}
"""Second bytes of the JPEG markers that a length follows."""

_SOS, _EOI = 0xDA, 0xD9

_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
"""A marker, also within pixels: there, \\xff is data before \\x00, and a restart before \\xd0 to \\xd7."""

Size = tuple[int, int]


class _Damaged(Exception):
    """The reason why the size cannot be read."""


def inspect_image(data: bytes, max_pixels: int) -> Size:
    """Return width and height in pixels, from the file's header. Raises `InvalidImage` or `ImageTooLarge`."""
    if not data:
        raise errors.InvalidImage("The image is empty (0 bytes).")
    name = format_of(data)
    if name is None:
        known = ", ".join(IMAGE_FORMATS)
        raise errors.InvalidImage(f"The file ({len(data)} bytes) is not an image in a supported format: {known}.")
    try:
        width, height = _READERS[name](data)
    except (_Damaged, struct.error, IndexError) as error:
        reason = str(error) if isinstance(error, _Damaged) else "the header is incomplete"
        what = f"The file ({len(data)} bytes) is a damaged {name} image"
        raise errors.InvalidImage(f"{what}: {reason}. Is it complete?") from None
    check_size(width, height, max_pixels)
    return width, height


def check_jpeg_scans(data: bytes) -> None:
    """Check that a JPEG has not so many scans that decoding takes minutes; other files pass. Raises `InvalidImage`.

    Takes time proportional to the size of the file.
    """
    if format_of(data) != "JPEG":
        return
    scans = segments = position = 0
    while (match := _MARKER.search(data, position)) and match[1][0] != _EOI:
        scans += match[1][0] == _SOS
        segments += 1
        if scans > MAX_JPEG_SCANS or segments > _MAX_SEGMENTS:
            what = f"{MAX_JPEG_SCANS} scans" if scans > MAX_JPEG_SCANS else f"{_MAX_SEGMENTS} segments"
            raise errors.InvalidImage(f"The JPEG image ({len(data)} bytes) has more than {what}, the maximum: save it again.")
        position = match.end()
        if match[1][0] in _WITH_LENGTH:
            position += int.from_bytes(data[position : position + 2], "big")


def _png_size(data: bytes) -> Size:
    length, name, width, height = struct.unpack_from(">I4sII", data, 8)
    if (length, name) != (13, b"IHDR"):
        raise _Damaged("the first chunk is not IHDR")
    if zlib.crc32(data[12:29]) != struct.unpack_from(">I", data, 29)[0]:
        raise _Damaged("IHDR has a wrong checksum")
    return width, height


def _jpeg_size(data: bytes) -> Size:
    position, size = 2, None
    for _ in range(_MAX_SEGMENTS):
        match = _MARKER.search(data, position, position + _MAX_JPEG_GAP_BYTES)
        if match is None:
            raise _Damaged("it ends before its pixels")
        marker, position = match[1][0], match.end()
        if marker == _SOS:
            break
        if marker in _SOF:
            height, width = struct.unpack_from(">HH", data, position + 3)
            size = width, height
        if marker in _WITH_LENGTH:
            position += struct.unpack_from(">H", data, position)[0]
    else:
        raise _Damaged(f"more than {_MAX_SEGMENTS} segments precede its pixels")
    if size is None:
        raise _Damaged("it has no size")
    return size


def _gif_size(data: bytes) -> Size:
    """Return the size of the canvas, which the first image may enlarge."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    position = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    for _ in range(_MAX_GIF_BLOCKS):
        kind = data[position]
        if kind == 0x2C:
            left, top, columns, rows = struct.unpack_from("<HHHH", data, position + 1)
            return max(width, left + columns), max(height, top + rows)
        if kind == 0x3B:
            raise _Damaged("it has no image")
        position = _after_extension(data, position) if kind == 0x21 else position + 1
    raise _Damaged(f"more than {_MAX_GIF_BLOCKS} blocks precede its image")


def _after_extension(data: bytes, position: int) -> int:
    """Return the position after the blocks of an extension of a GIF."""
    position += 2
    for _ in range(_MAX_GIF_BLOCKS):
        position += 1 + (length := data[position])
        if not length:
            return position
    raise _Damaged(f"more than {_MAX_GIF_BLOCKS} blocks precede its image")


def _webp_size(data: bytes) -> Size:
    name = data[12:16]
    if name == b"VP8X":
        width, height = (int.from_bytes(data[i : i + 3], "little") for i in (24, 27))
        return width + 1, height + 1
    if name == b"VP8L" and data[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if name == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise _Damaged("its first chunk has no size")


def _bmp_size(data: bytes) -> Size:
    (header_size,) = struct.unpack_from("<I", data, 14)
    if header_size == 12:
        width, height = struct.unpack_from("<HH", data, 18)
    else:
        width, height = struct.unpack_from("<Ii", data, 18)  # negative: rows from top to bottom
    return width, abs(height)


_READERS: dict[str, Callable[[bytes], Size]] = {
    "PNG": _png_size, "JPEG": _jpeg_size, "GIF": _gif_size, "WEBP": _webp_size, "BMP": _bmp_size,
}  # fmt: skip
