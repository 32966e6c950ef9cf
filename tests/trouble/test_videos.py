"""Videos as browsers and phones record them."""

import json
from typing import Any

import pytest

from tests.server.fakes.requests import data_url, text_part
from tests.server.fakes.stack import Stack
from tests.server.fakes.vllm import MODEL
from tests.trouble.media_stack import TROUBLE
from tests.videos import encode_video


async def test_a_media_type_with_commas_is_accepted(media_stack: tuple[Stack, Any]) -> None:
    stack, encoder = media_stack
    body = json.loads((TROUBLE / "B34zd_codecs_comma.json").read_text())
    response = await stack.post({**body, "model": MODEL})
    assert response.status == 200, response.body
    assert len(encoder.tiles) == 1, "its frames are equal"
    assert int(response.headers["X-DvD-Images"].split(";")[0].removeprefix("images=")) > 1
    assert stack.engine.last_json()["messages"][0]["content"][0] == text_part("Frame1: ")


@pytest.mark.parametrize("media_type", ['video/mp4;codecs="avc1.64001E,mp4a.40.2"', "video/mp4;a=,,;b=1", "VIDEO/MP4;A=B,C"])
async def test_neighbours_of_such_media_types_are_accepted(media_stack: tuple[Stack, Any], media_type: str) -> None:
    video = {"type": "video_url", "video_url": {"url": data_url(encode_video("mp4", "mpeg4", 3), media_type)}}
    assert (await media_stack[0].chat(video)).status == 200


async def test_frames_of_a_phones_video_are_upright(media_stack: tuple[Stack, Any]) -> None:
    stack, encoder = media_stack
    file = (TROUBLE / "B34w_rotated.mp4").read_bytes()
    video = {"type": "video_url", "video_url": {"url": data_url(file, "video/mp4"), "num_frames": 1, "max_dynamic_patch": 12}}
    assert (await stack.chat(video)).status == 200
    assert encoder.tiles[0].columns < encoder.tiles[0].rows


async def test_a_video_without_display_matrix_is_not_turned(media_stack: tuple[Stack, Any]) -> None:
    stack, encoder = media_stack
    file = encode_video("mp4", "mpeg4", 1, size=(320, 160))
    video = {"type": "video_url", "video_url": {"url": data_url(file, "video/mp4"), "max_dynamic_patch": 12}}
    assert (await stack.chat(video)).status == 200
    assert encoder.tiles[0].columns > encoder.tiles[0].rows
