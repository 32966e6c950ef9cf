"""Which frames are taken of real videos, and what is refused."""

import io

import av
import numpy as np
import pytest
from PIL import Image

from common import errors
from server.media import video
from tests.videos import encode_video, read_frame_index

PIXELS = 1_000_000


def numbers(data: bytes, count: int) -> list[int]:
    return [read_frame_index(file) for file in video.sample_frames(data, count, PIXELS, 30)]


@pytest.mark.parametrize(("kind", "codec"), [("mp4", "mpeg4"), ("matroska", "mpeg4"), ("avi", "mpeg4"), ("webm", "libvpx")])
def test_frames_are_the_middles_of_even_parts(kind: str, codec: str) -> None:
    # by hand: parts of 99 / 4 frames, the first middle at 12.375, then 25, 50 and 74 further on
    assert video.frame_indices(100, 4) == [12, 37, 62, 86]
    assert numbers(encode_video(kind, codec, 100), 4) == [12, 37, 62, 86]


def test_a_long_video_is_jumped_through() -> None:
    data = encode_video("mp4", "mpeg4", 120, rate=1)  # two minutes
    assert numbers(data, 5) == video.frame_indices(120, 5)


def test_one_key_frame_for_all() -> None:
    assert numbers(encode_video("mp4", "mpeg4", 100, rate=1, key_frame_interval=600), 4) == [12, 37, 62, 86]


def test_no_more_frames_than_there_are() -> None:
    assert numbers(encode_video("mp4", "mpeg4", 3), 8) == [0, 1, 2]
    assert len(video.sample_frames(encode_video("mp4", "mpeg4", 1), 8, PIXELS, 30)) == 1


def test_pixels_are_those_of_the_frame() -> None:
    (file,) = video.sample_frames(encode_video("mp4", "mpeg4", 1, size=(320, 240)), 1, PIXELS, 30)
    assert Image.open(io.BytesIO(file)).size == (320, 240)


def test_too_many_pixels() -> None:
    with pytest.raises(errors.ImageTooLarge, match="The video has 64 × 48 pixels; the maximum is 3071"):
        video.sample_frames(encode_video("mp4", "mpeg4", 2), 1, 64 * 48 - 1, 30)


def test_no_time_left() -> None:
    with pytest.raises(errors.DeadlineExceeded):
        video.sample_frames(encode_video("mp4", "mpeg4", 10), 1, PIXELS, 0)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", id="playlist"),
        pytest.param(b"ffconcat version 1.0\nfile /etc/passwd\n", id="concatenation"),
        pytest.param(b"\x00\x00\x00\x18ftypmp42" + bytes(200), id="only a head"),
        pytest.param(b"\x1a\x45\xdf\xa3" + bytes(200), id="only a magic"),
        pytest.param(encode_video("mp4", "mpeg4", 20)[:-900], id="its end is missing"),
    ],
)
def test_what_is_no_video(data: bytes) -> None:
    with pytest.raises(errors.InvalidVideo):
        video.sample_frames(data, 4, PIXELS, 30)


def test_sound_alone() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        for packet in [*stream.encode(frame), *stream.encode()]:
            out.mux(packet)
    with pytest.raises(errors.InvalidVideo, match="no video stream"):
        video.sample_frames(file.getvalue(), 4, PIXELS, 30)


@pytest.mark.parametrize("codec", [b"evc1", b"ZZZZ"])
def test_a_codec_that_is_not_decoded_here(codec: bytes) -> None:
    """Beside sound that is: such a file is opened without a complaint."""
    file = io.BytesIO()
    with av.open(file, "w", format="avi") as out:
        pictures, sound = out.add_stream("mpeg4", rate=10), out.add_stream("pcm_s16le", rate=8000)
        pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuv420p"
        spoken = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.int16), format="s16", layout="mono")
        spoken.rate = 8000
        seen = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), dtype=np.uint8), format="rgb24")
        for packet in [*pictures.encode(seen), *pictures.encode(), *sound.encode(spoken), *sound.encode()]:
            out.mux(packet)
    assert len(video.sample_frames(file.getvalue(), 1, PIXELS, 30)) == 1
    with pytest.raises(errors.InvalidVideo, match="codec of the video is not supported"):
        video.sample_frames(file.getvalue().replace(b"FMP4", codec), 1, PIXELS, 30)


def test_of_a_damaged_video_come_the_frames_before_the_damage() -> None:
    data = bytearray(encode_video("matroska", "mpeg4", 100))
    data[len(data) // 2 : len(data) // 2 + 300] = b"\xff" * 300
    found = numbers(bytes(data), 4)
    assert len(found) == 4
    assert found == sorted(found)
    assert found[0] > 0
