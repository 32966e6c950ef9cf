"""Anthropic's `/v1/messages` and `/v1/messages/count_tokens`. Images are `image` blocks with a source."""

from collections.abc import Iterator
from typing import Any

from common import errors
from common.embedding_ref import EmbeddingRef
from server.apis.base import Api
from server.apis.documents import convert_documents
from server.apis.image_options import OPTION_KEYS, RequestPolicy, check_keys, parse_image_options, parse_router
from server.apis.request import ImagePart, Path, check_images, check_text, format_path, type_of
from server.http import json_body
from server.http.error_format import ANTHROPIC

_IMAGE_KEYS = ("type", "source", *OPTION_KEYS, "cache_control")


def find_images(body: dict[str, Any], policy: RequestPolicy) -> list[ImagePart]:
    """Find the image blocks, those in tools' results included. Raises `InvalidRequest` or `TooManyImages`."""
    router = parse_router(body.get("vir"), policy.router, policy)
    images = []
    for path, block, role in _blocks(body):
        if type_of(block) == "text":
            check_text(block, "text", format_path(path))
        if isinstance(block, dict) and block.get("type") == "image":
            location = format_path(path)
            if role != "user":  # vLLM would drop the image silently, or print it as text
                raise errors.InvalidRequest(f"{location}: images are supported in user messages only.", param=location)
            url = _image_url(block.get("source"), location)
            check_keys(block, _IMAGE_KEYS, location)
            images.append(ImagePart(path, url, parse_image_options(block, location, router, policy)))
    check_images(images, policy, "messages")
    return images


def image_url_block(key: str, tokens: int) -> dict[str, Any]:
    """Return an image block with the URL of an embedding: this API of vLLM takes images by URL only."""
    return {"type": "image", "source": {"type": "url", "url": EmbeddingRef(key, tokens).url}}


def _blocks(body: dict[str, Any]) -> Iterator[tuple[Path, Any, Any]]:
    """Yield path, block and role of every content block."""
    for path, block in _elements(("system",), body.get("system")):
        yield path, block, "system"
    for message_path, message in _elements(("messages",), body.get("messages")):
        if not isinstance(message, dict):
            location = format_path(message_path)
            raise errors.InvalidRequest(f"{location} must be an object with role and content.", param=location)
        for path, block in _elements((*message_path, "content"), message.get("content")):
            yield path, block, message.get("role")
            if isinstance(block, dict) and block.get("type") == "tool_result":
                for inner_path, inner in _elements((*path, "content"), block.get("content")):
                    yield inner_path, inner, message.get("role")


def _elements(path: Path, value: Any) -> Iterator[tuple[Path, Any]]:
    for i, element in enumerate(value if isinstance(value, list) else []):
        yield (*path, i), element


def _image_url(source: Any, location: str) -> str:
    source_type = type_of(source)
    if source_type == "url" and isinstance(source.get("url"), str) and source["url"]:
        return str(source["url"])
    if source_type == "base64" and isinstance(source.get("data"), str) and isinstance(source.get("media_type", ""), str):
        return f"data:{source.get('media_type', '')};base64,{source['data']}"
    raise errors.InvalidRequest(
        f"{location}: source of type {json_body.quote(source_type)} is not supported; expected "
        '{"type": "base64", "media_type": "image/png", "data": "…"} or {"type": "url", "url": "https://…"}.',
        param=f"{location}.source",
    )


_EXAMPLE: dict[str, Any] = {
    "model": "InternVL3_5-8B-Flash",
    "max_tokens": 64,
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "image", "source": {"type": "url", "url": "https://example.org/photo.jpg"}},
                {"type": "text", "text": "What is in the picture?"},
            ],
        }
    ],
}

APIS = (
    Api(
        path="/v1/messages",
        summary="Answer a conversation with images (Anthropic Messages)",
        example=_EXAMPLE,
        prepare=convert_documents,
        find_images=find_images,
        placeholder=image_url_block,
        error_format=ANTHROPIC,
        generates_text=True,
        max_tokens_fields=("max_tokens",),
    ),
    Api(
        path="/v1/messages/count_tokens",
        summary="Count the tokens of a conversation with images (Anthropic)",
        example={name: value for name, value in _EXAMPLE.items() if name != "max_tokens"},
        prepare=convert_documents,
        find_images=find_images,
        placeholder=image_url_block,
        error_format=ANTHROPIC,
    ),
)
