"""Requests of the OpenAI API, and the images in them."""

import base64
import io
from typing import Any

from PIL import Image

from tests.server.fakes.vllm import MODEL


def image_file(index: int = 0, size: tuple[int, int] = (8, 8), file_format: str = "PNG", mode: str = "RGB") -> bytes:
    """Returns an image file that differs from those with another index."""
    image = Image.new(mode, size)
    image.putpixel((0, 0), (index % 256, index // 256, 7) if mode == "RGB" else index % 2)
    file = io.BytesIO()
    image.save(file, file_format)
    return file.getvalue()


def data_url(data: bytes, media_type: str = "image/png") -> str:
    """Returns the file as a data: URL."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def image_part(data: bytes | str) -> dict[str, Any]:
    """Returns a content part with this image file, or with the image at this URL."""
    return {"type": "image_url", "image_url": {"url": data if isinstance(data, str) else data_url(data)}}


def text_part(text: str) -> dict[str, str]:
    """Returns a content part with this text."""
    return {"type": "text", "text": text}


def chat(*content: Any, **fields: Any) -> dict[str, Any]:
    """Returns a chat request with one user message: a text, or these content parts."""
    message = content[0] if len(content) == 1 and isinstance(content[0], str) else list(content)
    return {"model": MODEL, "messages": [{"role": "user", "content": message}], **fields}
