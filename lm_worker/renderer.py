"""vLLM's renderer of chats, changed so that text which resembles an image's placeholder stays text.

A chat template writes a placeholder for each image, and vLLM gives the first image's tokens to the first placeholder that it
finds in the prompt. A placeholder that a caller has typed, or that a tool's description contains, would take an image's place.
Here callers' texts are masked while the template is rendered; each placeholder of the template then becomes a mark that no
caller knows, and the texts get their own characters back.
"""

import itertools
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.renderers.hf import HfRenderer

from lm_worker.image_parts import check_images

_NONCE = secrets.token_hex(12)
IMAGE_MARK = f"<img>{_NONCE}</img>"
"""Stands for an image in the text of a prompt. Both ends are special tokens, so it is tokenized alike in every context."""

_NAMES = ("image", "IMG_CONTEXT", "##IMAGE##")  # the last is vLLM's own, for templates that take no content parts
_SPELLINGS = itertools.product(("<", r"\u003c", r"\u003C"), _NAMES, (">", r"\u003e", r"\u003E"))
_MASKS = {"".join(spelling): f"{_NONCE}-{i}-" for i, spelling in enumerate(_SPELLINGS)}
"""By text that resembles a placeholder: what stands for it. The escapes are those of JSON, which is in calls of tools."""
_TEXTS = {masked: text for text, masked in _MASKS.items()}
_UNMASKED, _MASKED = (re.compile("|".join(map(re.escape, texts))) for texts in (_MASKS, _TEXTS))


class Renderer(HfRenderer):
    """Renders chats. A prompt with images has one `IMAGE_MARK` for each, wherever the template puts it."""

    def render_messages(self, messages: Any, params: Any) -> Any:
        """Render a chat.

        Raises:
            VLLMValidationError: An image is invalid, or the template does not write one placeholder for each.
        """
        return self._unmasked(*super().render_messages(self._checked(messages), _masked_params(params)))

    async def render_messages_async(self, messages: Any, params: Any) -> Any:
        """Same as `render_messages`."""
        return self._unmasked(*await super().render_messages_async(self._checked(messages), _masked_params(params)))

    def _checked(self, messages: Any) -> Any:
        masked = mask(messages)
        check_images(masked, self.model_config.max_model_len)
        return masked

    def _unmasked(self, conversation: Any, prompt: Any) -> tuple[Any, Any]:
        text, images = prompt.get("prompt"), (prompt.get("multi_modal_uuids") or {}).get("image") or []
        if images:
            info: Any = self.get_mm_processor().info
            text = mark_images(text, info.placeholder, len(images))
        if isinstance(text, str):
            prompt["prompt"] = _unmask_text(text)
        return _map_strings(conversation, _unmask_text), prompt


def mask(value: Any) -> Any:
    """Return a copy of a JSON value whose strings have no placeholders. Raises `VLLMValidationError` if it is too deep."""
    try:
        return _map_strings(value, _mask_text)
    except RecursionError:
        raise VLLMValidationError("The request is nested too deeply.") from None


def mark_images(text: Any, placeholder: str, count: int) -> str:
    """Return a rendered prompt with `IMAGE_MARK` in place of the template's placeholders.

    Raises:
        VLLMValidationError: The prompt does not have one placeholder for each image.
    """
    if not isinstance(text, str) or IMAGE_MARK in text or text.count(placeholder) != count:
        raise VLLMValidationError(f"The chat template does not write one placeholder for each of the {count} images.")
    return text.replace(placeholder, IMAGE_MARK)


def _masked_params(params: Any) -> Any:
    return replace(params, chat_template_kwargs=mask(params.chat_template_kwargs))


def _mask_text(text: str) -> str:
    return _UNMASKED.sub(lambda match: _MASKS[match[0]], text)


def _unmask_text(text: str) -> str:
    return _MASKED.sub(lambda match: _TEXTS[match[0]], text)


def _map_strings(value: Any, function: Callable[[str], str]) -> Any:
    """Apply a function to all strings of a JSON value, keys included. Iterators, which validation leaves, become lists."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {_map_strings(key, function): _map_strings(item, function) for key, item in value.items()}
    if isinstance(value, list | tuple | Iterator):
        return [_map_strings(item, function) for item in value]
    return value
