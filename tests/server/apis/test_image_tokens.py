"""Bodies of `/v1/images/tokens`."""

import json
from typing import Any

import pytest

from common import errors
from protos import vision_pb2 as pb
from server.apis import image_tokens
from server.apis.image_options import RequestPolicy
from tests.server.fakes.requests import chat, image_file, image_part, text_part

parse_images = image_tokens.APIS[0].parse

URL = "https://example.org/a.png"


def parse(body: Any, max_images: int = 4) -> Any:
    return parse_images(json.dumps(body).encode(), RequestPolicy(max_images))


def test_each_image_of_a_list_has_its_own_options() -> None:
    off, original = {"mode": "off"}, {"url": URL, "detail": "original", "max_dynamic_patch": 9, "vir": {"mode": "all"}}
    request = parse({"model": "m", "images": [{"url": URL}, original], "vir": off, "route": True})
    assert [image.url for image in request.images] == [URL, URL]
    assert [image.options.router.mode for image in request.images] == [pb.Router.OFF, pb.Router.ALL]
    assert (request.images[1].options.detail, request.images[1].options.max_tiles, request.images[1].options.location) == (
        "original",
        9,
        "images[1]",
    )
    assert request.model == "m"


def test_all_images_of_a_chat_are_found() -> None:
    part = image_part(image_file())
    assert len(parse({**chat(part, text_part("a"), part), "temperature": 0.5}).images) == 2
    assert parse(chat("no image")).images == []
    assert len(parse({"images": [{"url": URL}], "route": None}).images) == 1


INVALID_BODIES: dict[str, tuple[Any, str]] = {
    "neither images nor messages": ({}, "images"),
    "both images and messages": ({**chat("a"), "images": [{"url": URL}]}, "images"),
    "images not a list": ({"images": {"url": URL}}, "images"),
    "images null": ({"images": None}, "images"),
    "images empty": ({"images": []}, "images"),
    "image as a string": ({"images": [URL]}, "images[0]"),
    "URL missing": ({"images": [{"url": URL}, {"detail": "low"}]}, "images[1]"),
    "URL empty": ({"images": [{"url": ""}]}, "images[0]"),
    "URL number": ({"images": [{"url": 5}]}, "images[0]"),
    "unknown field of an image": ({"images": [{"url": URL, "detial": "low"}]}, "images[0].detial"),
    "unknown field": ({"images": [{"url": URL}], "routes": True}, "routes"),
    "unknown detail": ({"images": [{"url": URL, "detail": "max"}]}, "images[0].detail"),
    "route number": ({"images": [{"url": URL}], "route": 1}, "route"),
    "too many images": ({"images": [{"url": URL}] * 5}, "images"),
    "messages empty": ({"messages": []}, "messages"),
}


@pytest.mark.parametrize(("body", "param"), INVALID_BODIES.values(), ids=INVALID_BODIES)
def test_an_invalid_body_is_rejected_with_its_location(body: Any, param: str) -> None:
    with pytest.raises(errors.InvalidRequest) as error_info:
        parse(body)
    assert error_info.value.param == param
