"""Videos: frames are sampled, labelled and encoded as images."""

from typing import Any

from tests.server.fakes.file_server import file_server
from tests.server.fakes.handlers import respond_with
from tests.server.fakes.requests import data_url, image_part, text_part
from tests.server.fakes.stack import Stack
from tests.server.gateway.helpers import A, assert_serves_images, message_content
from tests.videos import encode_video, read_frame_index


async def test_a_video_becomes_labelled_frames(stack: Stack) -> None:
    clip = encode_video("mp4", "mpeg4", 100)
    async with file_server(v=respond_with(clip)) as url:
        for link in (f"{url}/v", data_url(clip, "video/mp4")):
            video = {"type": "video_url", "video_url": {"url": link, "num_frames": 4}}
            response = await stack.chat(image_part(A), video, text_part("what happens?"))
            assert response.status == 200
            assert response.headers["X-DvD-Images"].startswith("images=5; ")
            contents = [part.get("text") or part["type"] for part in message_content(stack)]
            frames = [text for i in range(1, 5) for text in (f"Frame{i}: ", "image_embeds")]
            assert contents == ["image_embeds", *frames, "what happens?"]
            assert b"base64" not in stack.engine.requests[-1].raw
    assert {call.tiling.max_tiles for call in stack.vision.calls if call.images[0].data != A} == {1}
    frames_sent = [data for data in stack.vision.images if data != A]
    assert sorted(map(read_frame_index, frames_sent)) == [12, 37, 62, 86], "the second request encodes no frame again"
    assert message_content(stack)[-2]["uuid"] in stack.sink.rows


async def test_invalid_videos_are_rejected(shared_stack: Stack) -> None:
    async def assert_rejected(link: str, code: str, **options: Any) -> None:
        response = await shared_stack.chat({"type": "video_url", "video_url": {"url": link, **options}}, text_part("?"))
        assert (response.status, response.error["code"]) == (400, code)

    await assert_rejected(data_url(A), "invalid_video")
    await assert_rejected(data_url(encode_video("mp4", "mpeg4", 3, size=(128, 96)), "video/mp4"), "image_too_large")
    await assert_rejected("https://127.0.0.1/a.mp4", "invalid_request")
    await assert_rejected("file:///etc/passwd", "invalid_request")
    await assert_rejected(data_url(encode_video("mp4", "mpeg4", 3)), "too_many_images", num_frames=5)
    await assert_serves_images(shared_stack)
