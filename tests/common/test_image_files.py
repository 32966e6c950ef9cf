"""Repairs of image files at the level of bytes."""

import struct
import zlib

import pytest

from common import errors
from common.image_files import check_size, format_of, with_jpeg_end, without_png_metadata

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunk(name: bytes, data: bytes = b"x", crc_error: int = 0) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data) ^ crc_error)


HEAD, PIXELS, END = chunk(b"IHDR"), chunk(b"IDAT", bytes(100)), chunk(b"IEND", b"")
KEPT = {name: chunk(name) for name in (b"tRNS", b"gAMA", b"sRGB", b"PLTE", b"eXIf", b"acTL", b"pHYs")}


@pytest.mark.parametrize("name", [b"tEXt", b"zTXt", b"iTXt", b"iCCP"])
def test_metadata_is_dropped_and_all_else_kept(name: bytes) -> None:
    kept = b"".join(KEPT.values())
    for file in (
        SIGNATURE + HEAD + chunk(name) + kept + PIXELS + END,
        SIGNATURE + HEAD + kept + chunk(name, b"") * 3 + PIXELS + chunk(name, bytes(10_000)) + END,
        SIGNATURE + HEAD + kept + PIXELS + chunk(name, crc_error=1) + END,
    ):
        assert without_png_metadata(file) == SIGNATURE + HEAD + kept + PIXELS + END


@pytest.mark.parametrize("name", KEPT)
def test_a_wrong_checksum_drops_an_ancillary_chunk_only(name: bytes) -> None:
    bad = chunk(name, crc_error=1)
    is_critical = name.isupper()
    repaired = without_png_metadata(SIGNATURE + HEAD + bad + PIXELS + END)
    assert repaired == SIGNATURE + HEAD + bad * is_critical + PIXELS + END


def test_a_file_with_nothing_to_drop_is_unchanged() -> None:
    cut = SIGNATURE + HEAD + chunk(b"tEXt")[:-1]
    for file in (SIGNATURE + HEAD + PIXELS + END, SIGNATURE, b"", b"text", cut, SIGNATURE + b"\xff"):
        assert without_png_metadata(file) == file


def test_what_follows_a_broken_length_is_kept() -> None:
    rest = b"\xff\xff\xff\xfftEXt" + bytes(100)
    assert without_png_metadata(SIGNATURE + chunk(b"tEXt") + rest) == SIGNATURE + rest


def test_the_number_of_chunks_examined_is_bounded() -> None:
    file = SIGNATURE + chunk(b"tEXt", b"") * 1_000_000
    assert len(without_png_metadata(file)) == len(file) - 12 * 100_000


def test_a_jpeg_gets_its_end_marker() -> None:
    for file in (b"\xff\xd8\xff\xe0data", b"\xff\xd8\xff\xe0data\xff"):
        repaired, control = with_jpeg_end(file) or (b"", b"")
        assert repaired == b"\xff\xd8\xff\xe0data\xff\xd9"
        assert control.startswith(b"\xff\xd8\xff\xe0data")
        assert control.endswith(b"\xff\xd9")
        assert len(control) > len(repaired) + 1000
    assert with_jpeg_end(SIGNATURE) is None


def test_formats_are_recognised_by_their_first_bytes() -> None:
    files = {"PNG": SIGNATURE, "JPEG": b"\xff\xd8\xff\xe1", "GIF": b"GIF87a", "WEBP": b"RIFF\0\0\0\0WEBPVP8 ", "BMP": b"BM"}
    assert {format_of(data): data for data in files.values()} == files
    assert [format_of(data) for data in (b"", b"\x89", b"II*\0", b"<svg", b"%PDF")] == [None] * 5


def test_a_size_is_bounded() -> None:
    check_size(10, 10, 100)
    with pytest.raises(errors.ImageTooLarge, match="10 × 11 pixels; the maximum is 100"):
        check_size(10, 11, 100)
    with pytest.raises(errors.InvalidImage, match="0 × 11 pixels"):
        check_size(0, 11, 100)
