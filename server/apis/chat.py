"""OpenAI's `/v1/chat/completions`. Images are `image_url` parts of messages, videos are `video_url` parts.

The gateway reads `vir` and the options of image and video parts, and removes them. vLLM gets all other fields unchanged.
"""

from collections.abc import Iterator
from typing import Any

from common import errors
from protos import vision_pb2 as pb
from server.apis.base import Api
from server.apis.chat_parts import prepare_chat
from server.apis.image_options import (
    OPTION_KEYS,
    RequestPolicy,
    check_keys,
    parse_image_options,
    parse_router,
    unexpected_value,
)
from server.apis.request import MEDIA_FIELDS, ImagePart, Path, check_images, check_item, check_text, check_type, format_path
from server.http import json_body

_PART_TYPES = {"text", "image_url", "video_url", "refusal"}
_PART_KEYS = ("type", "cache_control")
_MEDIA_KEYS = {"image_url": ("url", *OPTION_KEYS, "format"), "video_url": ("url", "num_frames", *OPTION_KEYS, "format")}
"""Keys of the object with the URL. Some clients send `format`, a media type, which the file itself states."""
_DEFAULT_FRAMES = 8
"""Default number of frames of a video (`load_video` in the official model card)."""


def find_images(body: dict[str, Any], policy: RequestPolicy) -> list[ImagePart]:
    """Find the images and videos in `messages`. Raises `InvalidRequest` or `TooManyImages`, with the location."""
    router = parse_router(body.get("vir"), policy.router, policy)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise errors.InvalidRequest("messages must be a list with at least one message.", param="messages")
    images = []
    for path, part in _content_parts(messages):
        part_type = _check_part(part, format_path(path))
        if part_type in ("image_url", "video_url"):
            media, location = _media(part, part_type, format_path(path)), f"{format_path(path)}.{part_type}"
            if part_type == "video_url":
                images.append(_video(path, media, location, router, policy))
            else:
                images.append(ImagePart(path, media["url"], parse_image_options(media, location, router, policy)))
    check_images(images, policy, "messages")
    return images


def _content_parts(messages: list[Any]) -> Iterator[tuple[Path, Any]]:
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise errors.InvalidRequest(f"messages[{i}] must be an object with role and content.", param=f"messages[{i}]")
        _check_message(message, f"messages[{i}]")
        content = message.get("content")
        if isinstance(content, list):
            for j, part in enumerate(content):
                yield ("messages", i, "content", j), part


def _check_message(message: dict[str, Any], location: str) -> None:
    """Check the types of a message's fields: vLLM would name one of its many kinds of messages. Raises `InvalidRequest`."""
    if message.get("role") is None:
        raise errors.InvalidRequest(f"{location}.role is missing: expected a string.", param=f"{location}.role")
    check_type(message, "role", str, "a string", location)
    check_type(message, "name", str, "a string", location)
    check_type(message, "content", str | list, "a string or a list of parts", location)
    check_type(message, "tool_call_id", str, "a string", location)
    check_type(message, "tool_calls", list, "a list", location)
    for i, call in enumerate(message.get("tool_calls") or ()):
        _check_call(call, f"{location}.tool_calls[{i}]")


def _check_call(call: Any, location: str) -> None:
    """Check the types of a call of a tool. Raises `InvalidRequest`."""
    check_item(call, dict, "an object", location)
    if call.get("type", "function") == "function":
        check_item(call.get("function"), dict, "an object with name and arguments", f"{location}.function")
        for name, expected in (("name", "a string"), ("arguments", "a string with a JSON object")):
            check_item(call["function"].get(name), str, expected, f"{location}.function.{name}")


def _check_part(part: Any, location: str) -> str:
    """Return the type of a content part. Raises `InvalidRequest` if it is not supported or has fields of another type."""
    if isinstance(part, str):
        return "text"
    check_item(part, dict, "an object with a type", location)
    part_type = part.get("type")
    if not isinstance(part_type, str) or part_type not in _PART_TYPES:
        raise errors.InvalidRequest(
            f"{location}: type {json_body.quote(part_type)} is not supported; expected text, image_url or video_url.",
            param=location,
        )
    if foreign := sorted(MEDIA_FIELDS & part.keys() - {part_type}):
        raise errors.InvalidRequest(f"{location}: {foreign[0]} is not allowed in a part of type {part_type}.", param=location)
    if part_type in ("text", "refusal"):
        check_text(part, part_type, location)
    return part_type


def _media(part: dict[str, Any], part_type: str, location: str) -> dict[str, Any]:
    """Return the object with the URL of an image or video part. Raises `InvalidRequest` if it has none."""
    media = part.get(part_type)
    if not isinstance(media, dict) or not isinstance(media.get("url"), str) or not media["url"]:
        raise errors.InvalidRequest(
            f'{location}: {part_type} must be an object {{"url": "data:… or https://…"}}.', param=location
        )
    keys = _MEDIA_KEYS[part_type]
    check_keys(part, (*_PART_KEYS, part_type), location, elsewhere={key: f"{part_type}.{key}" for key in keys})
    check_keys(media, keys, f"{location}.{part_type}")
    return media


def _video(path: Path, video: dict[str, Any], location: str, router: pb.Router, policy: RequestPolicy) -> ImagePart:
    """Parse a video part. Its frames are one tile each unless it sets `detail` or `max_dynamic_patch`."""
    count, default = video.get("num_frames"), min(_DEFAULT_FRAMES, policy.max_images)
    if count is not None and (type(count) is not int or count < 1):
        expected = f"an integer from 1 to {policy.max_images}"
        raise unexpected_value(f"{location}.num_frames", expected, count, f"omit it for {default}.")
    options = video if {"detail", "max_dynamic_patch"} & video.keys() else {"detail": "low", **video}
    return ImagePart(
        path,
        video["url"],
        parse_image_options(options, location, router, policy),
        frames=count or default,
    )


EXAMPLE: dict[str, Any] = {
    "model": "InternVL3_5-8B-Flash",
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "https://example.org/photo.jpg", "detail": "high"}},
                {"type": "text", "text": "What is in the picture?"},
            ],
        }
    ],
    "max_tokens": 64,
}

APIS = (
    Api(
        path="/v1/chat/completions",
        summary="Answer a conversation with images and videos (OpenAI Chat Completions)",
        example=EXAMPLE,
        prepare=prepare_chat,
        find_images=find_images,
        generates_text=True,
        max_tokens_fields=("max_completion_tokens", "max_tokens"),
    ),
)
