"""Decodes image files to RGB as the official implementation does, and files that Pillow rejects as image viewers do.

EXIF rotation is ignored and alpha is dropped without blending. `python -m vision_worker.preprocessing.decoding` is a decoder
process, see `image_decoder.py`; only there may files of callers be decoded.
"""

import io
import warnings
from io import BufferedWriter
from typing import Any

from PIL import Image, ImageChops, PpmImagePlugin, UnidentifiedImageError

from common import errors
from common.decoder_child import serve
from common.image_files import IMAGE_FORMATS, check_size, with_jpeg_end, without_png_metadata
from common.image_header import check_jpeg_scans

Image.MAX_IMAGE_PIXELS = None  # Pillow only warns up to twice its limit; `check_size` checks ours from the file's header


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """Decode an image file to RGB. Raises: InvalidImage, ImageTooLarge."""
    if not data:
        raise errors.InvalidImage("The image is empty (0 bytes).")
    check_jpeg_scans(data)
    try:
        return _decode(data, max_pixels)
    except (errors.DvdError, MemoryError):
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and others on damaged bytes
        return _decode_repaired(data, max_pixels, error)


def _decode(data: bytes, max_pixels: int) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
        check_size(image.width, image.height, max_pixels)
        return _to_rgb(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB. Of 16-bit greys the high byte counts, as in Pillow of 16-bit colours; it would clip greys to white."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = image.convert("I").tobytes()  # 32 bits in the machine's order, which is little-endian
        image = Image.frombytes("L", image.size, values[1::4])
    return image.convert("RGB")


def _decode_repaired(data: bytes, max_pixels: int, failure: Exception) -> Image.Image:
    """Decode a file that failed to decode as it is. Raises `InvalidImage` with the reason if it is really damaged."""
    repaired, *control = with_jpeg_end(data) or (without_png_metadata(data),)
    if repaired == data:
        raise _invalid(data, failure) from None
    try:
        image = _decode(repaired, max_pixels)
        if all(_are_equal(image, _decode(other, max_pixels)) for other in control):
            return image
    except (errors.DvdError, MemoryError):
        raise
    except Exception as error:
        raise _invalid(data, error) from None
    raise _invalid(data, failure) from None


def _are_equal(image: Image.Image, other: Image.Image) -> bool:
    return image.size == other.size and ImageChops.difference(image, other).getbbox() is None


def _invalid(data: bytes, error: Exception) -> errors.InvalidImage:
    if isinstance(error, UnidentifiedImageError):
        known = ", ".join(IMAGE_FORMATS)
        return errors.InvalidImage(f"The file ({len(data)} bytes) is not an image in a supported format: {known}.")
    reason = " ".join(str(error).split())[:200]
    return errors.InvalidImage(f"The image ({len(data)} bytes) cannot be decoded: {reason}. Is the file complete?")


def _serve_call(arguments: dict[str, Any], data: bytes, output: BufferedWriter) -> dict[str, Any]:
    """Decode an image for another process: the output is a PPM file, which Pillow writes without a copy of the pixels."""
    image = decode(data, arguments["max_pixels"])
    image.save(output, PpmImagePlugin.PpmImageFile.format)
    return {"width": image.width, "height": image.height}


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of Pillow about metadata, which nobody would read
    Image.preinit()
    serve(_serve_call)
