"""Content of requests for the tests of client libraries."""

from typing import Any, Literal

from pydantic import BaseModel

from tests.e2e.serving import image_part, text_part

MODEL = "checkpoint"
KEY = "a-secret-for-this-test"
SQUARE = image_part("square.png")
WIDE = image_part("wide_1300x800.jpg")
BROKEN = image_part(b"hello")


class Shape(BaseModel):
    """What a structured answer has. Every value is bounded: the weights are random, and a string would never end."""

    colour: Literal["red", "green", "blue"]
    large: bool


def user(*parts: Any) -> list[Any]:
    """Returns one user message with these content parts; a string is a text."""
    return [{"role": "user", "content": [text_part(part) if isinstance(part, str) else part for part in parts]}]


def url_part(url: str) -> dict[str, Any]:
    """Returns a content part with the image at this URL."""
    return {"type": "image_url", "image_url": {"url": url}}


def report(headers: Any) -> dict[str, int]:
    """Returns the parsed X-DvD-Images header."""
    pairs = (pair.split("=") for pair in headers["x-dvd-images"].split("; "))
    return {name: int(value) for name, value in pairs}


def response_input(*parts: Any) -> Any:
    """Returns the input of a Responses request with one user message."""
    return [{"role": "user", "content": [input_part(part) for part in parts]}]


def input_part(part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "input_text", "text": part}
    return {"type": "input_image", "detail": "auto", "image_url": part["image_url"]["url"]}


def blocks(*parts: Any) -> Any:
    """Returns one user message with these content blocks; a string is a text."""
    return [{"role": "user", "content": [block(part) for part in parts]}]


def block(part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return text_part(part)
    data = part["image_url"]["url"].partition(",")[2]
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}
