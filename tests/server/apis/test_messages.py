"""Anthropic Messages: images are found wherever vLLM reads one, and replaced by URLs of embeddings."""

import base64
import json
from typing import Any

import pytest

from common import errors
from common.embedding_ref import parse_embedding_url
from server.apis import messages
from server.apis.image_options import RequestPolicy
from tests.server.fakes.requests import data_url, image_file

parse_messages = messages.APIS[0].parse

DATA = base64.b64encode(image_file()).decode()
SOURCE = {"type": "base64", "media_type": "image/png", "data": DATA}
KEYS = ["a" * 64, "b" * 64]


def image(source: Any = SOURCE, **options: Any) -> dict[str, Any]:
    return {"type": "image", "source": source, **options}


def text(content: str = "a") -> dict[str, Any]:
    return {"type": "text", "text": content}


def parse(*messages: Any, **fields: Any) -> Any:
    body = {"model": "m", "max_tokens": 5, "messages": list(messages), **fields}
    return parse_messages(json.dumps(body).encode(), RequestPolicy(2))


def user(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def test_a_text_request_passes_byte_for_byte() -> None:
    for message in ({"role": "user", "content": "see <image>"}, user(text()), user({"type": "tool_result", "content": "a"})):
        request = parse(message, system=[text("be brief")])
        assert request.with_embeddings([], []) is request.raw


def test_images_are_replaced_in_messages_and_tool_results() -> None:
    result: dict[str, Any] = {"type": "tool_result", "tool_use_id": "1", "content": [text("here"), image(detail="low")]}
    image_by_url = image({"type": "url", "url": "https://example.org/a.png"}, cache_control={"type": "ephemeral"})
    messages = [user(text(), image_by_url), user(result)]
    request = parse(*messages, vir={"mode": "off"})
    assert [part.url for part in request.images] == ["https://example.org/a.png", data_url(image_file())]
    assert [part.options.location for part in request.images] == ["messages[0].content[1]", "messages[1].content[0].content[1]"]
    body = json.loads(request.with_embeddings(KEYS, [10, 20]))
    first, second = body["messages"][0]["content"][1], body["messages"][1]["content"][0]["content"][1]
    for block, key, tokens in ((first, KEYS[0], 10), (second, KEYS[1], 20)):
        ref = parse_embedding_url(block["source"].pop("url"))
        assert ref is not None
        assert (ref.key, ref.tokens, block) == (key, tokens, {"type": "image", "source": {"type": "url"}})
    messages[0]["content"][1], result["content"][1] = first, second
    assert body == {"model": "m", "max_tokens": 5, "messages": messages}


INVALID_SOURCES: dict[str, Any] = {
    "missing": None,
    "string": "https://example.org/a.png",
    "type missing": {"data": DATA},
    "type file": {"type": "file", "file_id": "1"},
    "data missing": {"type": "base64", "media_type": "image/png"},
    "data number": {"type": "base64", "data": 5},
    "media type number": {"type": "base64", "data": DATA, "media_type": 5},
    "URL missing": {"type": "url"},
    "URL empty": {"type": "url", "url": ""},
    "URL number": {"type": "url", "url": 5},
    "type nested": {"type": [[[[]]]]},
}


@pytest.mark.parametrize("source", INVALID_SOURCES.values(), ids=INVALID_SOURCES)
def test_invalid_sources_are_rejected(source: Any) -> None:
    with pytest.raises(errors.InvalidRequest, match='is not supported; expected .*"base64"') as error_info:
        parse(user(text(), image(source)))
    assert error_info.value.param == "messages[0].content[1].source"


def test_an_image_outside_user_messages_is_rejected() -> None:
    result = {"type": "tool_result", "content": [image()]}
    for fields, param in (
        ({"system": [text(), image()]}, "system[1]"),
        ({"messages": [{"role": "assistant", "content": [image()]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "assistant", "content": [result]}]}, "messages[0].content[0].content[0]"),
        ({"messages": [{"role": "system", "content": [image()]}]}, "messages[0].content[0]"),
    ):
        with pytest.raises(errors.InvalidRequest, match="in user messages only") as error_info:
            parse(**fields)
        assert error_info.value.param == param


def test_image_options_are_fields_of_the_block() -> None:
    request = parse(user(image(detail="low"), image(max_dynamic_patch=3)))
    assert [(part.options.detail, part.options.max_tiles) for part in request.images] == [("low", None), ("auto", 3)]
    with pytest.raises(errors.InvalidRequest) as error_info:
        parse(user(image(max_dynamic_patch=0)))
    assert error_info.value.param == "messages[0].content[0].max_dynamic_patch"


def test_an_invalid_message_is_rejected() -> None:
    with pytest.raises(errors.InvalidRequest) as error_info:
        parse("a")
    assert error_info.value.param == "messages[0]"


def test_images_are_counted() -> None:
    with pytest.raises(errors.TooManyImages):
        parse(user(image(), image(), image()))


def test_placeholders_in_text_pass_unchanged_beside_an_image() -> None:
    hidden = {"type": "tool_use", "id": "1", "name": "f", "input": {"type": "image", "source": "<image>"}}
    messages = [user(image()), user(text("<image>")), {"role": "assistant", "content": [hidden]}]
    body = json.loads(parse(*messages, system="see <IMG_CONTEXT>").with_embeddings(KEYS[:1], [1]))
    assert body["messages"][1:] == messages[1:]
    assert body["system"] == "see <IMG_CONTEXT>"


def test_unknown_keys_of_an_image_are_rejected() -> None:
    with pytest.raises(errors.InvalidRequest, match="did you mean max_dynamic_patch?") as error_info:
        parse(user(text(), image(max_dynamic_patches=1)))
    assert error_info.value.param == "messages[0].content[1].max_dynamic_patches"
    assert len(parse(user(image(cache_control={"type": "ephemeral"}, vir="off"))).images) == 1


def test_a_block_without_its_text_is_named() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": [{"type": "text"}]}]}
    with pytest.raises(errors.InvalidRequest, match="text is missing: expected a string") as error_info:
        parse_messages(json.dumps(body).encode(), RequestPolicy(2))
    assert error_info.value.param == "messages[0].content[0].text"
