"""OpenAI's `/v1/responses`. Images are `input_image` parts of messages and of tools' outputs."""

from collections.abc import Iterator
from typing import Any

from common import errors
from common.embedding_ref import EmbeddingRef
from server.apis.base import Api
from server.apis.image_options import OPTION_KEYS, RequestPolicy, check_keys, parse_image_options, parse_router
from server.apis.request import MEDIA_FIELDS, ImagePart, Path, check_images, check_text, convert_list, format_path, type_of
from server.http import json_body
from server.http.error_format import OPENAI_RESPONSES

_TEXT_TYPES = {"input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text"}
_IMAGE_KEYS = ("type", "image_url", *OPTION_KEYS, "cache_control")
_STATEFUL_FIELDS = ("previous_response_id", "previous_input_messages", "background")


def join_replies(body: dict[str, Any]) -> dict[str, Any]:
    """Return a body in which each message of the assistant has one part of text, the only one that vLLM reads.

    Raises:
        InvalidRequest: Such a message has an image, which vLLM would leave out silently.
    """
    return convert_list(body, "input", lambda item, i: _join_reply(item, ("input", i)))


def _join_reply(item: Any, path: Path) -> Any:
    """Return the item with its parts joined, a refusal as its text; the same item if vLLM reads it completely."""
    if not isinstance(item, dict) or item.get("role") != "assistant" or item.get("type", "message") != "message":
        return item
    parts = item.get("content")
    if not isinstance(parts, list) or (len(parts) == 1 and type_of(parts[0]) in ("output_text", "input_text", "text")):
        return item
    texts = [_reply_text(part, format_path((*path, "content", j))) for j, part in enumerate(parts)]
    return {**item, "content": [{"type": "output_text", "text": "".join(texts), "annotations": []}]}


def _reply_text(part: Any, location: str) -> str:
    text = part.get("refusal" if part.get("type") == "refusal" else "text") if isinstance(part, dict) else None
    if not isinstance(text, str):
        raise errors.InvalidRequest(
            f"{location}: a part of type {json_body.quote(type_of(part))} is not supported in a message of the assistant; "
            "expected output_text with a text, or refusal.",
            param=location,
        )
    return text


def find_images(body: dict[str, Any], policy: RequestPolicy) -> list[ImagePart]:
    """Find the images in `input`. Raises `InvalidRequest` or `TooManyImages`, with the location."""
    for name in _STATEFUL_FIELDS:
        if body.get(name):
            raise errors.InvalidRequest(
                f"{name} is not supported: responses are not stored; send the whole conversation in input.", param=name
            )
    router = parse_router(body.get("vir"), policy.router, policy)
    images = [
        ImagePart(path, part["image_url"], parse_image_options(part, format_path(path), router, policy))
        for path, part in _content_parts(body.get("input"))
        if _is_image(part, format_path(path))
    ]
    check_images(images, policy, "input")
    return images


def image_url_part(key: str, tokens: int) -> dict[str, Any]:
    """Return an image part with the URL of an embedding: this API of vLLM takes images by URL only."""
    return {"type": "input_image", "detail": "auto", "image_url": EmbeddingRef(key, tokens).url}


def _content_parts(value: Any) -> Iterator[tuple[Path, Any]]:
    for i, item in enumerate(value if isinstance(value, list) else []):
        for name in ("content", "output"):
            parts = item.get(name) if isinstance(item, dict) else None
            for j, part in enumerate(parts if isinstance(parts, list) else []):
                yield ("input", i, name, j), part


def _is_image(part: Any, location: str) -> bool:
    """Return whether a content part is an image. Raises `InvalidRequest` if it is not supported."""
    part_type = type_of(part)
    if not isinstance(part_type, str) or part_type not in {*_TEXT_TYPES, "input_image"}:
        raise errors.InvalidRequest(
            f"{location}: type {json_body.quote(part_type)} is not supported; expected input_text or input_image.",
            param=location,
        )
    if foreign := sorted(MEDIA_FIELDS & part.keys() - ({"image_url"} if part_type == "input_image" else set())):
        raise errors.InvalidRequest(f"{location}: {foreign[0]} is not allowed in a part of type {part_type}.", param=location)
    if part_type == "input_image" and (not isinstance(part.get("image_url"), str) or not part["image_url"]):
        raise errors.InvalidRequest(
            f'{location}: image_url must be "data:…" or "https://…"; uploaded files are not supported.', param=location
        )
    if part_type == "input_image":
        check_keys(part, _IMAGE_KEYS, location)
    else:
        check_text(part, "refusal" if part_type == "refusal" else "text", location)
    return part_type == "input_image"


APIS = (
    Api(
        path="/v1/responses",
        summary="Answer a conversation with images (OpenAI Responses)",
        example={
            "model": "InternVL3_5-8B-Flash",
            "input": [
                {
                    "role": "user",
                    "content": [
                        {"type": "input_image", "image_url": "https://example.org/photo.jpg"},
                        {"type": "input_text", "text": "What is in the picture?"},
                    ],
                }
            ],
        },
        prepare=join_replies,
        find_images=find_images,
        placeholder=image_url_part,
        error_format=OPENAI_RESPONSES,
        generates_text=True,
        max_tokens_fields=("max_output_tokens",),
    ),
)
