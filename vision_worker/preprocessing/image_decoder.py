"""Decodes images in processes of their own, which have limits: the files are hostile input."""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from common import errors
from common.decoder_processes import Call, DecoderKind, DecoderProcesses, Result
from common.image_header import inspect_image

KIND = DecoderKind("vision_worker.preprocessing.decoding", "image", errors.InvalidImage)

_MIN_CPU_SECONDS = 2.0
"""CPU time that every image may take: repairs of a file, and metadata, cost time whatever its number of pixels."""

_CHANNELS = 3

T = TypeVar("T")


class ImageDecoder:
    """Decodes images. Thread-safe.

    Args:
        processes: run what `KIND` names.
        timeout: CPU time in seconds that an image of `max_pixels` pixels may take; smaller ones have less.
        max_pixels: maximum number of pixels of an image.
    """

    def __init__(self, processes: DecoderProcesses, timeout: float, max_pixels: int) -> None:
        self._processes, self._timeout, self._max_pixels = processes, timeout, max_pixels

    def decode(self, data: bytes, use: Callable[[npt.NDArray[np.uint8]], T], call: Call | None = None) -> T:
        """Decode an image file, and return what `use` returns.

        Args:
            data: the file.
            use: gets the pixels, RGB uint8 [height, width, 3], read-only and valid only until it returns.
            call: lets another thread abandon it.

        Raises:
            InvalidImage: the file is damaged or exceeds a limit of CPU time or memory.
            ImageTooLarge: it has too many pixels.
            CancelledError: the call was abandoned.
        """
        width, height = inspect_image(data, self._max_pixels)

        def consume(result: Result, output: memoryview) -> T:
            return use(_pixels(output, int(result["width"]), int(result["height"])))

        arguments = {"max_pixels": self._max_pixels}
        return self._processes.run(arguments, data, self._cpu_seconds(width * height), consume, call)

    def cpu_seconds(self) -> float:
        """Return the CPU time of the processes so far."""
        return self._processes.cpu_seconds()

    def _cpu_seconds(self, pixels: int) -> float:
        return min(self._timeout, max(_MIN_CPU_SECONDS, self._timeout * pixels / self._max_pixels))


def _pixels(output: memoryview, width: int, height: int) -> npt.NDArray[np.uint8]:
    """Return the pixels behind the header of a PPM file."""
    size = width * height * _CHANNELS
    pixels = np.frombuffer(output, np.uint8, offset=len(output) - size)
    return pixels.reshape(height, width, _CHANNELS)
