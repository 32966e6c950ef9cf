"""Bodies of Anthropic's `/v1/messages` and `/v1/messages/count_tokens`. Their images are blocks with a source."""

from collections.abc import Iterator
from typing import Any

from common import errors
from common.embedding_ref import EmbeddingRef
from server.apis.image_options import Allowed, read_dial, read_router, shown
from server.apis.request import Asked, Image, Path, check_fields, check_images, place
from server.http.json_body import parse_object


def parse_messages(raw: bytes, allowed: Allowed) -> Asked:
    """Raises `InvalidRequest` or `TooManyImages`, naming the place."""
    body = parse_object(raw)
    check_fields(body)
    router = read_router(body.get("vir"), allowed.router, allowed)
    images = []
    for path, block, role in _blocks(body):
        if isinstance(block, dict) and block.get("type") == "image":
            where = place(path)
            if role != "user":  # the engine would drop it without a word, or write it down
                raise errors.InvalidRequest(f"{where}: images are served in messages of the user only", param=where)
            images.append(Image(path, _url(block.get("source"), where), read_dial(block, where, router, allowed)))
    check_images(body, images, allowed, "messages")
    return Asked(raw, body, images, _by_url)


def _by_url(key: str, tokens: int) -> dict[str, Any]:
    """The engine takes no embedding here, but an image by its URL."""
    return {"type": "image", "source": {"type": "url", "url": EmbeddingRef(key, tokens).url}}


def _blocks(body: dict[str, Any]) -> Iterator[tuple[Path, Any, Any]]:
    """Every content block, those of tools' results too, and who says it."""
    for path, block in _listed(("system",), body.get("system")):
        yield path, block, "system"
    for at, message in _listed(("messages",), body.get("messages")):
        if not isinstance(message, dict):
            raise errors.InvalidRequest(f"{place(at)} must be an object with role and content", param="messages")
        for path, block in _listed((*at, "content"), message.get("content")):
            yield path, block, message.get("role")
            if isinstance(block, dict) and block.get("type") == "tool_result":
                for inner_path, inner in _listed((*path, "content"), block.get("content")):
                    yield inner_path, inner, message.get("role")


def _listed(path: Path, value: Any) -> Iterator[tuple[Path, Any]]:
    for i, inner in enumerate(value if isinstance(value, list) else []):
        yield (*path, i), inner


def _url(source: Any, where: str) -> str:
    kind = source.get("type") if isinstance(source, dict) else None
    if kind == "url" and isinstance(source.get("url"), str) and source["url"]:
        return str(source["url"])
    if kind == "base64" and isinstance(source.get("data"), str) and isinstance(source.get("media_type", ""), str):
        return f"data:{source.get('media_type', '')};base64,{source['data']}"
    raise errors.InvalidRequest(
        f'{where}: source of type {shown(kind)} must read {{"type": "base64", "media_type": "image/png", "data": "…"}} or '
        '{"type": "url", "url": "https://…"}',
        param=f"{where}.source",
    )
