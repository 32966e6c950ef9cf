"""Damaged images and videos: rejected with an error of the caller, in time; gateway and vision worker see the same size."""

import time
import warnings
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from common import errors
from common.image_header import inspect_image
from common.tiling import Tiling
from protos import vision_pb2
from server.media.video import sample_frames
from server.token_counts import tile_count
from tests.fuzz.strategies import damaged
from tests.server.fakes.requests import image_file
from tests.server.fakes.vision_worker import checkpoint_description
from tests.videos import encode_video
from vision_worker.preprocessing.decoding import decode
from vision_worker.preprocessing.tiling import cut

DATA = Path(__file__).parents[1] / "data"
IMAGES = [
    *(image_file(5, (33, 21), file_format) for file_format in ("PNG", "JPEG", "WEBP", "GIF", "BMP")),
    *((DATA / "golden/images" / name).read_bytes() for name in ("tiny_33x21.png", "square.png", "rgba_700x500.png")),
    *(path.read_bytes() for path in sorted((DATA / "trouble").glob("B0*"))),
]
VIDEOS = [
    encode_video("mp4", "mpeg4", 12), encode_video("matroska", "mpeg4", 5), encode_video("avi", "mpeg4", 5),
    (DATA / "trouble/B34w_rotated.mp4").read_bytes(),
]  # fmt: skip
MAX_PIXELS = 1_000_000
SLACK_SECONDS = 30.0
"""Time that a busy machine may take for an image of at most `MAX_PIXELS`, or a small video."""


@given(damaged(IMAGES) | st.binary(max_size=64))
def test_gateway_and_vision_worker_agree_on_an_image(file: bytes) -> None:
    started = time.monotonic()
    try:
        size = inspect_image(file, MAX_PIXELS)
    except (errors.InvalidImage, errors.ImageTooLarge) as error:
        assert len(str(error)) < 400
        return  # neither process decodes it
    with warnings.catch_warnings(action="ignore"):
        try:
            pixels = decode(file, MAX_PIXELS)
        except (errors.InvalidImage, errors.ImageTooLarge) as error:
            assert len(str(error)) < 400
        else:
            assert size == pixels.size, "visual tokens are counted from the header"
            assert pixels.mode == "RGB"
    assert time.monotonic() - started < SLACK_SECONDS


@settings(max_examples=60)
@given(damaged(VIDEOS, 5) | st.binary(max_size=64), st.integers(1, 8))
def test_a_damaged_video_has_frames_or_is_rejected_in_time(file: bytes, count: int) -> None:
    started = time.monotonic()
    try:
        frames = list(sample_frames(file, count, MAX_PIXELS))
    except (errors.InvalidVideo, errors.ImageTooLarge) as error:
        assert len(str(error)) < 400
    else:
        assert 1 <= len(frames) <= count
        for frame in frames:
            inspect_image(frame, MAX_PIXELS)
    assert time.monotonic() - started < SLACK_SECONDS


@settings(max_examples=40)
@given(st.integers(1, 900), st.integers(1, 900), st.integers(1, 12), st.integers(0, 11))
def test_the_gateway_counts_the_tiles_that_the_vision_worker_cuts(width: int, height: int, most: int, fewer: int) -> None:
    least = max(1, most - fewer)
    checkpoint = checkpoint_description(tile_size=28)
    tiles = cut(np.zeros((height, width, 3), np.uint8), Tiling(least, most, checkpoint.thumbnail, checkpoint.tile_size))
    assert len(tiles.pixels) == tile_count((width, height), vision_pb2.Tiling(min_tiles=least, max_tiles=most), checkpoint)
