"""Bodies of `/v1/chat/completions` and `/tokenize`.

What is ours is read and taken out: `vir`, and with its part all that an image says of itself. All else is the engine's
business and passes through as it came.
"""

from collections.abc import Iterator
from typing import Any

from common import errors
from protos import vision_pb2 as pb
from server.apis.image_options import Allowed, read_dial, read_router, shown
from server.apis.request import MEDIA, Asked, Image, Path, check_fields, check_images, place
from server.http.json_body import parse_object

_PARTS = {"text", "image_url", "video_url", "refusal"}
_FRAMES = 8
"""Of a video, where nothing is said: `load_video` of the official model card's example."""


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
        kind = _kind(part, place(path))
        if kind in ("image_url", "video_url"):
            said, where = _link(part, kind, place(path)), f"{place(path)}.{kind}"
            if kind == "video_url":
                images.append(_video(path, said, where, router, allowed))
            else:
                images.append(Image(path, said["url"], read_dial(said, where, router, allowed)))
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


def _kind(part: Any, where: str) -> str:
    """What a part is; raises `InvalidRequest` where it is something that may not pass."""
    if isinstance(part, str):
        return "text"
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in _PARTS:
        said = f"{where}: type {shown(kind)} is not served; expected text, image_url or video_url"
        raise errors.InvalidRequest(said, param=where)
    if foreign := sorted(MEDIA & part.keys() - {kind}):
        raise errors.InvalidRequest(f"{where}: {foreign[0]} is not accepted in a part of type {kind}", param=where)
    return kind


def _link(part: dict[str, Any], kind: str, where: str) -> dict[str, Any]:
    """What a part says of its image or video: a URL at least."""
    said = part.get(kind)
    if not isinstance(said, dict) or not isinstance(said.get("url"), str) or not said["url"]:
        raise errors.InvalidRequest(f'{where}: {kind} must read {{"url": "data:… or https://…"}}', param=where)
    return said


def _video(path: Path, video: dict[str, Any], where: str, router: pb.Router, allowed: Allowed) -> Image:
    """A video, whose frames are one tile each unless it says otherwise."""
    count = video.get("num_frames")
    if count is not None and (type(count) is not int or count < 1):
        param = f"{where}.num_frames"
        raise errors.InvalidRequest(
            f"{param} {shown(count)} is not a whole number above 0; leave it out for {_FRAMES}", param=param
        )
    free = video if {"detail", "max_dynamic_patch"} & video.keys() else {"detail": "low", **video}
    return Image(path, video["url"], read_dial(free, where, router, allowed), frames=count or min(_FRAMES, allowed.max_images))
