"""A video file to a few of its frames, chosen as InternVL's own code chooses them; each frame is then an image of one tile.

FFmpeg, through PyAV, reads what strangers send. So the container is told by its first bytes, and FFmpeg is told which it is:
left to guess, it would also open playlists, which name other files and addresses.
"""

import io
import time
from collections.abc import Iterator
from fractions import Fraction

import av
import av.error
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from common import errors

CONTAINERS = {"mp4": (4, b"ftyp", "mov"), "webm or mkv": (0, b"\x1a\x45\xdf\xa3", "matroska"), "avi": (8, b"AVI ", "avi")}
"""Name, and where which bytes tell it; what FFmpeg calls it."""
_NEAR = 4.0
"""Seconds ahead that are decoded rather than looked for: a jump goes to the key frame before, which may be as far."""


def frames(data: bytes, count: int, max_pixels: int, seconds: float) -> list[bytes]:
    """`count` frames as PNG files, in order; fewer where the video has fewer. Any thread; takes at most some `seconds`.

    Raises `InvalidVideo`, `ImageTooLarge`, `DeadlineExceeded`.
    """
    until = time.monotonic() + seconds
    try:
        with av.open(io.BytesIO(data), "r", format=_container(data), metadata_errors="ignore") as opened:
            if not opened.streams.video:
                raise errors.InvalidVideo("the video has no pictures, only sound or text")
            stream = opened.streams.video[0]
            if stream.codec_context is None:  # whatever its types say
                raise errors.InvalidVideo("the video's codec is not decoded here: send H.264, VP9 or AV1")
            _check_size(stream.width, stream.height, max_pixels)
            total = _total(opened, stream, until)
            found = [_png(frame, max_pixels) for frame in _at(opened, stream, chosen(total, min(count, total)), until)]
    except (av.error.FFmpegError, ValueError, LookupError, OverflowError) as error:
        raise errors.InvalidVideo(f"{len(data)} bytes of video cannot be read: {type(error).__name__}") from None
    if not found:
        raise errors.InvalidVideo("the video has no picture that can be decoded")
    return found


def chosen(total: int, count: int) -> list[int]:
    """Numbers of the frames: the middle of each of `count` parts (`get_index` of the official model card's example)."""
    part = (total - 1) / count
    return [int(part / 2 + round(part * i)) for i in range(count)]


def _container(data: bytes) -> str:
    for at, magic, name in CONTAINERS.values():
        if data[at : at + len(magic)] == magic:
            return name
    raise errors.InvalidVideo(f"{len(data)} bytes that are no video in a format served here: {', '.join(CONTAINERS)}")


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if not width or not height:
        raise errors.InvalidVideo("the video does not say how large its pictures are")
    if width * height > max_pixels:
        raise errors.ImageTooLarge(f"video of {width} × {height} pixels; at most {max_pixels} are accepted: shrink it")


def _rate(stream: VideoStream) -> Fraction:
    return stream.average_rate or stream.guessed_rate or Fraction(25)


def _total(opened: InputContainer, stream: VideoStream, until: float) -> int:
    """Frames: counted by their packets, since headers lie or say nothing; nothing is decoded for it."""
    total = 0
    for packet in opened.demux(stream):
        total += packet.size > 0
        _in_time(until)
    if not total:
        raise errors.InvalidVideo("the video has no frames")
    opened.seek(0)
    return total


def _at(opened: InputContainer, stream: VideoStream, numbers: list[int], until: float) -> Iterator[VideoFrame]:
    """The frames of these numbers, at the times that an even rate gives them; the last one there is for any beyond the end."""
    begins = float((stream.start_time or 0) * stream.time_base) if stream.time_base else 0.0
    rate = float(_rate(stream))
    last: VideoFrame | None = None
    decoded = opened.decode(stream)
    for number in numbers:
        wanted = begins + number / rate
        if last is not None and last.time is not None and wanted - last.time > _NEAR and stream.time_base:
            opened.seek(int(wanted / stream.time_base), stream=stream)
            decoded = opened.decode(stream)
        for frame in decoded:
            _in_time(until)
            last = frame
            if frame.time is None or frame.time >= wanted - 0.5 / rate:
                break
        if last is not None:
            yield last


def _in_time(until: float) -> None:
    if time.monotonic() > until:
        raise errors.DeadlineExceeded("the video took too long to decode: send a shorter or smaller one")


def _png(frame: VideoFrame, max_pixels: int) -> bytes:
    _check_size(frame.width, frame.height, max_pixels)  # a stream may change its size as it goes
    file = io.BytesIO()
    frame.to_image().save(file, "PNG", compress_level=1)  # type: ignore[no-untyped-call]
    return file.getvalue()
