"""Images for tests: files decoded in this process, and decoders with processes of their own."""

import contextlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from common.decoder_processes import DecoderProcesses
from common.metrics import DecoderMetrics
from common.tiling import Tiling
from vision_worker.preprocessing import image_decoder
from vision_worker.preprocessing.decoding import decode
from vision_worker.preprocessing.image_decoder import ImageDecoder
from vision_worker.preprocessing.tiling import Tiles, cut

MAX_PIXELS = 64_000_000


def pixels(data: bytes) -> npt.NDArray[np.uint8]:
    """Return the pixels of a file, [height, width, 3]."""
    return np.asarray(decode(data, MAX_PIXELS))


def cut_file(data: bytes, tiling: Tiling) -> Tiles:
    """Decode a file and cut the image."""
    return cut(pixels(data), tiling)


@contextlib.contextmanager
def start_image_decoder(
    metrics: DecoderMetrics, timeout: float = 20, max_pixels: int = MAX_PIXELS, memory_bytes: int = 2 << 30
) -> Iterator[tuple[ImageDecoder, DecoderProcesses]]:
    """Yield a decoder and its processes, which end with the block."""
    with DecoderProcesses(image_decoder.KIND, memory_bytes, metrics) as processes:
        yield ImageDecoder(processes, timeout, max_pixels), processes
