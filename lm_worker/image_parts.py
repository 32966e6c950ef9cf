"""Validation of the images in a request to vLLM's own port, before anything of the size that they declare is built.

The gateway sends nothing that fails here. What is invalid raises `VLLMValidationError`, which vLLM answers with 400.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from vllm.exceptions import VLLMValidationError

from common import errors
from common.embedding import validate_key

NUM_TOKENS = "image_num_tokens"
"""Field of an `image_embeds` content part: how many visual tokens the image has."""


def check_images(messages: Any, max_tokens: int) -> None:
    """Check the `image_embeds` parts of a chat.

    Args:
        messages: Messages of the chat, as JSON values.
        max_tokens: Length of the model's context.

    Raises:
        VLLMValidationError: A part is not `{"image_num_tokens": [N]}` with N up to `max_tokens`, or its uuid is no key.
    """
    for part in _parts(messages):
        embeds = part["image_embeds"]
        counts = embeds.get(NUM_TOKENS) if isinstance(embeds, dict) and len(embeds) == 1 else None
        if not isinstance(counts, list) or len(counts) != 1:
            raise VLLMValidationError(f'image_embeds: expected {{"{NUM_TOKENS}": [N]}}; send images to the gateway.')
        check_token_count(counts[0], max_tokens)
        check_keys([part.get("uuid")])


def check_token_count(count: object, max_tokens: int) -> None:
    """Raise `VLLMValidationError` unless `count` is an integer from 1 to `max_tokens`."""
    if type(count) is not int or not 1 <= count <= max_tokens:
        raise VLLMValidationError(f"{NUM_TOKENS} is {ascii(count)[:60]}: expected an integer from 1 to {max_tokens}.")


def check_keys(uuids: Sequence[object]) -> None:
    """Raise `VLLMValidationError` unless each uuid is the key of an embedding."""
    for uuid in uuids:
        try:
            validate_key(uuid if isinstance(uuid, str) else "")
        except errors.InvalidRequest as error:
            raise VLLMValidationError(f"The uuid of an image: {error}.") from None


def _parts(messages: Any) -> Iterator[dict[str, Any]]:
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else []:
            if isinstance(part, dict) and "image_embeds" in part:
                yield part
