"""Decoding of image files: modes, and files that Pillow clips or rejects."""

import io
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image, ImageFile

from common import errors
from tests.vision_worker import golden
from vision_worker.preprocessing.decoding import decode

MAX_PIXELS = 4_000_000
JPEG = golden.image("tie_1250x1000.jpg")
SMALL = Image.open(io.BytesIO(JPEG)).convert("RGB").resize((313, 250))


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def grey_16(values: Any) -> bytes:
    return encode(Image.fromarray(np.array(values, np.uint16)))


def test_16_bit_greys_keep_their_high_byte() -> None:
    values = np.arange(65_536, dtype=np.uint16).reshape(256, 256)
    decoded = np.asarray(decode(grey_16(values), MAX_PIXELS))
    assert (decoded == (values >> 8)[..., None]).all()


def test_16_bit_greys_have_the_values_of_16_bit_colours() -> None:
    """Pillow reads 16-bit colours, and greys with alpha, as their high bytes."""
    assert {tuple(pixel) for pixel in np.asarray(decode(grey_16([[0, 255, 256, 65_535]]), MAX_PIXELS))[0]} == {
        (0, 0, 0), (1, 1, 1), (255, 255, 255),
    }  # fmt: skip


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_other_modes_are_converted_as_pillow_does(mode: str) -> None:
    file = encode(Image.radial_gradient("L").convert(mode))
    assert decode(file, MAX_PIXELS).tobytes() == Image.open(io.BytesIO(file)).convert("RGB").tobytes()


@pytest.mark.parametrize("name", ["square.png", "palette_512x512.png", "rgba_700x500.png", "tie_1250x1000.jpg"])
def test_intact_files_are_decoded_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Mock(side_effect=Image.open)
    monkeypatch.setattr(Image, "open", opened)
    decode(golden.image(name), MAX_PIXELS)
    opened.assert_called_once()


JPEGS = {
    "baseline": encode(SMALL, "JPEG", quality=90),
    "progressive": encode(SMALL, "JPEG", progressive=True),
    "grey": encode(SMALL.convert("L"), "JPEG"),
    "CMYK": encode(SMALL.convert("CMYK"), "JPEG"),
    "restart markers": encode(SMALL, "JPEG", restart_marker_rows=1),
    "restart markers everywhere": encode(SMALL, "JPEG", restart_marker_blocks=1),
}


@pytest.mark.parametrize("file", JPEGS.values(), ids=JPEGS)
def test_a_jpeg_without_end_marker_is_decoded(file: bytes) -> None:
    assert file.endswith(b"\xff\xd9")
    for cut in (1, 2):
        assert decode(file[:-cut], MAX_PIXELS).tobytes() == decode(file, MAX_PIXELS).tobytes()


@pytest.mark.parametrize("file", JPEGS.values(), ids=JPEGS)
def test_a_truncated_jpeg_is_rejected(file: bytes) -> None:
    for cut in (*range(10, 30), 100, 1000, len(file) // 2):
        with pytest.raises(errors.InvalidImage, match="truncated"):
            decode(file[:-cut], MAX_PIXELS)


def test_a_jpeg_that_is_cut_between_restart_markers_is_rejected() -> None:
    file = JPEGS["restart markers everywhere"]
    positions = [i for i in range(len(file) // 2, len(file)) if file[i] == 0xFF and 0xD0 <= file[i + 1] <= 0xD7]
    for position in [*positions[:: len(positions) // 4], *positions[-9:]]:
        with pytest.raises(errors.InvalidImage, match="truncated"):
            decode(file[:position], MAX_PIXELS)


def test_pillows_global_tolerance_is_off() -> None:
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "BMP", "PNG"])
def test_other_truncated_files_are_rejected(kind: str) -> None:
    file = encode(SMALL.resize((64, 64)), kind)
    with pytest.raises(errors.InvalidImage):
        decode(file[: len(file) // 2], MAX_PIXELS)


def test_a_file_in_no_supported_format_is_rejected() -> None:
    for file in (b"", b"hello", encode(SMALL, "TIFF")):
        with pytest.raises(errors.InvalidImage, match=f"{len(file)} bytes"):
            decode(file, MAX_PIXELS)
    with pytest.raises(errors.ImageTooLarge, match="1250 × 1000 pixels; the maximum is 1000"):
        decode(JPEG, 1000)
