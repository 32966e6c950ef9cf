"""Images that reach vLLM as URLs: only URLs of embeddings are accepted, and the images keep their keys."""

import pytest
import torch
from vllm.exceptions import VLLMValidationError

from common.embedding_ref import EmbeddingRef
from lm_worker.image_parts import NUM_TOKENS
from lm_worker.media import RefuseMedia
from lm_worker.models.internvl import ImageParser, KeyedItems

FIRST, SECOND = EmbeddingRef("a" * 64, 256), EmbeddingRef("b" * 64, 1792)


def parse(images: object) -> KeyedItems:
    items = ImageParser(max_tokens=8192, expected_hidden_size=8, allow_missing_mm_embeddings=True).parse_mm_data(
        {"image": images}
    )["image"]
    assert isinstance(items, KeyedItems)
    return items


def tokens(items: KeyedItems) -> list[int]:
    return [int(items.get(i)[NUM_TOKENS]) for i in range(items.get_count())]


async def test_only_the_url_of_an_embedding_is_accepted() -> None:
    media = RefuseMedia()
    assert media.fetch_image(FIRST.url) == await media.fetch_image_async(FIRST.url) == FIRST
    for url in ("https://example.org/a.png", "data:image/png;base64,iVBORw0K", "file:///etc/passwd", FIRST.url + "0" * 9, ""):
        with pytest.raises(VLLMValidationError, match="to the gateway"):
            media.fetch_image(url)
        with pytest.raises(VLLMValidationError, match="to the gateway"):
            await media.fetch_image_async(url)


async def test_media_other_than_images_are_rejected() -> None:
    media = RefuseMedia()
    with pytest.raises(VLLMValidationError):
        media.fetch_video(FIRST.url)
    with pytest.raises(VLLMValidationError):
        await media.fetch_image_embedding_async(FIRST.url)


def test_an_image_by_url_has_the_tokens_of_an_image_in_a_chat_and_its_own_key() -> None:
    by_url, in_a_chat = parse([FIRST, SECOND]), parse({NUM_TOKENS: torch.tensor([[256], [1792]])})
    assert tokens(by_url) == tokens(in_a_chat) == [256, 1792]
    assert (list(by_url.keys), list(in_a_chat.keys)) == ([FIRST.key, SECOND.key], [])


@pytest.mark.parametrize("count", [0, -1, 8193, 99_999_999, 1.5])
def test_a_number_of_tokens_that_no_context_holds_is_rejected(count: float) -> None:
    with pytest.raises(VLLMValidationError, match="expected an integer from 1 to 8192"):
        parse({NUM_TOKENS: torch.tensor([[256], [count]])})
    with pytest.raises(VLLMValidationError, match="expected an integer from 1 to 8192"):
        parse([FIRST, EmbeddingRef("a" * 64, count)])  # type: ignore[arg-type]
    assert tokens(parse([FIRST, EmbeddingRef("a" * 64, 8192)])) == [256, 8192]


def test_data_that_is_not_an_embedding_is_rejected() -> None:
    for images in ([torch.zeros(4, 8)], [FIRST, None], "a", 5):
        with pytest.raises(ValueError, match="to the gateway"):
            parse(images)
