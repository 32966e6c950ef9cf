"""Frames sampled from real videos, and files that are rejected."""

import io

import av
import numpy as np
import pytest
from PIL import Image

from common import errors
from server.media import video
from tests.videos import encode_video, read_frame_index

MAX_PIXELS = 1_000_000


def sample_frames(data: bytes, count: int, max_pixels: int) -> list[bytes]:
    return list(video.sample_frames(data, count, max_pixels))


def sampled_indices(data: bytes, count: int) -> list[int]:
    return [read_frame_index(file) for file in sample_frames(data, count, MAX_PIXELS)]


@pytest.mark.parametrize(
    ("container", "codec"), [("mp4", "mpeg4"), ("matroska", "mpeg4"), ("avi", "mpeg4"), ("webm", "libvpx")]
)
def test_frames_are_the_middles_of_equal_segments(container: str, codec: str) -> None:
    # by hand: segments of 99 / 4 frames; the first middle is at 12.375, the others 25, 50 and 74 later
    assert video.frame_indices(100, 4) == [12, 37, 62, 86]
    assert sampled_indices(encode_video(container, codec, 100), 4) == [12, 37, 62, 86]


def test_frames_of_a_long_video_are_sought() -> None:
    data = encode_video("mp4", "mpeg4", 120, rate=1)  # two minutes
    assert sampled_indices(data, 5) == video.frame_indices(120, 5)


def test_a_video_with_one_key_frame_is_sampled() -> None:
    assert sampled_indices(encode_video("mp4", "mpeg4", 100, rate=1, key_frame_interval=600), 4) == [12, 37, 62, 86]


def test_a_short_video_gives_all_its_frames() -> None:
    assert sampled_indices(encode_video("mp4", "mpeg4", 3), 8) == [0, 1, 2]
    assert len(sample_frames(encode_video("mp4", "mpeg4", 1), 8, MAX_PIXELS)) == 1


def test_a_sampled_frame_has_the_size_of_the_video() -> None:
    (file,) = sample_frames(encode_video("mp4", "mpeg4", 1, size=(320, 240)), 1, MAX_PIXELS)
    assert Image.open(io.BytesIO(file)).size == (320, 240)


@pytest.mark.parametrize(("degrees", "turned"), [(0, 0), (90, 90), (-90, -90), (180, 180)])
def test_a_frame_is_turned_as_its_display_matrix_says(degrees: int, turned: int) -> None:
    """Degrees are counterclockwise, for FFmpeg and for Pillow."""
    upright, rotated = (encode_video("mp4", "mpeg4", 3, size=(128, 64), rotation=angle) for angle in (None, degrees))
    (expected,), (actual,) = (sample_frames(data, 1, MAX_PIXELS) for data in (upright, rotated))
    image = Image.open(io.BytesIO(expected)).rotate(turned, expand=True)
    assert Image.open(io.BytesIO(actual)).tobytes() == image.tobytes()


def test_every_frame_is_turned() -> None:
    files = sample_frames(encode_video("mp4", "mpeg4", 120, rate=1, rotation=90), 8, MAX_PIXELS)
    assert [Image.open(io.BytesIO(file)).size for file in files] == [(48, 64)] * 8


@pytest.mark.parametrize(("flip", "transpose"), [("hflip", "FLIP_LEFT_RIGHT"), ("vflip", "FLIP_TOP_BOTTOM")])
def test_a_mirrored_frame_is_mirrored_back(flip: str, transpose: str) -> None:
    upright, mirrored = (
        encode_video("mp4", "mpeg4", 3, size=(128, 64), rotation=angle, **dict.fromkeys(names, True))
        for angle, names in ((None, []), (0, [flip]))
    )
    (expected,), (actual,) = (sample_frames(data, 1, MAX_PIXELS) for data in (upright, mirrored))
    image = Image.open(io.BytesIO(expected)).transpose(Image.Transpose[transpose])
    assert Image.open(io.BytesIO(actual)).tobytes() == image.tobytes()


def test_a_video_with_too_many_pixels_is_rejected() -> None:
    with pytest.raises(errors.ImageTooLarge, match="The video has 64 × 48 pixels; the maximum is 3071"):
        sample_frames(encode_video("mp4", "mpeg4", 2), 1, 64 * 48 - 1)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", id="playlist"),
        pytest.param(b"ffconcat version 1.0\nfile /etc/passwd\n", id="concat script"),
        pytest.param(b"\x00\x00\x00\x18ftypmp42" + bytes(200), id="MP4 without content"),
        pytest.param(b"\x1a\x45\xdf\xa3" + bytes(200), id="Matroska without content"),
        pytest.param(encode_video("mp4", "mpeg4", 20)[:-900], id="truncated MP4"),
    ],
)
def test_files_that_are_no_videos_are_rejected(data: bytes) -> None:
    with pytest.raises(errors.InvalidVideo):
        sample_frames(data, 4, MAX_PIXELS)


def test_a_file_with_audio_only_is_rejected() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        for packet in [*stream.encode(frame), *stream.encode()]:
            out.mux(packet)
    with pytest.raises(errors.InvalidVideo, match="no video stream"):
        sample_frames(file.getvalue(), 4, MAX_PIXELS)


@pytest.mark.parametrize("codec", [b"evc1", b"ZZZZ"])
def test_an_unsupported_codec_is_rejected(codec: bytes) -> None:
    """With an audio stream that is supported: FFmpeg opens such a file without an error."""
    file = io.BytesIO()
    with av.open(file, "w", format="avi") as out:
        video_stream, audio_stream = out.add_stream("mpeg4", rate=10), out.add_stream("pcm_s16le", rate=8000)
        video_stream.width, video_stream.height, video_stream.pix_fmt = 64, 48, "yuv420p"
        audio_frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.int16), format="s16", layout="mono")
        audio_frame.rate = 8000
        video_frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), dtype=np.uint8), format="rgb24")
        for packet in [*video_stream.encode(video_frame), *video_stream.encode()]:
            out.mux(packet)
        for packet in [*audio_stream.encode(audio_frame), *audio_stream.encode()]:
            out.mux(packet)
    assert len(sample_frames(file.getvalue(), 1, MAX_PIXELS)) == 1
    with pytest.raises(errors.InvalidVideo, match="codec of the video is not supported"):
        sample_frames(file.getvalue().replace(b"FMP4", codec), 1, MAX_PIXELS)


def test_a_damaged_video_gives_the_frames_that_can_be_decoded() -> None:
    data = bytearray(encode_video("matroska", "mpeg4", 100))
    data[len(data) // 2 : len(data) // 2 + 300] = b"\xff" * 300
    indices = sampled_indices(bytes(data), 4)
    assert len(indices) == 4
    assert indices == sorted(indices)
    assert indices[0] > 0
