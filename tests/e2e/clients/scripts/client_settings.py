"""What a test tells a script. Imported by both, and so with the standard library alone."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """What a test tells a script.

    Attributes:
        url: The server's URL without `/v1`.
        key: The server's API key.
        model: The model's name.
        question: A question about the image.
        answer_tokens: Maximum number of tokens of an answer.
        image: The image as a `data:` URL.
        image_url: The image's http URL.
        broken_image: A `data:` URL whose bytes are not an image.
    """

    url: str
    key: str
    model: str
    question: str
    answer_tokens: int
    image: str
    image_url: str
    broken_image: str
