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
