"""Requests that cannot fit the model's context, by arithmetic: they are rejected before any image is encoded."""

from collections.abc import Mapping, Sequence
from typing import Any

from common import errors
from protos import vision_pb2 as pb
from server.apis.request import ImagePart, ParsedRequest


def check_max_tokens(body: Mapping[str, Any], fields: Sequence[str], limit: int) -> None:
    """Check the maximum length of the response.

    Args:
        body: The request.
        fields: Names of the field with the maximum; the first one that is set counts.
        limit: Maximum number of tokens of a prompt and its response.

    Raises:
        ContextLengthExceeded: The maximum exceeds the limit.
    """
    name = next((name for name in fields if body.get(name) is not None), None)
    if name is not None and type(body[name]) is int and body[name] > limit:
        raise errors.ContextLengthExceeded(
            f"{name} {body[name]} exceeds the model's context of {limit} tokens, which holds the prompt too: "
            "send a smaller number.",
            param=name,
        )


def check_images(request: ParsedRequest, tokens: int, limit: int, has_router: bool) -> None:
    """Check the visual tokens of a prompt.

    Args:
        request: The request, with one `ImagePart` for each image file.
        tokens: Visual tokens that its images need at least.
        limit: Maximum number of tokens of a prompt and its response.
        has_router: Whether the model can compress tiles.

    Raises:
        ContextLengthExceeded: The images alone exceed the limit.
    """
    if tokens <= limit:
        return
    images = request.images
    count = f"{len(images)} image" + "s" * (len(images) > 1)
    raise errors.ContextLengthExceeded(
        f"The request has {count} of at least {tokens} visual tokens, but the model's context is {limit} tokens: "
        f"{', or '.join(_hints(images, has_router))}.",
        param=str(images[0].path[0]),
    )


def _hints(images: Sequence[ImagePart], has_router: bool) -> list[str]:
    hints = ["send fewer images"] if len(images) > 1 else []
    if any(image.options.detail != "low" for image in images):
        hints.append("set a smaller max_dynamic_patch")
    if has_router and any(image.options.router.mode == pb.Router.OFF for image in images):
        hints.append('set vir to {"mode": "auto"}')
    return hints or ["the model cannot take an image"]
