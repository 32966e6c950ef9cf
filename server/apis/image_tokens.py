"""Bodies of `/v1/images/tokens`: a list of images, or a chat with some."""

from typing import Any

from common import errors
from server.apis.chat import chat_images
from server.apis.image_options import Allowed, read_dial, read_router, shown
from server.apis.request import Asked, Image, check_fields, check_images
from server.http.json_body import parse_object

_FIELDS = ("model", "images", "vir", "route")
_OF_AN_IMAGE = ("url", "detail", "max_dynamic_patch", "vir")


def parse_images(raw: bytes, allowed: Allowed) -> Asked:
    """With `route` in the body true or false, or absent. Raises `InvalidRequest` or `TooManyImages`."""
    body = parse_object(raw)
    check_fields(body)
    if type(body.get("route", False)) is not bool:
        raise errors.InvalidRequest(f"route {shown(body['route'])} is not true or false", param="route")
    if ("images" in body) == ("messages" in body):
        raise errors.InvalidRequest("the body must have images, or messages with image parts, and not both", param="images")
    return Asked(raw, body, chat_images(body, allowed) if "messages" in body else _listed(body, allowed))


def _listed(body: dict[str, Any], allowed: Allowed) -> list[Image]:
    _refuse_unknown(body, _FIELDS, "")
    router, given = read_router(body.get("vir"), allowed.router, allowed), body["images"]
    if not isinstance(given, list) or not given:
        raise errors.InvalidRequest("images must be a list with at least one image", param="images")
    images = []
    for i, image in enumerate(given):
        where = f"images[{i}]"
        if not isinstance(image, dict) or not isinstance(image.get("url"), str) or not image["url"]:
            raise errors.InvalidRequest(f'{where} must read {{"url": "data:… or https://…"}}', param=where)
        _refuse_unknown(image, _OF_AN_IMAGE, f"{where}.")
        images.append(Image(("images", i), image["url"], read_dial(image, where, router, allowed)))
    check_images(body, images, allowed, "images")
    return images


def _refuse_unknown(given: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    if unknown := given.keys() - set(known):
        name = min(unknown)
        expected = ", ".join(known)
        raise errors.InvalidRequest(f"{where}{name[:100]} is not known; expected {expected}", param=f"{where}{name[:100]}")
