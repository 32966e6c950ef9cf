"""An image file's bytes cut into tiles, exactly as the official implementation cuts them.

No EXIF rotation, alpha is dropped and not blended, Pillow's bicubic filter. Runs in any thread, before the device.
"""

import io
import time
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from common import errors
from common.options import IMAGE_FORMATS
from common.tiling import Tiling, has_thumbnail, select_grid
from vision_worker.preprocessing.resampling import resized

Image.MAX_IMAGE_PIXELS = None  # Pillow's own guard only warns up to twice its limit; `_open` checks ours from the header


@dataclass(frozen=True)
class Tiles:
    """One image: `pixels` uint8 [n, side, side, 3] row by row, thumbnail last; `hashes` tell equal tiles, one a tile.

    They are this process's own hashes of 64 bits, five times as quick as a digest for the world, and compared within one call.
    `decoding` and `cutting` are the seconds that it took.
    """

    pixels: npt.NDArray[np.uint8]
    columns: int
    rows: int
    hashes: tuple[int, ...]
    decoding: float = 0.0
    cutting: float = 0.0

    def __len__(self) -> int:
        return len(self.pixels)


def cut(data: bytes, tiling: Tiling) -> Tiles:
    """Decode, resize and cut. Raises `InvalidImage` or `ImageTooLarge`."""
    began = time.monotonic()
    image = _decode(data, tiling.max_pixels)
    decoded = time.monotonic()
    tiles = cut_image(image, tiling)
    return replace(tiles, decoding=decoded - began, cutting=time.monotonic() - decoded)


def cut_image(image: Image.Image, tiling: Tiling) -> Tiles:
    """Resize and cut an RGB image."""
    columns, rows = select_grid(image.width, image.height, tiling)
    side = tiling.side
    sizes = [(side * columns, side * rows), *([(side, side)] if has_thumbnail(columns, rows, tiling) else [])]
    whole, *thumbnail = resized(np.asarray(image), sizes)
    tiles = whole.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    pixels = np.concatenate([tiles, *(small[None] for small in thumbnail)])
    return Tiles(pixels, columns, rows, tuple(hash(tile.tobytes()) for tile in pixels))


def _decode(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise errors.InvalidImage("the image is empty: 0 bytes")
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            _check_size(image.width, image.height, max_pixels)
            return image.convert("RGB")
    except errors.DvdError:
        raise
    except UnidentifiedImageError:
        known = ", ".join(IMAGE_FORMATS)
        raise errors.InvalidImage(f"{len(data)} bytes that are not an image in a format served here: {known}") from None
    except MemoryError:
        raise
    except Exception as error:  # whatever a decoder raises on damaged bytes: OSError, SyntaxError, struct.error, …
        raise errors.InvalidImage(f"the image cannot be decoded ({error}); is the file whole?") from None


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise errors.ImageTooLarge(f"image of {width} × {height} pixels; at most {max_pixels} are accepted: shrink it")
    if width * height == 0:
        raise errors.InvalidImage(f"image of {width} × {height} pixels")
