"""Other spellings of chat parts, and fields that images rule out."""

import json
from typing import Any

import pytest

from common import errors
from server.apis import chat as chat_api
from server.apis.image_options import RequestPolicy
from tests.server.fakes.requests import chat, data_url, image_file, image_part, text_part

parse_chat = chat_api.APIS[0].parse

URL = data_url(image_file())
IMAGE = image_part(image_file())


def parse(*content: Any, **fields: Any) -> Any:
    return parse_chat(json.dumps(chat(*content, **fields)).encode(), RequestPolicy(2))


SPELLINGS: dict[str, dict[str, Any]] = {
    "a bare URL": {"type": "image_url", "image_url": URL, "detail": "low"},
    "Responses": {"type": "input_image", "image_url": URL, "detail": "low"},
    "both": {"type": "input_image", "image_url": {"url": URL}, "detail": "low"},
    "option inside": {"type": "input_image", "image_url": {"url": URL, "detail": "low"}, "detail": "high"},
}


@pytest.mark.parametrize("part", SPELLINGS.values(), ids=SPELLINGS)
def test_other_spellings_of_an_image_part_are_understood(part: dict[str, Any]) -> None:
    request = parse(text_part("a"), part)
    (image,) = request.images
    assert (image.url, image.path, image.options.detail) == (URL, ("messages", 0, "content", 1), "low")
    assert image.options.location == "messages[0].content[1].image_url"
    content = json.loads(request.with_embeddings(["k"], [1]))["messages"][0]["content"]
    assert content == [text_part("a"), {"type": "image_embeds", "image_embeds": {"image_num_tokens": [1]}, "uuid": "k"}]


def test_the_text_parts_of_responses_are_understood() -> None:
    for part_type in ("input_text", "output_text"):
        request = parse({"type": part_type, "text": "a"}, text_part("b"))
        assert json.loads(request.with_embeddings([], [])) == chat(text_part("a"), text_part("b"))


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": ""}, {"type": "input_image", "image_url": ""}, {"type": "input_image"},
        {"type": "input_image", "file_id": "file-1"}, {"type": "input_image", "image_url": None}, {"type": "input_file"},
        {"type": "input_image", "image_url": 5}, {"type": "image_url", "image_url": URL, "uuid": "stolen"},
    ],
)  # fmt: skip
def test_an_image_part_without_a_url_is_rejected_with_its_place(part: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidRequest) as error_info:
        parse(text_part("a"), part)
    assert error_info.value.param == "messages[0].content[1]"


def test_a_chat_that_needs_no_conversion_passes_byte_for_byte() -> None:
    request = parse(text_part("a"), {"type": "refusal", "refusal": "no"}, echo=True, truncate_prompt_tokens=5)
    assert request.with_embeddings([], []) is request.raw


def test_images_rule_out_truncation() -> None:
    with pytest.raises(errors.InvalidRequest, match="truncate_prompt_tokens") as error_info:
        parse(IMAGE, truncate_prompt_tokens=5)
    assert error_info.value.param == "truncate_prompt_tokens"
    assert parse(IMAGE, truncate_prompt_tokens=None).images


ASSISTANT = {"role": "assistant", "content": "yes"}


@pytest.mark.parametrize(
    ("messages", "fields", "is_valid"),
    [
        ([], {"echo": True}, True),
        ([], {"echo": True, "add_generation_prompt": False}, False),
        ([], {"echo": False, "add_generation_prompt": False}, True),
        ([ASSISTANT], {"echo": True, "add_generation_prompt": False}, True),
        ([{"role": "assistant", "content": [IMAGE]}], {"echo": True}, False),
    ],
)
def test_echo_cannot_repeat_an_image(messages: list[Any], fields: dict[str, Any], is_valid: bool) -> None:
    body = chat(IMAGE, **fields)
    body["messages"] += messages
    if is_valid:
        assert parse_chat(json.dumps(body).encode(), RequestPolicy(2)).images
    else:
        with pytest.raises(errors.InvalidRequest) as error_info:
            parse_chat(json.dumps(body).encode(), RequestPolicy(2))
        assert error_info.value.param == "echo"
