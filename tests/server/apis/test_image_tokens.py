"""What may be asked of the costs of images."""

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


def parsed(body: Any, most: int = 4) -> Any:
    return parse_images(json.dumps(body).encode(), RequestPolicy(most))


def test_a_list_of_images_each_with_its_words() -> None:
    off, hires = {"mode": "off"}, {"url": URL, "detail": "original", "max_dynamic_patch": 9, "vir": {"mode": "all"}}
    made = parsed({"model": "m", "images": [{"url": URL}, hires], "vir": off, "route": True})
    assert [image.url for image in made.images] == [URL, URL]
    assert [image.options.router.mode for image in made.images] == [pb.Router.OFF, pb.Router.ALL]
    assert (made.images[1].options.detail, made.images[1].options.max_tiles, made.images[1].options.location) == (
        "original",
        9,
        "images[1]",
    )
    assert made.model == "m"


def test_a_chat_is_taken_with_all_its_images() -> None:
    part = image_part(image_file())
    assert len(parsed({**chat(part, text_part("a"), part), "temperature": 0.5}).images) == 2
    assert parsed(chat("no image")).images == []


BAD: dict[str, tuple[Any, str]] = {
    "neither": ({}, "images"),
    "both": ({**chat("a"), "images": [{"url": URL}]}, "images"),
    "no list": ({"images": {"url": URL}}, "images"),
    "null": ({"images": None}, "images"),
    "empty": ({"images": []}, "images"),
    "a text": ({"images": [URL]}, "images[0]"),
    "no URL": ({"images": [{"url": URL}, {"detail": "low"}]}, "images[1]"),
    "URL empty": ({"images": [{"url": ""}]}, "images[0]"),
    "URL number": ({"images": [{"url": 5}]}, "images[0]"),
    "an image's field unknown": ({"images": [{"url": URL, "detial": "low"}]}, "images[0].detial"),
    "a field unknown": ({"images": [{"url": URL}], "routes": True}, "routes"),
    "a word unknown": ({"images": [{"url": URL, "detail": "max"}]}, "images[0].detail"),
    "route number": ({"images": [{"url": URL}], "route": 1}, "route"),
    "route null": ({"images": [{"url": URL}], "route": None}, "route"),
    "too many": ({"images": [{"url": URL}] * 5}, "images"),
    "chat of nothing": ({"messages": []}, "messages"),
}


@pytest.mark.parametrize(("body", "param"), BAD.values(), ids=BAD)
def test_a_bad_body_is_refused_with_the_place(body: Any, param: str) -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        parsed(body)
    assert caught.value.param == param
