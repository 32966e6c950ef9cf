"""An error about an image or a video names the part that has it, on every API."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from tests.server.fakes.file_server import file_server
from tests.server.fakes.handlers import respond_with
from tests.server.fakes.requests import chat, data_url, image_file, image_part, text_part
from tests.server.fakes.stack import Response, Stack
from tests.server.fakes.vllm import MODEL
from tests.trouble.media_stack import DATA, TROUBLE, start_media_stack
from tests.videos import encode_video, slow_video

GOOD = image_file()
JPEG = (DATA / "golden/images/hd_1920x1080.jpg").read_bytes()
TRUNCATED = JPEG[: len(JPEG) // 2]
"""Its header is right: only the vision worker notices that it is damaged."""

CONTENT = {
    "not base64": ("data:image/png;base64,%%%%", "invalid_image"),
    "no image": (data_url(b"hello"), "invalid_image"),
    "truncated": (data_url(TRUNCATED), "invalid_image"),
    "too many pixels": (data_url(image_file(size=(2000, 2000))), "image_too_large"),
    "too many bytes": (data_url(GOOD + bytes(2_000_000)), "image_too_large"),
    "not public": ("https://127.0.0.1/a.png", "invalid_request"),
    "not a URL": ("https://exa mple.org/a.png", "invalid_request"),
    "host without address": ("https://no-such-name.invalid/a.png", "image_fetch_failed"),
}
LIMITS: dict[str, Any] = {"max_image_pixels": 3_000_000, "max_image_bytes": 1_500_000}


def assert_located(response: Response, code: str, location: str, anthropic: bool = False) -> None:
    error = response.json["error"] if anthropic else response.error
    assert (response.status, error["code"], error["param"]) == (400, code, location)
    assert error["message"].startswith(f"{location}: ")


@pytest.mark.parametrize("scope", ["image", "request"])
async def test_the_image_of_a_chat_is_named(tmp_path: Path, scope: str) -> None:
    async with start_media_stack(tmp_path, router_scope=scope, **LIMITS) as (stack, _):
        for url, code in CONTENT.values():
            body = chat(image_part(GOOD), text_part("and"), image_part(url), image_part(GOOD), image_part(url))
            body["messages"].insert(0, {"role": "system", "content": "be brief"})
            assert_located(await stack.post(body), code, "messages[1].content[2]")
            assert_located(await stack.post(body, path="/tokenize"), code, "messages[1].content[2]")


async def test_the_image_is_named_on_the_other_apis(tmp_path: Path) -> None:
    async with start_media_stack(tmp_path, **LIMITS) as (stack, _):
        for url, code in CONTENT.values():
            part, good = ({"type": "input_image", "image_url": link} for link in (url, data_url(GOOD)))
            items = [{"role": "user", "content": [good]}, {"type": "function_call_output", "call_id": "1", "output": [part]}]
            response = await stack.post({"model": MODEL, "input": items}, path="/v1/responses")
            assert_located(response, code, "input[1].output[0]")
            images = {"model": MODEL, "images": [{"url": data_url(GOOD)}, {"url": url}], "route": True}
            assert_located(await stack.post(images, path="/v1/images/tokens"), code, "images[1]")


async def test_the_image_of_anthropics_messages_is_named(tmp_path: Path) -> None:
    good = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": base64.b64encode(GOOD).decode()}}
    async with start_media_stack(tmp_path, **LIMITS) as (stack, _):
        for url, code in CONTENT.values():
            bad = {"type": "image", "source": {"type": "url", "url": url}}
            content = [good, {"type": "tool_result", "tool_use_id": "1", "content": [bad]}]
            body = {"model": MODEL, "max_tokens": 5, "messages": [{"role": "user", "content": content}]}
            for path in ("/v1/messages", "/v1/messages/count_tokens"):
                response = await stack.post(body, path=path)
                assert_located(response, code, "messages[0].content[1].content[0]", anthropic=True)


async def test_the_second_of_three_images_is_named(media_stack: tuple[Stack, Any]) -> None:
    body = json.loads((TROUBLE / "B37b1_second_not_base64.json").read_text())
    response = await media_stack[0].post({**body, "model": MODEL})
    assert_located(response, "invalid_image", "messages[0].content[1]")


async def test_a_video_is_named(media_stack: tuple[Stack, Any]) -> None:
    stack, _ = media_stack
    truncated = encode_video("mp4", "mpeg4", 20)[:-900]
    async with file_server(gone=respond_with(b"", 404)) as url:
        for link, code in (
            (data_url(truncated, "video/mp4"), "invalid_video"), (data_url(GOOD), "invalid_video"),
            (f"{url}/gone", "image_fetch_failed"), ("data:video/mp4;base64,!", "invalid_image"),
        ):  # fmt: skip
            video = {"type": "video_url", "video_url": {"url": link}}
            assert_located(await stack.chat(image_part(GOOD), video), code, "messages[0].content[1]")


async def test_a_video_that_takes_too_long_is_named(tmp_path: Path) -> None:
    async with start_media_stack(tmp_path, decode_timeout=1) as (stack, _):
        link = data_url(slow_video(), "video/mp4")
        response = await stack.chat(text_part("a"), {"type": "video_url", "video_url": {"url": link}})
        assert_located(response, "invalid_video", "messages[0].content[1]")
        assert "--decode-timeout" in response.error["message"]
        ended = await stack.metric('dvd_decoder_ends_total{reason="cpu"') + await stack.metric(
            'dvd_decoder_ends_total{reason="time"'
        )
        assert ended == 1
