"""Text that resembles an image's placeholder stays text."""

import json
from typing import Any

import pytest
from transformers import AutoTokenizer
from vllm.exceptions import VLLMValidationError

from lm_worker import renderer
from lm_worker.models.internvl import ordinary_tokens, replace_token
from lm_worker.renderer import IMAGE_MARK, mark_images, mask
from tests.e2e.serving import GOLDEN

PLACEHOLDERS = ("<image>", "<IMG_CONTEXT>", "<##IMAGE##>")
TEXTS = [
    "see <image> here", "<##IMAGE##>", "<imag", "", "<IMG_CONTEXT>" * 3, "<image></image><IMAGE>", "a<image\u200d>b",
    "<<image>>", r'{"a": "\u003cimage\u003e"}', r"\u003Cimage>",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_masked_text_has_no_placeholder_and_is_restored(text: str) -> None:
    value = {"content": [{"type": "text", "text": text}], text: [None, 1, True, text]}
    masked = mask(value)
    assert not any(placeholder in json.dumps(masked) for placeholder in PLACEHOLDERS)
    assert renderer._map_strings(masked, renderer._unmask_text) == value


def test_a_placeholder_that_json_escapes_in_a_tools_call_is_masked() -> None:
    masked = mask({"arguments": json.dumps({"x": "<image>"}).replace("<", r"\u003c").replace(">", r"\u003e")})
    assert "<image>" not in json.loads(masked["arguments"])["x"]


def test_iterators_become_lists() -> None:
    assert mask([{"content": iter([{"text": "a"}])}]) == [{"content": [{"text": "a"}]}]


def test_a_request_that_is_nested_too_deeply_is_rejected() -> None:
    value: Any = "<image>"
    for _ in range(100_000):
        value = [value]
    with pytest.raises(VLLMValidationError, match="nested too deeply"):
        mask(value)


@pytest.mark.parametrize("placeholder", PLACEHOLDERS)
def test_placeholders_of_the_template_become_marks(placeholder: str) -> None:
    assert mark_images(f"a{placeholder}\nb{placeholder}", placeholder, 2) == f"a{IMAGE_MARK}\nb{IMAGE_MARK}"


@pytest.mark.parametrize("text", ["", "<image>", "<image>" * 3, f"<image><image>{IMAGE_MARK}", [1, 2], None])
def test_a_prompt_with_another_number_of_placeholders_is_rejected(text: Any) -> None:
    with pytest.raises(VLLMValidationError, match="one placeholder for each of the 2 images"):
        mark_images(text, "<image>", 2)


def test_no_process_has_the_mark_of_another() -> None:
    assert len(IMAGE_MARK) > 30
    assert IMAGE_MARK.startswith("<img>")
    assert IMAGE_MARK.endswith("</img>")


@pytest.mark.parametrize("name", ["flash-qwen3", "vit300m-qwen2", "vit6b-llama"])
def test_the_text_of_a_special_token_becomes_ordinary_tokens(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / name / "checkpoint")
    special = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    tokens = ordinary_tokens(tokenizer, "<IMG_CONTEXT>")
    assert special not in tokens
    assert tokenizer.decode(tokens) == "<IMG_CONTEXT>"
    replaced = replace_token(tokenizer.encode("a <IMG_CONTEXT> b"), special, tokens)
    assert special not in replaced
    assert tokenizer.decode(replaced) == "a <IMG_CONTEXT> b"


@pytest.mark.parametrize("name", ["flash-qwen3", "vit300m-qwen2", "vit6b-llama"])
def test_the_mark_is_tokenized_alike_in_every_context(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / name / "checkpoint")
    mark = tokenizer.encode(IMAGE_MARK, add_special_tokens=False)
    for before, after in (("", ""), ("a", "b"), ("see ", "\n"), ("<", ">"), ("<|im_start|>user\n", "\nx"), (IMAGE_MARK, "0")):
        tokens = tokenizer.encode(f"{before}{IMAGE_MARK}{after}", add_special_tokens=False)
        positions = [i for i in range(len(tokens)) if tokens[i : i + len(mark)] == mark]
        assert len(positions) == 1 + (before == IMAGE_MARK)
