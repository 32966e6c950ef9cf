"""A request's body: read strictly, its images found, and each replaced by the key of its embedding."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from wire import errors

# each of these lets a caller run code, load tensors or steer transfers inside the language worker
_REFUSED = frozenset({
    "chat_template", "ec_transfer_params", "kv_transfer_params", "media_io_kwargs", "mm_payload", "mm_processor_kwargs",
    "prompt_embeds", "return_mm_kwargs", "vllm_xargs",
})  # fmt: skip
_REFUSED_IN_TEMPLATE = frozenset({"chat_template", "conversation", "tokenize"})
_TEXT_PARTS = {"text": "text", "refusal": "refusal", "thinking": "thinking", "input_text": "text", "output_text": "text"}


@dataclass(frozen=True)
class ImagePart:
    """An image where the caller put it. `place` names it in errors: `messages.0.content.1`."""

    content: list[Any]
    index: int
    url: str
    place: str


def parse(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises `InvalidRequest` for everything else, for NaN, infinite numbers and lone surrogates."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_not_json, parse_float=_finite)
    except UnicodeDecodeError:
        raise errors.InvalidRequest("the body is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise errors.InvalidRequest(f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except (ValueError, RecursionError):
        raise errors.InvalidRequest("the body is not JSON that can be read: numbers or nesting too long") from None
    if not isinstance(value, dict):
        raise errors.InvalidRequest("the body must be a JSON object")
    return value


def _not_json(name: str) -> NoReturn:
    raise errors.InvalidRequest(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise errors.InvalidRequest(f"the number {text[:40]} is too large")
    return value


def serialise(body: dict[str, Any]) -> bytes:
    """UTF-8 JSON. Raises `InvalidRequest` where a string holds half a surrogate pair."""
    try:
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError:
        raise errors.InvalidRequest("a string holds a lone surrogate, which is no character") from None
    except RecursionError:
        raise errors.InvalidRequest("the body is nested too deeply") from None


def check(body: dict[str, Any]) -> str:
    """The model's name. Raises `InvalidRequest` naming a field that callers may not send."""
    for name in sorted(_REFUSED & body.keys()):
        if body[name] is not None:
            raise errors.InvalidRequest(f"{name} is not accepted here", param=name)
    template = body.get("chat_template_kwargs")
    for name in sorted(_REFUSED_IN_TEMPLATE & template.keys()) if isinstance(template, dict) else ():
        raise errors.InvalidRequest(f"chat_template_kwargs.{name} is not accepted here", param="chat_template_kwargs")
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise errors.InvalidRequest("model must be the name of a served model; see /v1/models", param="model")
    return model


def image_parts(body: dict[str, Any]) -> list[ImagePart]:
    """The images of all messages, in order. Raises `InvalidRequest` for parts that are neither text nor image."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise errors.InvalidRequest("messages must be a list of at least one message", param="messages")
    return [part for number, message in enumerate(messages) for part in _in_message(message, f"messages.{number}")]


def _in_message(message: Any, place: str) -> Iterable[ImagePart]:
    if not isinstance(message, dict):
        raise errors.InvalidRequest("a message must be an object", param=place)
    if not isinstance(message.get("role"), str):
        raise errors.InvalidRequest("a message needs a role", param=f"{place}.role")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list):
        raise errors.InvalidRequest("content must be a string or a list of parts", param=f"{place}.content")
    for index, part in enumerate(content):
        where = f"{place}.content.{index}"
        if (url := _image_url(part, where)) is not None:
            yield ImagePart(content, index, url, where)


def _image_url(part: Any, place: str) -> str | None:
    """The URL of an image part, None for text. Raises `InvalidRequest` for anything else."""
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise errors.InvalidRequest("a content part must be an object with a type", param=place)
    kind = part["type"]
    if "uuid" in part:
        raise errors.InvalidRequest("uuid is not accepted in a content part", param=f"{place}.uuid")
    if kind in _TEXT_PARTS:
        if not isinstance(part.get(_TEXT_PARTS[kind]), str):
            raise errors.InvalidRequest(f"a part of type {kind} needs the string {_TEXT_PARTS[kind]}", param=place)
        return None
    if kind != "image_url":
        raise errors.InvalidRequest(f"content of type {kind[:40]!r} is not accepted; use text or image_url", param=place)
    image = part.get("image_url")
    url = image.get("url") if isinstance(image, dict) else None
    if not isinstance(url, str) or not url:
        raise errors.InvalidRequest('image_url must be an object: {"url": "https://… or data:image/…"}', param=place)
    return url


def replace(parts: Sequence[ImagePart], keys: Sequence[str], tokens: Sequence[int]) -> None:
    """Put in place of every image, inside the body it came from, the key of its embedding and its number of tokens."""
    for part, key, count in zip(parts, keys, tokens, strict=True):
        part.content[part.index] = {
            "type": "image_embeds",
            "image_embeds": {"image_num_tokens": [count]},
            "uuid": key,
        }  # fmt: skip


def text_prompt(body: dict[str, Any]) -> None:
    """Check the prompt of /v1/completions, which takes text or token ids. Raises `InvalidRequest`."""
    prompt = body.get("prompt")
    if not isinstance(prompt, str | list) or prompt == []:
        raise errors.InvalidRequest("prompt must be a string or a list", param="prompt")
