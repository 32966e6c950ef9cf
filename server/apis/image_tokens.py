"""Our own `/v1/images/tokens`: tiles and visual tokens of images before they are used, in a list or in a chat."""

from typing import Any

from common import errors
from server.apis import chat
from server.apis.base import Api
from server.apis.chat_parts import prepare_chat
from server.apis.image_options import (
    OPTION_KEYS,
    RequestPolicy,
    check_keys,
    parse_image_options,
    parse_router,
    unexpected_value,
)
from server.apis.request import ImagePart, check_images
from server.pipeline import Pipeline

_FIELDS = ("model", "images", "vir", "route")
_IMAGE_FIELDS = ("url", *OPTION_KEYS)


def find_images(body: dict[str, Any], policy: RequestPolicy) -> list[ImagePart]:
    """Find the images in `images` or `messages`. Raises `InvalidRequest` or `TooManyImages`, with the location."""
    if type(body.get("route", False)) is not bool:
        raise unexpected_value("route", "true or false", body["route"], "omit it for false.")
    if ("images" in body) == ("messages" in body):
        raise errors.InvalidRequest("The body must have either images, or messages with image parts.", param="images")
    return chat.find_images(body, policy) if "messages" in body else _listed_images(body, policy)


def _listed_images(body: dict[str, Any], policy: RequestPolicy) -> list[ImagePart]:
    check_keys(body, _FIELDS, "")
    router, values = parse_router(body.get("vir"), policy.router, policy), body["images"]
    if not isinstance(values, list) or not values:
        raise errors.InvalidRequest("images must be a list with at least one image.", param="images")
    images = []
    for i, image in enumerate(values):
        location = f"images[{i}]"
        if not isinstance(image, dict) or not isinstance(image.get("url"), str) or not image["url"]:
            raise errors.InvalidRequest(f'{location} must be an object {{"url": "data:… or https://…"}}.', param=location)
        check_keys(image, _IMAGE_FIELDS, location)
        options = parse_image_options(image, location, router, policy)
        images.append(ImagePart(("images", i), image["url"], options))
    check_images(images, policy, "images")
    return images


APIS = (
    Api(
        path="/v1/images/tokens",
        summary="Compute tiles and visual tokens of images",
        example={"model": "InternVL3_5-8B-Flash", "images": [{"url": "https://example.org/photo.jpg"}], "route": False},
        prepare=prepare_chat,
        find_images=find_images,
        respond=Pipeline.count_image_tokens,
    ),
)
