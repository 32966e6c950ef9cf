"""Images that reach vLLM by URL: only those of embeddings, and they keep their keys."""

import pytest
import torch
from vllm.exceptions import VLLMValidationError

from common.embedding_ref import EmbeddingRef
from lm_worker.media import RefuseMedia
from lm_worker.models.internvl import TOKENS, ImageParser, KeyedItems

ONE, OTHER = EmbeddingRef("a" * 64, 256), EmbeddingRef("b" * 64, 1792)


def parsed(images: object) -> KeyedItems:
    items = ImageParser(expected_hidden_size=8, allow_missing_mm_embeddings=True).parse_mm_data({"image": images})["image"]
    assert isinstance(items, KeyedItems)
    return items


def tokens(items: KeyedItems) -> list[int]:
    return [int(items.get(i)[TOKENS]) for i in range(items.get_count())]


async def test_the_url_of_an_embedding_is_read_and_no_other() -> None:
    media = RefuseMedia()
    assert media.fetch_image(ONE.url) == await media.fetch_image_async(ONE.url) == ONE
    for url in ("https://example.org/a.png", "data:image/png;base64,iVBORw0K", "file:///etc/passwd", ONE.url + "0" * 9, ""):
        with pytest.raises(VLLMValidationError, match="through the gateway only"):
            media.fetch_image(url)
        with pytest.raises(VLLMValidationError, match="through the gateway only"):
            await media.fetch_image_async(url)


async def test_nothing_but_images_has_a_url() -> None:
    media = RefuseMedia()
    with pytest.raises(VLLMValidationError):
        media.fetch_video(ONE.url)
    with pytest.raises(VLLMValidationError):
        await media.fetch_image_embedding_async(ONE.url)


def test_an_image_by_url_is_what_it_is_in_a_chat_and_knows_its_key() -> None:
    by_url, in_a_chat = parsed([ONE, OTHER]), parsed({TOKENS: torch.tensor([[256], [1792]])})
    assert tokens(by_url) == tokens(in_a_chat) == [256, 1792]
    assert (list(by_url.keys), list(in_a_chat.keys)) == ([ONE.key, OTHER.key], [])


def test_anything_else_is_no_image() -> None:
    for images in ([torch.zeros(4, 8)], [ONE, None], "a", 5):
        with pytest.raises(ValueError, match="through the gateway"):
            parsed(images)
