"""Real videos, encoded by the tests. Each frame shows its index in binary as eight upright stripes."""

import io
from fractions import Fraction

import av
import numpy as np
from PIL import Image


def encode_video(
    container: str,
    codec: str,
    count: int,
    rate: int = 10,
    size: tuple[int, int] = (64, 48),
    key_frame_interval: int = 12,
    rotation: int | None = None,
    **flips: bool,
) -> bytes:
    """Encodes a video whose frames show their indices.

    Args:
        container: Container format, as FFmpeg names it.
        codec: Video codec, as FFmpeg names it.
        count: Number of frames.
        rate: Frames per second.
        size: Width and height in pixels.
        key_frame_interval: Number of frames from one key frame to the next.
        rotation: Angle of the display matrix in degrees counterclockwise; None for a video without one.
        flips: `hflip` and `vflip` of the display matrix.
    """
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=Fraction(rate))
        assert isinstance(stream, av.VideoStream), codec
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = key_frame_interval
        if rotation is not None:
            stream.set_display_rotation(rotation, **flips)
        for index in range(count):
            bits = np.array([255 * (index >> i & 1) for i in range(8)], dtype=np.uint8).repeat(size[0] // 8)
            stripes = np.broadcast_to(bits[None, :, None], (size[1], size[0], 3))
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(stripes), format="rgb24")):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)
    return file.getvalue()


def read_frame_index(file: bytes) -> int:
    """Returns the index that a frame shows; `file` is an image file."""
    stripes = np.asarray(Image.open(io.BytesIO(file)).convert("L")).mean(0).reshape(8, -1).mean(1)
    return sum(1 << i for i, bright in enumerate(stripes > 127) if bright)


def slow_video() -> bytes:
    """Returns a file of a few megabytes whose frames take many seconds to decode: each one shows nothing new."""
    first, second = _packets((4096, 2160))
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("mpeg4", rate=1000)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 4096, 2160, "yuv420p"
        for index in range(4000):  # 4 s, so that nothing is gained by seeking
            packet = av.Packet(second if index else first)
            packet.stream, packet.time_base = stream, Fraction(1, 1000)
            packet.pts = packet.dts = index
            packet.is_keyframe = not index
            out.mux(packet)
    return file.getvalue()


def _packets(size: tuple[int, int]) -> list[bytes]:
    """Returns a key frame and one that repeats it."""
    with av.open(io.BytesIO(), "w", format="avi") as out:
        stream = out.add_stream("mpeg4", rate=1000)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((size[1], size[0], 3), dtype=np.uint8), format="rgb24")
        packets = [packet for _ in range(2) for packet in stream.encode(frame)] + stream.encode()
    return [bytes(packet) for packet in packets[:2]]
