"""Chats as clients send them, converted to what vLLM takes: other spellings of image parts, and fields that images rule out."""

from typing import Any

from common import errors
from server.apis.image_options import OPTION_KEYS
from server.apis.request import convert_list, type_of

_IMAGE_TYPES = ("image_url", "input_image")
"""Types of image parts: that of chat completions, and that of OpenAI's Responses, which clients mix up."""
_TEXT_TYPES = {"input_text": "text", "output_text": "text"}


def prepare_chat(body: dict[str, Any]) -> dict[str, Any]:
    """Return a body whose image and text parts have the types of chat completions.

    Raises:
        InvalidRequest: The body has images and a field that vLLM does not support together with them.
    """
    if not isinstance(body.get("messages"), list):
        return body
    body = convert_list(body, "messages", _convert_message)
    _check_truncation(body)
    _check_echo(body)
    return body


def _convert_message(message: Any, _index: int) -> Any:
    if not isinstance(message, dict):
        return message
    if message.get("name", "") is None:  # vLLM takes only its absence for none
        message = {field: value for field, value in message.items() if field != "name"}
    return convert_list(message, "content", _convert_part)


def _convert_part(part: Any, _index: int) -> Any:
    """Return a part with the type of chat completions, an image's URL in an object together with its options."""
    part_type = type_of(part)
    if not isinstance(part_type, str):
        return part
    if part_type in _TEXT_TYPES:
        return {**part, "type": _TEXT_TYPES[part_type]}
    image = part.get("image_url")
    if part_type not in _IMAGE_TYPES or not isinstance(image, str if part_type == "image_url" else str | dict):
        return part
    options = {name: part[name] for name in OPTION_KEYS if name in part}
    rest = {name: value for name, value in part.items() if name not in ("type", "image_url", *OPTION_KEYS)}
    url = {"url": image} if isinstance(image, str) else image
    return {"type": "image_url", "image_url": {**options, **url}, **rest}


def _has_media(message: Any) -> bool:
    content = message.get("content") if isinstance(message, dict) else None
    return isinstance(content, list) and any(type_of(part) in ("image_url", "video_url") for part in content)


def _check_truncation(body: dict[str, Any]) -> None:
    if body.get("truncate_prompt_tokens") is not None and any(map(_has_media, body["messages"])):
        raise errors.InvalidRequest(
            "truncate_prompt_tokens is not supported with images, whose tokens cannot be cut: omit it, and send fewer images "
            "or a smaller max_dynamic_patch.",
            param="truncate_prompt_tokens",
        )


def _check_echo(body: dict[str, Any]) -> None:
    """Check that `echo` repeats no image: it repeats the last message if the response has the same role."""
    last = body["messages"][-1] if body["messages"] else None
    continues = body.get("add_generation_prompt") is False or (isinstance(last, dict) and last.get("role") == "assistant")
    if body.get("echo") and continues and _has_media(last):
        raise errors.InvalidRequest(
            "echo cannot repeat a last message that has images: omit echo, or send add_generation_prompt true.", param="echo"
        )
