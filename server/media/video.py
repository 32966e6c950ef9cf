"""Sampling of video frames, as the official InternVL code samples them. Each frame becomes an image of one tile.

FFmpeg (through PyAV) reads untrusted files, and so this module runs in a decoder process only: `video_decoder.py` starts
`python -m server.media.video`. The container is detected from the first bytes and named to FFmpeg: its own detection would also
accept playlists, which refer to other files and addresses. Only the decoders in `CODECS` are opened.
"""

import io
import struct
from collections.abc import Iterator
from fractions import Fraction
from io import BufferedWriter
from typing import Any

import av
import av.error
from av.container import InputContainer
from av.sidedata.sidedata import Type as SideDataType
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image

from common import errors
from common.decoder_child import serve

CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "mpeg4", "mjpeg"})
"""FFmpeg's names of the decoders that may be opened; `libdav1d` decodes AV1 in software."""

_OPTIONS = {
    "codec_whitelist": ",".join(sorted(CODECS)), "protocol_whitelist": "none",
    "probesize": str(5_000_000), "analyzeduration": str(5_000_000), "max_streams": "100",
}  # fmt: skip
"""FFmpeg's options for opening a file: what it reads to find the streams is bounded in bytes and in microseconds of video."""

CONTAINERS = {"mp4": (4, b"ftyp", "mov"), "webm or mkv": (0, b"\x1a\x45\xdf\xa3", "matroska"), "avi": (8, b"AVI ", "avi")}
"""By name: offset and value of the bytes that identify a container, and FFmpeg's name for it."""
_SEEK_THRESHOLD_SECONDS = 4.0
"""Distance above which the decoder seeks: a seek goes back to a key frame, so it does not help over short distances."""
_Turn = Image.Transpose
_TURNS = {
    (0, 1, -1, 0): _Turn.ROTATE_270, (-1, 0, 0, -1): _Turn.ROTATE_180, (0, -1, 1, 0): _Turn.ROTATE_90,
    (-1, 0, 0, 1): _Turn.FLIP_LEFT_RIGHT, (1, 0, 0, -1): _Turn.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): _Turn.TRANSPOSE, (0, -1, -1, 0): _Turn.TRANSVERSE,
}  # fmt: skip
"""How a frame is turned, by the linear part of its display matrix: x' = ax + cy, y' = bx + dy. Pillow turns to the left."""


def sample_frames(data: bytes, count: int, max_pixels: int) -> Iterator[bytes]:
    """Sample frames of a video.

    Args:
        data: The video file.
        count: Number of frames; a shorter video gives fewer.
        max_pixels: Maximum number of pixels of a frame.

    Yields:
        The frames as PNG files, in order.

    Raises:
        InvalidVideo: The file cannot be decoded.
        ImageTooLarge: A frame has too many pixels.
    """
    frame = None
    try:
        with av.open(
            io.BytesIO(data), "r", format=_detect_container(data), options=_OPTIONS, metadata_errors="ignore"
        ) as container:
            stream = _video_stream(container)
            _check_size(stream.width, stream.height, max_pixels)
            total = _count_frames(container, stream)
            for frame in _decode_at(container, stream, frame_indices(total, min(count, total))):
                yield _encode_png(frame, max_pixels)
    except MemoryError:  # FFmpeg's too
        raise
    except (av.error.FFmpegError, ValueError, LookupError, OverflowError) as error:
        raise errors.InvalidVideo(f"The video ({len(data)} bytes) cannot be decoded: {type(error).__name__}.") from None
    if frame is None:
        raise errors.InvalidVideo("The video has no frame that can be decoded.")


def frame_indices(total: int, count: int) -> list[int]:
    """Return the indices of the middle frames of `count` equal segments (`get_index` in the official model card)."""
    segment = (total - 1) / count
    return [int(segment / 2 + round(segment * i)) for i in range(count)]


def _detect_container(data: bytes) -> str:
    for offset, magic, name in CONTAINERS.values():
        if data[offset : offset + len(magic)] == magic:
            return name
    raise errors.InvalidVideo(f"The file ({len(data)} bytes) is not a video in a supported container: {', '.join(CONTAINERS)}.")


def _video_stream(container: InputContainer) -> VideoStream:
    if not container.streams.video:
        raise errors.InvalidVideo("The file has no video stream.")
    stream = container.streams.video[0]
    if stream.codec_context is None or stream.codec_context.name not in CODECS:  # None despite PyAV's type hints
        raise errors.InvalidVideo("The codec of the video is not supported: send H.264, H.265, VP8, VP9 or AV1.")
    return stream


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if not width or not height:
        raise errors.InvalidVideo("The video has no frame size.")
    if width * height > max_pixels:
        raise errors.ImageTooLarge(
            f"The video has {width} × {height} pixels; the maximum is {max_pixels} (--max-image-pixels)."
        )


def _frame_rate(stream: VideoStream) -> Fraction:
    return stream.average_rate or stream.guessed_rate or Fraction(25)


def _count_frames(container: InputContainer, stream: VideoStream) -> int:
    """Count frames by their packets, since headers may be missing or wrong. Nothing is decoded."""
    total = 0
    for packet in container.demux(stream):
        total += packet.size > 0
    if not total:
        raise errors.InvalidVideo("The video has no frames.")
    container.seek(0)
    return total


def _decode_at(container: InputContainer, stream: VideoStream, indices: list[int]) -> Iterator[VideoFrame]:
    """Yield the frames at `indices`, located by time at a constant rate; the last frame stands for any beyond the end."""
    start_time = float((stream.start_time or 0) * stream.time_base) if stream.time_base else 0.0
    rate = float(_frame_rate(stream))
    last: VideoFrame | None = None
    decoded = container.decode(stream)
    for index in indices:
        target = start_time + index / rate
        if last is not None and last.time is not None and target - last.time > _SEEK_THRESHOLD_SECONDS and stream.time_base:
            container.seek(int(target / stream.time_base), stream=stream)
            decoded = container.decode(stream)
        for frame in decoded:
            last = frame
            if frame.time is None or frame.time >= target - 0.5 / rate:
                break
        if last is not None:
            yield last


def _encode_png(frame: VideoFrame, max_pixels: int) -> bytes:
    _check_size(frame.width, frame.height, max_pixels)  # the size may change within a stream
    file, image, turn = io.BytesIO(), frame.to_image(), _turn(frame)  # type: ignore[no-untyped-call]
    (image if turn is None else image.transpose(turn)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _turn(frame: VideoFrame) -> Image.Transpose | None:
    """Return how the frame must be turned to be upright: phones store what the sensor sees, and a display matrix."""
    side_data: Any = frame.side_data  # PyAV declares a type without this key
    try:
        matrix = side_data[SideDataType.DISPLAYMATRIX]
    except KeyError:
        return None
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))  # fixed-point numbers with 16 fractional bits
    return _TURNS.get((round(a / 65536), round(b / 65536), round(c / 65536), round(d / 65536)))


def _serve_call(arguments: dict[str, Any], data: bytes, output: BufferedWriter) -> dict[str, Any]:
    """Sample frames for another process: the output is one PNG file after the other."""
    frames = sample_frames(data, arguments["count"], arguments["max_pixels"])
    return {"sizes": [output.write(frame) for frame in frames]}


if __name__ == "__main__":
    Image.preinit()
    serve(_serve_call)
