"""A chat request's body: what must be looked at in it, what is refused, and the image parts replaced.

All else is the engine's business and passes through as it came.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from wire import errors

_PARTS = {"text", "image_url", "refusal"}
_NOT_FROM_CALLERS = (
    "mm_processor_kwargs", "media_io_kwargs", "chat_template", "kv_transfer_params", "ec_transfer_params", "vllm_xargs",
    "prompt_embeds", "mm_payload", "return_mm_kwargs",
)  # fmt: skip
# the engine looks for these whatever the type of a part says
_MEDIA = frozenset({
    "audio_embeds", "audio_url", "file", "image_embeds", "image_pil", "image_url", "input_audio", "input_image",
    "prompt_embeds", "uuid", "video_embeds", "video_url",
})  # fmt: skip
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_PROMPTED = ("messages", "tools", "functions", "documents", "chat_template_kwargs")
_PLACEHOLDERS = ("<image>", "<IMG_CONTEXT>")


@dataclass(frozen=True)
class Chat:
    """A parsed body; `images` are its image parts in the order of the prompt. `replaced` makes the engine's body."""

    raw: bytes
    body: dict[str, Any]
    images: list[dict[str, Any]]

    @property
    def model(self) -> str | None:
        return self.body.get("model")

    @property
    def urls(self) -> list[str]:
        return [part["image_url"]["url"] for part in self.images]

    def replaced(self, keys: Sequence[str], tokens: Sequence[int]) -> bytes:
        """The body with each image part replaced by its key and number of visual tokens."""
        if not self.images:
            return self.raw
        new = {
            id(part): {"type": "image_embeds", "image_embeds": {"image_num_tokens": [count]}, "uuid": key}
            for part, key, count in zip(self.images, keys, tokens, strict=True)
        }
        messages = [
            {**message, "content": [new.get(id(part), part) for part in message["content"]]}
            if isinstance(message.get("content"), list)
            else message
            for message in self.body["messages"]
        ]
        try:
            return json.dumps({**self.body, "messages": messages}, ensure_ascii=False).encode()
        except RecursionError:
            raise errors.InvalidRequest("the body is nested too deeply") from None


def parse_object(raw: bytes) -> dict[str, Any]:
    """A JSON object that is valid UTF-8 all through. Raises `InvalidRequest`."""
    try:
        body = json.loads(raw.decode(), parse_constant=_no_constant, parse_float=_finite)
        if _SURROGATE.search(raw):  # a lone one passes the parser but is no text
            json.dumps(body, ensure_ascii=False).encode()
    except UnicodeError:
        raise errors.InvalidRequest("the body is not valid UTF-8") from None
    except RecursionError:
        raise errors.InvalidRequest("the body is nested too deeply") from None
    except ValueError as error:
        raise errors.InvalidRequest(f"the body is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(body, dict):
        raise errors.InvalidRequest(f"the body must be a JSON object, not {type(body).__name__}")
    return body


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_constant(text[:100])


def parse_chat(raw: bytes, max_images: int) -> Chat:
    """Raises `InvalidRequest` or `TooManyImages`, naming the place."""
    body = parse_object(raw)
    check_fields(body)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise errors.InvalidRequest("messages must be a list with at least one message", param="messages")
    images = [part for where, part in _parts(messages) if _is_image(where, part)]
    if len(images) > max_images:
        raise errors.TooManyImages(f"{len(images)} images in one request, at most {max_images} are served", param="messages")
    if images:
        _refuse_placeholders(body)
    return Chat(raw, body, images)


def check_fields(body: dict[str, Any]) -> None:
    """Refuse a model that is no name, and what only the operator may set. Raises `InvalidRequest`."""
    if not isinstance(body.get("model"), str | None):
        raise errors.InvalidRequest(f"model must be a string, not {type(body['model']).__name__}", param="model")
    for name in _NOT_FROM_CALLERS:
        if body.get(name) is not None:
            raise errors.InvalidRequest(f"{name} is not accepted from callers: leave it out", param=name)


def _parts(messages: list[Any]) -> Iterator[tuple[str, Any]]:
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise errors.InvalidRequest(f"messages[{i}] must be an object with role and content", param="messages")
        content = message.get("content")
        if isinstance(content, list):
            for j, part in enumerate(content):
                yield f"messages[{i}].content[{j}]", part


def _is_image(where: str, part: Any) -> bool:
    """Whether a part is an image; raises `InvalidRequest` where it is something that may not pass."""
    if isinstance(part, str):
        return False
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in _PARTS:
        shown = repr(kind[:100]) if isinstance(kind, str) else type(kind).__name__
        raise errors.InvalidRequest(f"{where}: type {shown} is not served; expected text or image_url", param=where)
    if foreign := sorted(_MEDIA & part.keys() - {kind}):
        raise errors.InvalidRequest(f"{where}: {foreign[0]} is not accepted in a part of type {kind}", param=where)
    if kind != "image_url":
        return False
    image = part.get("image_url")
    if not isinstance(image, dict) or not isinstance(image.get("url"), str) or not image["url"]:
        raise errors.InvalidRequest(f'{where}: image_url must read {{"url": "data:… or https://…"}}', param=where)
    return True


def _refuse_placeholders(body: dict[str, Any]) -> None:
    """The engine finds the place of an image by a word; nothing else that a prompt is made of may hold it."""
    for name in _PROMPTED:
        for where, text in _texts(name, body.get(name)):
            for word in _PLACEHOLDERS:
                if word in text:
                    raise errors.InvalidRequest(
                        f"{where} holds {word!r}, which marks the place of an image: put an image_url part there", param=where
                    )


def _texts(where: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every string in a value but URLs of images, the names of fields too; and its place."""
    waiting = [(where, value)]  # no recursion: the caller decides how deep it would go
    while waiting:
        place, found = waiting.pop()
        if isinstance(found, str):
            yield place, found
        elif isinstance(found, list):
            waiting += [(f"{place}[{i}]"[:200], inner) for i, inner in enumerate(found)]
        elif isinstance(found, dict) and found.get("type") != "image_url":
            waiting += [(place, name) for name in found]
            waiting += [(f"{place}.{name}"[:200], inner) for name, inner in found.items()]
