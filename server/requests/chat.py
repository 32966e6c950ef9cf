"""Bodies of `/v1/chat/completions` and `/tokenize`.

What is ours is read and taken out: `vir`, and with its part all that an image says of itself. All else is the engine's
business and passes through as it came.
"""

from collections.abc import Iterator
from typing import Any

from server.requests.body import MEDIA, Asked, Image, Path, check_fields, check_images, parse_object, place
from server.requests.dial import Allowed, read_dial, read_router, shown
from wire import errors

_PARTS = {"text", "image_url", "refusal"}


def parse_chat(raw: bytes, allowed: Allowed) -> Asked:
    """Raises `InvalidRequest` or `TooManyImages`, naming the place."""
    body = parse_object(raw)
    check_fields(body)
    return Asked(raw, body, chat_images(body, allowed))


def parse_tokenize(raw: bytes, allowed: Allowed) -> Asked:
    """A conversation as for a chat, or a text in `prompt`."""
    body = parse_object(raw)
    check_fields(body)
    return Asked(raw, body, chat_images(body, allowed) if "messages" in body else [])


def chat_images(body: dict[str, Any], allowed: Allowed) -> list[Image]:
    """The images of `messages`, with the whole body checked for what may not stand beside them."""
    router = read_router(body.get("vir"), allowed.router, allowed)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise errors.InvalidRequest("messages must be a list with at least one message", param="messages")
    images = []
    for path, part in _parts(messages):
        if image := _image(part, place(path)):
            images.append(Image(path, image["url"], read_dial(image, f"{place(path)}.image_url", router, allowed)))
    check_images(body, images, allowed, "messages")
    return images


def _parts(messages: list[Any]) -> Iterator[tuple[Path, Any]]:
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise errors.InvalidRequest(f"messages[{i}] must be an object with role and content", param="messages")
        content = message.get("content")
        if isinstance(content, list):
            for j, part in enumerate(content):
                yield ("messages", i, "content", j), part


def _image(part: Any, where: str) -> dict[str, Any] | None:
    """What an image part says, None for text; raises `InvalidRequest` where it is something that may not pass."""
    if isinstance(part, str):
        return None
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in _PARTS:
        raise errors.InvalidRequest(f"{where}: type {shown(kind)} is not served; expected text or image_url", param=where)
    if foreign := sorted(MEDIA & part.keys() - {kind}):
        raise errors.InvalidRequest(f"{where}: {foreign[0]} is not accepted in a part of type {kind}", param=where)
    if kind != "image_url":
        return None
    image = part.get("image_url")
    if not isinstance(image, dict) or not isinstance(image.get("url"), str) or not image["url"]:
        raise errors.InvalidRequest(f'{where}: image_url must read {{"url": "data:… or https://…"}}', param=where)
    return image
