"""Inspection of the headers of image files. No image is decoded to pixels here."""

import io
import warnings

from PIL import Image

from common import errors
from common.image_files import check_size, format_of, without_png_metadata
from common.options import IMAGE_FORMATS

Image.MAX_IMAGE_PIXELS = None  # Pillow only warns up to twice its limit; ours is checked from the header


def inspect_image(data: bytes, max_pixels: int) -> tuple[int, int]:
    """Return width and height in pixels, from the file's header. Raises `InvalidImage` or `ImageTooLarge`."""
    if not data:
        raise errors.InvalidImage("The image is empty (0 bytes).")
    try:
        width, height = _read_size(data)
    except Exception:  # Pillow's parsers raise all kinds of errors on damaged files
        width, height = _read_size_without_metadata(data)
    check_size(width, height, max_pixels)
    return width, height


def _read_size(data: bytes) -> tuple[int, int]:
    with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
        return image.size


def _read_size_without_metadata(data: bytes) -> tuple[int, int]:
    """Return the size of a file that Pillow rejects as it is. Raises `InvalidImage` with the reason."""
    repaired = without_png_metadata(data)
    try:
        return _read_size(repaired)
    except Exception:
        raise errors.InvalidImage(_describe_failure(repaired, len(data))) from None


def _describe_failure(data: bytes, size: int) -> str:
    """Return why a file is rejected, in Pillow's words if the file begins as one of a supported format."""
    name = format_of(data)
    if name is None:
        return f"The file ({size} bytes) is not an image in a supported format: {', '.join(IMAGE_FORMATS)}."
    try:
        Image.OPEN[name][0](io.BytesIO(data), "")
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
    else:
        reason = "the header is incomplete"
    return f"The file ({size} bytes) is a damaged {name} image: {reason}. Is it complete?"
