"""A chat request's body: what must be looked at in it, what is refused, and the image parts replaced.

`vir`, a field of ours, is read and taken out. All else is the engine's business and passes through as it came.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from protos import vision_pb2 as pb
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
_MODES = ("auto", "off", "all")
_THRESHOLDS = ("relative_threshold", "absolute_threshold")
_CHECKPOINTS = pb.Router()


@dataclass(frozen=True)
class Chat:
    """A parsed body; `replaced` makes the engine's.

    `images` are its image parts in the order of the prompt, `router` decides which of their tiles are compressed.
    """

    raw: bytes
    body: dict[str, Any]
    images: list[dict[str, Any]]
    router: pb.Router = field(default_factory=pb.Router)

    @property
    def model(self) -> str | None:
        return self.body.get("model")

    @property
    def urls(self) -> list[str]:
        return [part["image_url"]["url"] for part in self.images]

    def replaced(self, keys: Sequence[str], tokens: Sequence[int]) -> bytes:
        """The body without `vir`, each image part replaced by its key and number of visual tokens."""
        if not self.images and "vir" not in self.body:
            return self.raw
        body = {name: value for name, value in self.body.items() if name != "vir"}
        if self.images:
            body["messages"] = self._messages(keys, tokens)
        try:
            return json.dumps(body, ensure_ascii=False).encode()
        except RecursionError:
            raise errors.InvalidRequest("the body is nested too deeply") from None

    def _messages(self, keys: Sequence[str], tokens: Sequence[int]) -> list[Any]:
        new = {
            id(part): {"type": "image_embeds", "image_embeds": {"image_num_tokens": [count]}, "uuid": key}
            for part, key, count in zip(self.images, keys, tokens, strict=True)
        }
        return [
            {**message, "content": [new.get(id(part), part) for part in message["content"]]}
            if isinstance(message.get("content"), list)
            else message
            for message in self.body["messages"]
        ]


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


def parse_chat(raw: bytes, max_images: int, own: pb.Router = _CHECKPOINTS) -> Chat:
    """`own` is the operator's setting of the router. Raises `InvalidRequest` or `TooManyImages`, naming the place."""
    body = parse_object(raw)
    check_fields(body)
    router = _router(body.get("vir"), own)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise errors.InvalidRequest("messages must be a list with at least one message", param="messages")
    images = [part for where, part in _parts(messages) if _is_image(where, part)]
    if len(images) > max_images:
        raise errors.TooManyImages(f"{len(images)} images in one request, at most {max_images} are served", param="messages")
    if images:
        _refuse_placeholders(body)
    return Chat(raw, body, images, router)


def check_fields(body: dict[str, Any]) -> None:
    """Refuse a model that is no name, and what only the operator may set. Raises `InvalidRequest`."""
    if not isinstance(body.get("model"), str | None):
        raise errors.InvalidRequest(f"model must be a string, not {type(body['model']).__name__}", param="model")
    for name in _NOT_FROM_CALLERS:
        if body.get(name) is not None:
            raise errors.InvalidRequest(f"{name} is not accepted from callers: leave it out", param=name)


def _router(given: Any, own: pb.Router) -> pb.Router:
    """What `vir` says, and where it says nothing the operator's. Raises `InvalidRequest`."""
    if given is None:
        return own
    if not isinstance(given, dict):
        raise errors.InvalidRequest(f'vir must be an object such as {{"mode": "off"}}, not {_shown(given)}', param="vir")
    if unknown := given.keys() - {"mode", *_THRESHOLDS}:
        known = ", ".join(("mode", *_THRESHOLDS))
        raise errors.InvalidRequest(f"vir has no field {_shown(min(unknown))}; expected {known}", param="vir")
    said = {name: value for name, value in given.items() if value is not None}
    mode = _mode(said["mode"]) if "mode" in said else pb.Router.Mode.Name(own.mode).lower()
    thresholds = {name: _threshold(name, said[name]) for name in _THRESHOLDS if name in said}
    if mode == "auto":
        thresholds = {name: getattr(own, name) for name in _THRESHOLDS if own.HasField(name)} | thresholds
    elif thresholds:
        name, value = next(iter(thresholds.items()))
        raise errors.InvalidRequest(
            f'vir.{name} {value} is only for mode auto, and the mode is {mode}: leave it out, or send "mode": "auto"',
            param=f"vir.{name}",
        )
    return pb.Router(mode=mode.upper(), **thresholds)


def _mode(value: Any) -> str:
    if not isinstance(value, str) or value not in _MODES:
        raise errors.InvalidRequest(
            f"vir.mode {_shown(value)} is not one of {', '.join(_MODES)}; leave it out for the server's own", param="vir.mode"
        )
    return value


def _threshold(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 1:  # a bool is an int, but no threshold
        raise errors.InvalidRequest(
            f"vir.{name} {_shown(value)} is not a number from 0 to 1; leave it out for the server's own", param=f"vir.{name}"
        )
    return float(value)


def _shown(value: Any) -> str:
    """A value for a message: cut, and only the type of what may be deep."""
    return type(value).__name__ if isinstance(value, list | dict) else repr(value)[:100]


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
        raise errors.InvalidRequest(f"{where}: type {_shown(kind)} is not served; expected text or image_url", param=where)
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
