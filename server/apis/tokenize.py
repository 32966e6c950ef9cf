"""vLLM's `/tokenize` and `/detokenize`. A text in `prompt`, or a conversation with images as in chat completions."""

from typing import Any

from common import errors
from server.apis import chat
from server.apis.base import Api
from server.apis.chat_parts import prepare_chat
from server.apis.image_options import RequestPolicy
from server.apis.request import ImagePart


def find_images(body: dict[str, Any], policy: RequestPolicy) -> list[ImagePart]:
    """Find the images in `messages`, if the body has any. Raises `InvalidRequest` or `TooManyImages`, with the location."""
    return chat.find_images(body, policy) if "messages" in body else []


_MAX_TOKEN_ID = (1 << 31) - 1
"""Larger ids do not fit the type that tokenizers use, whose error names neither the field nor the value."""


def check_tokens(body: dict[str, Any]) -> dict[str, Any]:
    """Return the body. Raises `InvalidRequest` for a token id that no vocabulary has, with its location."""
    tokens = body.get("tokens")
    for i, token in enumerate(tokens if isinstance(tokens, list) else ()):
        if type(token) is int and token > _MAX_TOKEN_ID:
            param = f"tokens[{i}]"
            raise errors.InvalidRequest(f"{param} is {token}: expected a token id from 0 to {_MAX_TOKEN_ID}.", param=param)
    return body


APIS = (
    Api(
        path="/tokenize",
        summary="Convert a text or a conversation to token ids (vLLM)",
        example={"model": "InternVL3_5-8B-Flash", "prompt": "Hello"},
        prepare=prepare_chat,
        find_images=find_images,
    ),
    Api(
        path="/detokenize",
        summary="Convert token ids to text (vLLM)",
        example={"model": "InternVL3_5-8B-Flash", "tokens": [9707]},
        prepare=check_tokens,
    ),
)
