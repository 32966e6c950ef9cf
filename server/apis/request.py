"""What the bodies of all APIs have in common: parsed, checked, their images found, and these replaced for the engine."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from common import errors
from server.apis.image_options import Allowed, Dial
from server.http.json_body import parse_object

Path = tuple[str | int, ...]
"""From the body to a value in it: names and numbers."""

_NOT_FROM_CALLERS = (
    "mm_processor_kwargs", "media_io_kwargs", "chat_template", "kv_transfer_params", "ec_transfer_params", "vllm_xargs",
    "prompt_embeds", "mm_payload", "return_mm_kwargs",
)  # fmt: skip
MEDIA = frozenset({
    "audio_embeds", "audio_url", "file", "image_embeds", "image_pil", "image_url", "input_audio", "input_image",
    "prompt_embeds", "uuid", "video_embeds", "video_url",
})  # fmt: skip
"""The engine looks for these whatever the type of a part says."""
_PROMPTED = (
    "messages", "input", "instructions", "system", "tools", "functions", "documents", "chat_template_kwargs",
)  # fmt: skip
_PLACEHOLDERS = ("<image>", "<IMG_CONTEXT>")


@dataclass(frozen=True)
class Image:
    """An image of a request: where its part is in the body, its file, and how it is to be cut and routed.

    `frames`: more than 0 for a video, how many images are to be made of it. Those have its path, and a `label` before each.
    """

    path: Path
    url: str
    dial: Dial
    frames: int = 0
    label: str = ""


def by_number(key: str, tokens: int) -> dict[str, Any]:
    """A part of a chat that stands for an image: its key and its number of visual tokens."""
    return {"type": "image_embeds", "image_embeds": {"image_num_tokens": [tokens]}, "uuid": key}


@dataclass(frozen=True)
class Asked:
    """A parsed body and its images as they follow each other; `replaced` makes the engine's, with `stand_in` for each."""

    raw: bytes
    body: dict[str, Any]
    images: list[Image] = field(default_factory=list)
    stand_in: Callable[[str, int], dict[str, Any]] = by_number

    @property
    def model(self) -> str | None:
        return self.body.get("model")

    def replaced(self, keys: Sequence[str], tokens: Sequence[int]) -> bytes:
        """The body without `vir`, each image part replaced by its key and number of visual tokens, a video's by its frames."""
        if not self.images and "vir" not in self.body:
            return self.raw
        body = {name: value for name, value in self.body.items() if name != "vir"}
        parts: dict[Path, list[dict[str, Any]]] = {}
        for image, key, count in zip(self.images, keys, tokens, strict=True):
            label = [{"type": "text", "text": image.label}] if image.label else []
            parts.setdefault(image.path, []).extend([*label, self.stand_in(key, count)])
        for path, new in reversed(parts.items()):  # from the end: the places before stay where they are
            body = _with(body, path, new)
        try:
            return json.dumps(body, ensure_ascii=False).encode()
        except RecursionError:
            raise errors.InvalidRequest("the body is nested too deeply") from None


def _with(value: Any, path: Path, new: list[dict[str, Any]]) -> Any:
    """A copy of `value`, as deep as it must be, with `new` for the one element of a list that is at the path."""
    copied, (step, *rest) = value.copy(), path
    if rest:
        copied[step] = _with(value[step], tuple(rest), new)
    else:
        assert isinstance(step, int)
        copied[step : step + 1] = new
    return copied


def place(path: Path) -> str:
    """A path as callers write it: `messages[0].content[1]`."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)[1:]


def parse_text(raw: bytes, _allowed: Allowed) -> Asked:
    """A body without images."""
    body = parse_object(raw)
    check_fields(body)
    return Asked(raw, body)


def check_fields(body: Mapping[str, Any], refused: Collection[str] = ()) -> None:
    """Refuse a model that is no name, and what only the operator may set. Raises `InvalidRequest`."""
    if not isinstance(body.get("model"), str | None):
        raise errors.InvalidRequest(f"model must be a string, not {type(body['model']).__name__}", param="model")
    for name in (*_NOT_FROM_CALLERS, *refused):
        if body.get(name) is not None:
            raise errors.InvalidRequest(f"{name} is not accepted from callers: leave it out", param=name)


def check_images(body: dict[str, Any], images: Sequence[Image], allowed: Allowed, named: str) -> None:
    """Not too many, and nothing beside them that could be taken for one. Raises `TooManyImages`, `InvalidRequest`."""
    count = sum(image.frames or 1 for image in images)
    if count > allowed.max_images:
        frames = ", frames of videos counted" if count > len(images) else ""
        said = f"{count} images in one request{frames}, at most {allowed.max_images} are served"
        raise errors.TooManyImages(said, param=named)
    if images:
        _refuse_placeholders(body, {id(_at(body, image.path)) for image in images})


def _at(value: Any, path: Path) -> Any:
    for step in path:
        value = value[step]
    return value


def _refuse_placeholders(body: dict[str, Any], images: Collection[int]) -> None:
    """The engine finds the place of an image by a word; nothing else that a prompt is made of may hold it."""
    for name in _PROMPTED:
        for where, text in _texts(name, body.get(name), images):
            for word in _PLACEHOLDERS:
                if word in text:
                    raise errors.InvalidRequest(
                        f"{where} holds {word!r}, which marks the place of an image: put an image there", param=where
                    )


def _texts(where: str, value: Any, images: Collection[int]) -> Iterator[tuple[str, str]]:
    """Every string in a value but those of image parts (by their identity), the names of fields too; and its place."""
    waiting = [(where, value)]  # no recursion: the caller decides how deep it would go
    while waiting:
        at, found = waiting.pop()
        if isinstance(found, str):
            yield at, found
        elif isinstance(found, list):
            waiting += [(f"{at}[{i}]"[:200], inner) for i, inner in enumerate(found)]
        elif isinstance(found, dict) and id(found) not in images:
            waiting += [(at, name) for name in found]
            waiting += [(f"{at}.{name}"[:200], inner) for name, inner in found.items()]
