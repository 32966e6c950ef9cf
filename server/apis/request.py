"""Parsed requests, and the checks that all APIs share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import UnionType
from typing import Any

from common import errors
from server.apis.image_options import ImageOptions, RequestPolicy
from server.http import json_body

Path = tuple[str | int, ...]
"""Keys and indices that lead from the body to a value in it."""

_OPERATOR_FIELDS = (
    "mm_processor_kwargs", "media_io_kwargs", "chat_template", "kv_transfer_params", "ec_transfer_params", "vllm_xargs",
    "prompt_embeds", "mm_payload", "return_mm_kwargs",
)  # fmt: skip
"""Fields of vLLM that would let a caller change what only the operator may decide."""

_OBJECT_FIELDS = ("chat_template_kwargs", "structured_outputs")
"""Fields that vLLM reads as objects without a look at what they are."""

_TEMPLATE_PARAMETERS = (
    "chat_template", "conversation", "max_length", "messages", "padding", "return_assistant_tokens_mask", "return_dict",
    "return_tensors", "self", "tokenize", "tokenizer_kwargs", "tools", "truncation",
)  # fmt: skip
"""Parameters of `apply_chat_template` in transformers, which are no variables of a template: vLLM sets them itself."""

_MAX_SALT_LENGTH = 1024
"""vLLM's own bound."""

MEDIA_FIELDS = frozenset({
    "audio_embeds", "audio_url", "file", "image_embeds", "image_pil", "image_url", "input_audio", "input_image",
    "prompt_embeds", "uuid", "video_embeds", "video_url",
})  # fmt: skip
"""Fields that vLLM reads from a content part whatever the part's type is."""


@dataclass(frozen=True)
class ImagePart:
    """An image or a video of a request.

    Attributes:
        path: Where its content part is in the body.
        url: A `data:` URL or an https URL.
        options: Its tiling and router options.
        frames: For a video, the number of frames to sample; 0 for an image. The frames become images with the same path.
        label: Text that precedes the image in the prompt.
    """

    path: Path
    url: str
    options: ImageOptions
    frames: int = 0
    label: str = ""


Placeholder = Callable[[str, int], dict[str, Any]]
"""Makes the content part that replaces an image in vLLM's body, from its embedding key and its number of visual tokens."""


def embedding_part(key: str, tokens: int) -> dict[str, Any]:
    """Return vLLM's `image_embeds` content part with a number of visual tokens; the key is the item's uuid."""
    return {"type": "image_embeds", "image_embeds": {"image_num_tokens": [tokens]}, "uuid": key}


@dataclass(frozen=True)
class ParsedRequest:
    """A request body, its images in the order in which they occur, and the number of sequences that it generates."""

    raw: bytes
    body: dict[str, Any]
    images: list[ImagePart] = field(default_factory=list)
    placeholder: Placeholder = embedding_part
    sequences: int = 1

    @property
    def model(self) -> str | None:
        """The model that the request names."""
        return self.body.get("model")

    def with_embeddings(
        self, keys: Sequence[str], tokens: Sequence[int], cache_salt: Callable[[str], str] | None = None
    ) -> bytes:
        """Return the body for vLLM: salted, without `vir`, and each image replaced by its placeholder, a video by its frames'.

        Args:
            keys: Embedding key of each image.
            tokens: Number of visual tokens of each image.
            cache_salt: Makes the salt of vLLM's prefix cache from the caller's own; None: vLLM generates nothing.
        """
        salt = _salt(self.body, cache_salt)
        if not self.images and not {"vir", *salt} & self.body.keys():
            return _with_first_field(self.raw, salt)
        body = {name: value for name, value in self.body.items() if name != "vir"} | salt
        parts: dict[Path, list[dict[str, Any]]] = {}
        for image, key, count in zip(self.images, keys, tokens, strict=True):
            label = [{"type": "text", "text": image.label}] if image.label else []
            parts.setdefault(image.path, []).extend([*label, self.placeholder(key, count)])
        for path, replacement in reversed(parts.items()):  # last first: the paths of earlier parts stay valid
            body = _replace_part(body, path, replacement)
        return json_body.encode(body)


def _salt(body: Mapping[str, Any], cache_salt: Callable[[str], str] | None) -> dict[str, str]:
    """Return the field that salts vLLM's prefix cache; none if the caller's own is invalid, so that vLLM says what is wrong."""
    own = body.get("cache_salt")
    is_invalid = own is not None and not (isinstance(own, str) and 0 < len(own) <= _MAX_SALT_LENGTH)
    return {} if cache_salt is None or is_invalid else {"cache_salt": cache_salt(own or "")}


def _with_first_field(raw: bytes, fields: dict[str, str]) -> bytes:
    """Return the text of a JSON object with further fields, without encoding all of it once more."""
    if not fields:
        return raw
    head, _, tail = raw.partition(b"{")
    comma = b"" if tail.lstrip().startswith(b"}") else b","
    return head + json_body.encode(fields)[:-1] + comma + tail


def _replace_part(value: Any, path: Path, replacement: list[dict[str, Any]]) -> Any:
    """Return a copy of `value`, copied only along `path`, with `replacement` in place of the list element at `path`."""
    copy, (step, *rest) = value.copy(), path
    if rest:
        copy[step] = _replace_part(value[step], tuple(rest), replacement)
    else:
        assert isinstance(step, int)
        copy[step : step + 1] = replacement
    return copy


def type_of(part: Any) -> Any:
    """Return the `type` of a content part or another object of a request; None if it is no object."""
    return part.get("type") if isinstance(part, dict) else None


def convert_list(value: dict[str, Any], name: str, convert: Callable[[Any, int], Any]) -> dict[str, Any]:
    """Return an object with each item of one of its lists converted.

    Args:
        value: The object.
        name: The list's name. Without such a list, `value` itself is returned.
        convert: Gets an item and its index. If it returns each item itself, `value` itself is returned.
    """
    items = value.get(name)
    if not isinstance(items, list):
        return value
    converted = [convert(item, i) for i, item in enumerate(items)]
    is_changed = any(new is not old for new, old in zip(converted, items, strict=True))
    return {**value, name: converted} if is_changed else value


def format_path(path: Path) -> str:
    """Format a path as callers write it: `messages[0].content[1]`."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)[1:]


def check_type(owner: Mapping[str, Any], name: str, types: type | UnionType, expected: str, location: str = "") -> None:
    """Check the type of a field, which may be absent or null. Raises `InvalidRequest`.

    Args:
        owner: The object that has the field.
        name: The field.
        types: Its types.
        expected: What they are called in messages.
        location: Where the object is in the body; nothing for the body itself.
    """
    if (value := owner.get(name)) is not None:
        check_item(value, types, expected, f"{location}.{name}" if location else name)


def check_item(value: Any, types: type | UnionType, expected: str, location: str) -> None:
    """Check the type of a value that must be there. Raises `InvalidRequest`, see `check_type`."""
    if not isinstance(value, types):
        raise errors.InvalidRequest(f"{location} is {json_body.quote(value)}: expected {expected}.", param=location)


def check_text(part: Mapping[str, Any], name: str, location: str) -> None:
    """Check the text of a content part: vLLM would name a place in its own classes. Raises `InvalidRequest`.

    Args:
        part: The content part.
        name: The field that has its text.
        location: Where the part is in the body.
    """
    location = f"{location}.{name}"
    if name not in part:
        raise errors.InvalidRequest(f"{location} is missing: expected a string.", param=location)
    check_item(part[name], str, "a string", location)


def without_nulls(body: dict[str, Any]) -> dict[str, Any]:
    """Return the body without fields that are null, or the same body: some of vLLM's fields are optional, but not nullable."""
    return {name: value for name, value in body.items() if value is not None} if None in body.values() else body


def check_fields(body: Mapping[str, Any]) -> None:
    """Check the fields that all APIs share.

    Raises:
        InvalidRequest: `model` is not a string, a field is set that is reserved for the operator, or variables of the chat
            template or constraints are no objects.
    """
    check_type(body, "model", str, "a string")
    for name in _OPERATOR_FIELDS:
        if body.get(name) is not None:
            raise errors.InvalidRequest(f"{name} is reserved for the operator: omit it.", param=name)
    for name in _OBJECT_FIELDS:
        check_type(body, name, dict, "an object")
    check_type(body, "tools", list, "a list")
    stop = body.get("stop")
    for i, text in enumerate(stop if isinstance(stop, list) else ()):
        check_item(text, str, "a string", f"stop[{i}]")
    _check_template_variables(body.get("chat_template_kwargs") or {})


def _check_template_variables(variables: Mapping[str, Any]) -> None:
    check_type(variables, "documents", list, "a list", "chat_template_kwargs")
    if reserved := next((name for name in _TEMPLATE_PARAMETERS if name in variables), None):
        own = f"send {reserved} as a field of the request" if reserved in ("messages", "tools") else "omit it"
        param = f"chat_template_kwargs.{reserved}"
        raise errors.InvalidRequest(f"{param} is not a variable of the chat template: {own}.", param=param)


def check_images(images: Sequence[ImagePart], policy: RequestPolicy, param: str) -> None:
    """Check the number of images. Raises `TooManyImages` if the request has more than the policy allows."""
    count = sum(image.frames or 1 for image in images)
    if count > policy.max_images:
        frames = " (frames of videos counted)" if count > len(images) else ""
        raise errors.TooManyImages(
            f"The request has {count} images{frames}; the maximum is {policy.max_images} (--max-images).", param=param
        )
