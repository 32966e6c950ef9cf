"""vLLM's `/tokenize` and `/detokenize`. A text in `prompt`, or a conversation with images as in chat completions."""

from typing import Any

from server.apis import chat
from server.apis.base import Api
from server.apis.chat_parts import prepare_chat
from server.apis.image_options import RequestPolicy
from server.apis.request import ImagePart


def find_images(body: dict[str, Any], policy: RequestPolicy) -> list[ImagePart]:
    """Find the images in `messages`, if the body has any. Raises `InvalidRequest` or `TooManyImages`, with the location."""
    return chat.find_images(body, policy) if "messages" in body else []


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
    ),
)
