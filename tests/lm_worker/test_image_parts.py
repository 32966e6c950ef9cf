"""Images at vLLM's own port are validated before anything of their declared size is built."""

from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError

from lm_worker.image_parts import check_images

GOOD: dict[str, Any] = {"type": "image_embeds", "image_embeds": {"image_num_tokens": [256]}, "uuid": "a" * 64}
BAD_COUNTS: list[Any] = [0, -1, 1.0, 1.5, True, None, "256", [256], 4097, 10**9, 2**70]
BAD_EMBEDS: list[Any] = [
    *(None, [], "AAAA", {}, {"image_num_tokens": 256}, {"image_num_tokens": []}, {"image_num_tokens": [1, 2]}),
    {"image_num_tokens": [256], "image_embeds": "AAAA"},
    *({"image_num_tokens": [n]} for n in BAD_COUNTS),
]
BAD_UUIDS: list[Any] = [None, "", "../etc", "schl\u00fcssel", "k" * 129, 5, ["a"], {"a": 1}]


def check(*parts: Any) -> None:
    check_images([{"role": "user", "content": [{"type": "text", "text": "a"}, *parts]}], 4096)


@pytest.mark.parametrize("embeds", BAD_EMBEDS)
def test_a_number_of_tokens_is_an_integer_within_the_context(embeds: Any) -> None:
    with pytest.raises(VLLMValidationError, match="expected") as caught:
        check(GOOD, {**GOOD, "image_embeds": embeds})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("uuid", BAD_UUIDS)
def test_a_uuid_is_the_key_of_an_embedding(uuid: Any) -> None:
    with pytest.raises(VLLMValidationError, match="not an embedding key"):
        check(GOOD, {**GOOD, "uuid": uuid})


@pytest.mark.parametrize("messages", [None, [], ["a"], [{"content": None}], [{"content": "a"}], [{"content": ["a", 5]}]])
def test_messages_without_images_are_left_to_vllm(messages: Any) -> None:
    check_images(messages, 4096)


def test_valid_images_pass() -> None:
    check(GOOD, {**GOOD, "image_embeds": {"image_num_tokens": [4096]}})
