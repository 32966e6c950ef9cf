"""Samples frames of videos in processes of their own, which have limits: FFmpeg never runs in the gateway."""

import asyncio
import functools
from concurrent.futures import ThreadPoolExecutor

from common import errors
from common.decoder_processes import ABANDON_SECONDS, Call, DecoderKind, DecoderProcesses, Result
from common.metrics import DecoderMetrics
from server.config import ServingOptions

KIND = DecoderKind("server.media.video", "video", errors.InvalidVideo)

_PROCESSES = 2
"""Videos that are decoded at a time; each process has FFmpeg's threads."""


class VideoDecoder:
    """Samples frames of videos: `with VideoDecoder(options, metrics) as decoder`. On leaving, its processes end.

    Args:
        options: Options of the gateway.
        metrics: Counters and histograms to update.
    """

    def __init__(self, options: ServingOptions, metrics: DecoderMetrics) -> None:
        self._timeout, self._max_pixels = options.decode_timeout, options.max_image_pixels
        # not the event loop's own threads: a few long videos would delay the images of all requests
        self._threads = ThreadPoolExecutor(_PROCESSES, "video")
        self._processes = DecoderProcesses(KIND, options.decode_memory, metrics)

    def __enter__(self) -> "VideoDecoder":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._processes.__exit__()

    @property
    def pids(self) -> list[int]:
        """Ids of the decoder processes."""
        return self._processes.pids

    async def sample_frames(self, data: bytes, count: int) -> list[bytes]:
        """Sample frames of a video. If this task is cancelled, its process ends soon.

        Args:
            data: The video file.
            count: Number of frames; a shorter video gives fewer.

        Returns:
            The frames as PNG files, in order.

        Raises:
            InvalidVideo: The file cannot be decoded, or exceeds a limit of CPU time or memory.
            ImageTooLarge: A frame has too many pixels.
        """
        call, loop = Call(), asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._threads, functools.partial(self._run, data, count, call))
        except asyncio.CancelledError:
            loop.call_later(ABANDON_SECONDS, call.abandon)
            raise

    def _run(self, data: bytes, count: int, call: Call) -> list[bytes]:
        arguments = {"count": count, "max_pixels": self._max_pixels}
        return self._processes.run(arguments, data, self._timeout, _split, call)


def _split(result: Result, output: memoryview) -> list[bytes]:
    """Return the files that were written one after the other."""
    frames, position = [], 0
    for size in result["sizes"]:
        frames.append(bytes(output[position : position + size]))
        position += size
    return frames
