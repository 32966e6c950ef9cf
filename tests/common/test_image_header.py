"""Headers of image files: supported formats, sizes in pixels, and files that are no images."""

import contextlib
import gzip
import io
import random
import struct
import zlib

import pytest
from PIL import Image

from common import errors
from common.image_files import IMAGE_FORMATS
from common.image_header import inspect_image
from tests.server.fakes.requests import image_file
from tests.server.media.helpers import PNG


@pytest.mark.parametrize("file_format", IMAGE_FORMATS)
def test_all_supported_formats_are_inspected(file_format: str) -> None:
    inspect_image(image_file(file_format=file_format), 64)
    with pytest.raises(errors.ImageTooLarge, match="8 × 8 pixels; the maximum is 63"):
        inspect_image(image_file(file_format=file_format), 63)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def damaged_png(*chunks: bytes) -> bytes:
    """Return a PNG file whose header has a wrong checksum."""
    data = png(8, 8, *chunks)
    return data[:29] + bytes(4) + data[33:]


def save_image(file_format: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, file_format)
    return file.getvalue()


INVALID_FILES = {
    "one byte": b"\x89",
    "text": b"hello",
    "only the magic of PNG": b"\x89PNG\r\n\x1a\n",
    "only the magic of JPEG": b"\xff\xd8\xff",
    "only the magic of GIF": b"GIF89a",
    "only the magic of WebP": b"RIFF\xff\xff\xff\xffWEBP",
    "only the magic of BMP": b"BM",
    "damaged header": PNG[:20] + b"\0\0\0\0" + PNG[24:],
    "PNG whose header has a wrong checksum, with a large text": damaged_png(
        chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(64 << 20)))
    ),
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "PDF": b"%PDF-1.7\n",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "gzip": gzip.compress(PNG),
    "random bytes": random.Random(0).randbytes(10_000),
    **{file_format: save_image(file_format) for file_format in ("TIFF", "ICO", "PPM", "TGA", "PCX", "EPS", "PDF")},
}


@pytest.mark.parametrize("data", INVALID_FILES.values(), ids=INVALID_FILES)
def test_other_files_are_rejected(data: bytes) -> None:
    with pytest.raises(errors.InvalidImage, match=f"{len(data)} bytes"):
        inspect_image(data, 1 << 20)


def test_the_reason_of_a_damaged_file_is_named() -> None:
    for data, reason in (
        (damaged_png(), "damaged PNG image: .*checksum"),
        (b"\xff\xd8\xff", "damaged JPEG image"),
        (b"GIF89a", "damaged GIF image"),
        (b"RIFF\xff\xff\xff\xffWEBP", "damaged WEBP image"),
    ):
        with pytest.raises(errors.InvalidImage, match=reason):
            inspect_image(data, 1 << 20)


@pytest.mark.parametrize("name", [b"zTXt", b"iTXt", b"iCCP"])
def test_large_metadata_does_not_matter(name: bytes) -> None:
    head = b"a\0\x01\0\0\0" if name == b"iTXt" else b"a\0\0"
    assert inspect_image(png(8, 8, chunk(name, head + zlib.compress(bytes(64 << 20)))), 64) == (8, 8)
    assert inspect_image(png(8, 8, chunk(name, head)[:-1] + b"?"), 64) == (8, 8), "a wrong checksum"


def test_an_empty_file_is_rejected() -> None:
    with pytest.raises(errors.InvalidImage, match="0 bytes"):
        inspect_image(b"", 1)


@pytest.mark.parametrize(("width", "height"), [(65_535, 65_535), (20_000, 20_000), (2**31 - 1, 1), (1, 2**31 - 1)])
def test_a_header_with_too_many_pixels_is_rejected_without_decoding(width: int, height: int) -> None:
    with pytest.raises(errors.ImageTooLarge):
        inspect_image(png(width, height), 64_000_000)


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_any_colour_mode_is_accepted(mode: str) -> None:
    inspect_image(image_file(mode=mode), 64)


def test_damaged_files_raise_no_other_errors() -> None:
    rng = random.Random(1)
    for file_format in IMAGE_FORMATS:
        for _ in range(100):
            data = bytearray(image_file(file_format=file_format))
            for _ in range(5):
                data[rng.randrange(len(data))] = rng.randrange(256)
            with contextlib.suppress(errors.InvalidImage, errors.ImageTooLarge):
                inspect_image(bytes(data[: rng.randrange(1, len(data) + 1)]), 64_000_000)
