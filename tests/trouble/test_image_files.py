"""Image files that every viewer shows are served, also where Pillow clips or rejects them; damaged ones are rejected."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.server.fakes.requests import image_part, text_part
from tests.server.fakes.stack import Stack
from tests.trouble.media_stack import DATA, TROUBLE, RecordingEncoder

GOLDEN = DATA / "golden/images"
MediaStack = tuple[Stack, RecordingEncoder]


def chunk(name: bytes, data: bytes, crc_error: int = 0) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data) ^ crc_error)


def with_chunk(file: bytes, added: bytes, before: bytes = b"IDAT") -> bytes:
    """Returns a PNG file with a chunk inserted before the first one of this name."""
    position = file.index(before) - 4
    return file[:position] + added + file[position:]


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


SQUARE = (GOLDEN / "square.png").read_bytes()
JPEG = (GOLDEN / "hd_1920x1080.jpg").read_bytes()
LARGE_TEXT = b"Comment\0\0" + zlib.compress(bytes(5 << 20))


async def served_pixels(media_stack: MediaStack, file: bytes) -> Any:
    """Returns the tiles of an image after a request with it was served."""
    stack, encoder = media_stack
    encoder.tiles.clear()
    response = await stack.chat(image_part(file), text_part("what is it?"))
    assert response.status == 200, response.body
    return encoder.tiles[-1].pixels


async def test_16_bit_grey_has_the_pixels_of_8_bit_grey(media_stack: MediaStack) -> None:
    deep = await served_pixels(media_stack, (TROUBLE / "B01a_16bit.png").read_bytes())
    plain = await served_pixels(media_stack, (TROUBLE / "B01a_8bit.png").read_bytes())
    assert np.abs(deep.astype(int) - plain).max() <= 1
    assert plain.max() < 255


REPAIRED = {
    "bad checksum of a text": ((TROUBLE / "B09j_bad_ancillary_crc.png").read_bytes(), None),
    "compressed text before the pixels": ((TROUBLE / "B44d_ztxt_2.6MB_before.png").read_bytes(), None),
    "compressed text after the pixels": ((TROUBLE / "B44e_ztxt_2.6MB_after.png").read_bytes(), None),
    "compressed international text": ((TROUBLE / "B44g_itxt_2.6MB.png").read_bytes(), None),
    "colour profile": ((TROUBLE / "B44h_icc_1.5MB.png").read_bytes(), None),
    "many large texts": (with_chunk(SQUARE, chunk(b"zTXt", LARGE_TEXT) * 20), SQUARE),
    "large text after the pixels": (with_chunk(SQUARE, chunk(b"zTXt", LARGE_TEXT), b"IEND"), SQUARE),
    "large text and bad checksum": (
        with_chunk(SQUARE, chunk(b"zTXt", LARGE_TEXT) + chunk(b"tIME", bytes(7), crc_error=1)), SQUARE
    ),
    "bad checksum of a private chunk": (with_chunk(SQUARE, chunk(b"abCd", b"x", crc_error=1)), SQUARE),
    "JPEG without end marker": (JPEG[:-2], JPEG),
    "JPEG with half an end marker": (JPEG[:-1], JPEG),
}  # fmt: skip


@pytest.mark.parametrize(("file", "intact"), REPAIRED.values(), ids=REPAIRED)
async def test_a_file_that_viewers_show_is_served(media_stack: MediaStack, file: bytes, intact: bytes | None) -> None:
    pixels = await served_pixels(media_stack, file)
    if intact is None:
        assert pixels.std() > 10
    else:
        assert np.array_equal(pixels, await served_pixels(media_stack, intact))


async def test_a_jpeg_that_lacks_only_its_end_marker_is_served(media_stack: MediaStack) -> None:
    file = (TROUBLE / "B09b_no_eoi.jpg").read_bytes()
    assert np.array_equal(await served_pixels(media_stack, file), await served_pixels(media_stack, file + b"\xff\xd9"))


DAMAGED = {
    "truncated JPEG": (JPEG[: len(JPEG) // 2], "truncated"),
    "JPEG without its last 100 bytes": (JPEG[:-100], "truncated"),
    "truncated PNG": (SQUARE[:-3000], "truncated"),
    "bad checksum of the header": (SQUARE[:29] + b"\0\0\0\0" + SQUARE[33:], "IHDR has a wrong checksum"),
    "bad checksum of the header and a large text": (
        with_chunk(SQUARE[:29] + b"\0\0\0\0" + SQUARE[33:], chunk(b"zTXt", LARGE_TEXT)), "IHDR has a wrong checksum"
    ),
    "only the magic of PNG": (b"\x89PNG\r\n\x1a\n", "damaged PNG"),
    "text": (b"hello", "not an image in a supported format: PNG, JPEG"),
}  # fmt: skip


@pytest.mark.parametrize(("file", "reason"), DAMAGED.values(), ids=DAMAGED)
async def test_a_damaged_file_is_rejected_with_the_reason_and_its_place(
    media_stack: MediaStack, file: bytes, reason: str
) -> None:
    stack, _ = media_stack
    response = await stack.chat(text_part("a"), image_part(SQUARE), image_part(file))
    assert (response.status, response.error["code"]) == (400, "invalid_image")
    assert response.error["param"] == "messages[0].content[2]"
    assert response.error["message"].startswith("messages[0].content[2]: ")
    assert reason in response.error["message"]
    assert len(response.error["message"]) < 400
