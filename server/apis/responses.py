"""Bodies of `/v1/responses`. Its images are parts of type `input_image`, of messages and of what tools gave."""

from collections.abc import Iterator
from typing import Any

from common import errors
from common.embedding_ref import EmbeddingRef
from server.apis.image_options import Allowed, read_dial, read_router, shown
from server.apis.request import MEDIA, Asked, Image, Path, check_fields, check_images, place
from server.http.json_body import parse_object

_TEXTS = {"input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text"}
_KEPT = ("previous_response_id", "previous_input_messages", "background")


def parse_responses(raw: bytes, allowed: Allowed) -> Asked:
    """Raises `InvalidRequest` or `TooManyImages`, naming the place."""
    body = parse_object(raw)
    check_fields(body)
    for name in _KEPT:
        if body.get(name):
            said = f"{name} is not served: no response is kept here; send the whole conversation in input"
            raise errors.InvalidRequest(said, param=name)
    router = read_router(body.get("vir"), allowed.router, allowed)
    images = [
        Image(path, part["image_url"], read_dial(part, place(path), router, allowed))
        for path, part in _parts(body.get("input"))
        if _is_image(part, place(path))
    ]
    check_images(body, images, allowed, "input")
    return Asked(raw, body, images, _by_url)


def _by_url(key: str, tokens: int) -> dict[str, Any]:
    """The engine takes no embedding here, but an image by its URL."""
    return {"type": "input_image", "detail": "auto", "image_url": EmbeddingRef(key, tokens).url}


def _parts(given: Any) -> Iterator[tuple[Path, Any]]:
    for i, item in enumerate(given if isinstance(given, list) else []):
        for name in ("content", "output"):
            parts = item.get(name) if isinstance(item, dict) else None
            for j, part in enumerate(parts if isinstance(parts, list) else []):
                yield ("input", i, name, j), part


def _is_image(part: Any, where: str) -> bool:
    """Raises `InvalidRequest` where it is something that may not pass."""
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in {*_TEXTS, "input_image"}:
        raise errors.InvalidRequest(
            f"{where}: type {shown(kind)} is not served; expected input_text or input_image", param=where
        )
    if foreign := sorted(MEDIA & part.keys() - ({"image_url"} if kind == "input_image" else set())):
        raise errors.InvalidRequest(f"{where}: {foreign[0]} is not accepted in a part of type {kind}", param=where)
    if kind == "input_image" and (not isinstance(part.get("image_url"), str) or not part["image_url"]):
        raise errors.InvalidRequest(f'{where}: image_url must be "data:…" or "https://…"; files are not kept here', param=where)
    return kind == "input_image"
