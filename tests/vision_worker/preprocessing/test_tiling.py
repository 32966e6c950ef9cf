"""Decoding and cutting image files into tiles."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from common import errors
from common.tiling import Tiling
from tests.vision_worker import golden
from tests.vision_worker.images import cut_file

TILING = Tiling(min_tiles=1, max_tiles=12, thumbnail=True)


def image_file(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def decompression_bomb(width: int, height: int) -> bytes:
    """A PNG whose header claims more pixels than its data has."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_mode_of_png_is_decoded(mode: str) -> None:
    image = Image.new(mode, (60, 50))
    assert cut_file(image_file(image), TILING).pixels.dtype == np.uint8


@pytest.mark.parametrize(("mode", "kind"), [("CMYK", "JPEG"), ("L", "JPEG"), ("RGB", "WEBP"), ("P", "GIF"), ("RGB", "BMP")])
def test_other_supported_formats_are_decoded(mode: str, kind: str) -> None:
    assert len(cut_file(image_file(Image.new(mode, (448, 448)), kind), TILING)) == 1


def test_alpha_is_dropped_and_not_blended() -> None:
    tiles = cut_file(image_file(Image.new("RGBA", (448, 448), (200, 10, 30, 0))), TILING)
    assert (tiles.pixels == (200, 10, 30)).all()


def test_exif_orientation_is_ignored() -> None:
    image = Image.new("RGB", (900, 450))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    tiles = cut_file(buffer.getvalue(), TILING)
    assert (tiles.columns, tiles.rows) == (2, 1)


def test_tiles_are_cut_row_by_row_with_the_thumbnail_last() -> None:
    image = Image.new("RGB", (896, 1344))
    for i, (x, y) in enumerate((x, y) for y in range(3) for x in range(2)):
        image.paste((40 * i, 0, 0), (448 * x, 448 * y, 448 * (x + 1), 448 * (y + 1)))
    tiles = cut_file(image_file(image), TILING)
    assert [int(tile[224, 224, 0]) for tile in tiles.pixels[:6]] == [0, 40, 80, 120, 160, 200]
    assert tiles.pixels.shape == (7, 448, 448, 3)
    assert len(cut_file(image_file(image), Tiling(1, 12, thumbnail=False))) == 6


def test_equal_tiles_have_equal_hashes() -> None:
    tiles = cut_file(golden.image("blank_1344x896.png"), TILING)
    assert len(tiles) == 7
    assert len(set(tiles.hashes)) == len({tile.tobytes() for tile in tiles.pixels})


@pytest.mark.parametrize(
    "data",
    [
        b"", b"hello, this is text", b"%PDF-1.7", b"\x89PNG\r\n\x1a\n", golden.image("square.png")[:-3000],
        golden.image("hd_1920x1080.jpg")[:50_000], golden.image("hd_1920x1080.jpg")[:300],
        decompression_bomb(100, 100), decompression_bomb(0, 100),
    ],
    ids=["empty", "text", "pdf", "signature", "cut-png", "cut-jpeg", "cut-header", "no-data", "no-width"],
)  # fmt: skip
def test_incomplete_images_are_rejected(data: bytes) -> None:
    with pytest.raises(errors.InvalidImage):
        cut_file(data, TILING)


def test_unsupported_formats_of_pillow_are_rejected() -> None:
    with pytest.raises(errors.InvalidImage, match="PNG, JPEG"):
        cut_file(image_file(Image.new("RGB", (10, 10)), "TIFF"), TILING)


@pytest.mark.parametrize("size", [(8001, 8000), (200_000, 200_000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_rejected_before_it_is_decoded(size: tuple[int, int]) -> None:
    with pytest.raises(errors.ImageTooLarge, match="64000000"):
        cut_file(decompression_bomb(*size), TILING)
