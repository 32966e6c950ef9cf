"""An image file of a request, with what the gateway needs to know of it."""

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from common.image_header import inspect_image

T = TypeVar("T")

_LARGE_BYTES = 1 << 16
"""Size from which on a file is examined in a thread.

A smaller one takes a fifth of a millisecond, and at most 10 if its header is made to be slow. A thread costs as much, and on a
busy core it has to be scheduled twice.
"""


@dataclass(frozen=True)
class ImageFile:
    """An encoded image file (PNG, JPEG, …), the SHA-256 digest of its bytes, and its width and height in pixels."""

    data: bytes
    digest: bytes
    size: tuple[int, int]

    @classmethod
    def examine(cls, data: bytes, max_pixels: int) -> "ImageFile":
        """Read the header of a file and hash it. Raises `InvalidImage` or `ImageTooLarge`."""
        size = inspect_image(data, max_pixels)
        return cls(data, hashlib.sha256(data).digest(), size)


async def examine(size: int, work: Callable[[], T]) -> T:
    """Return the result of work on files of about `size` bytes, done in a thread if the event loop would notice."""
    return work() if size < _LARGE_BYTES else await asyncio.to_thread(work)
