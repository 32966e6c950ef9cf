"""Anthropic's messages: their images are found wherever the engine would look for one, and become URLs of embeddings."""

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


def image(source: Any = SOURCE, **words: Any) -> dict[str, Any]:
    return {"type": "image", "source": source, **words}


def text(said: str = "a") -> dict[str, Any]:
    return {"type": "text", "text": said}


def parsed(*messages: Any, **fields: Any) -> Any:
    body = {"model": "m", "max_tokens": 5, "messages": list(messages), **fields}
    return parse_messages(json.dumps(body).encode(), RequestPolicy(2))


def user(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def test_texts_pass_byte_for_byte() -> None:
    for message in ({"role": "user", "content": "see <image>"}, user(text()), user({"type": "tool_result", "content": "a"})):
        asked = parsed(message, system=[text("be brief")])
        assert asked.with_embeddings([], []) is asked.raw


def test_images_are_replaced_in_messages_and_in_what_tools_gave() -> None:
    result = {"type": "tool_result", "tool_use_id": "1", "content": [text("here"), image(detail="low")]}
    asked_by_url = image({"type": "url", "url": "https://example.org/a.png"}, cache_control={"type": "ephemeral"})
    messages = [user(text(), asked_by_url), user(result)]
    asked = parsed(*messages, vir={"mode": "off"})
    assert [one.url for one in asked.images] == ["https://example.org/a.png", data_url(image_file())]
    assert [one.options.location for one in asked.images] == ["messages[0].content[1]", "messages[1].content[0].content[1]"]
    made = json.loads(asked.with_embeddings(KEYS, [10, 20]))
    first, second = made["messages"][0]["content"][1], made["messages"][1]["content"][0]["content"][1]
    for block, key, tokens in ((first, KEYS[0], 10), (second, KEYS[1], 20)):
        handed = parse_embedding_url(block["source"].pop("url"))
        assert handed is not None
        assert (handed.key, handed.tokens, block) == (key, tokens, {"type": "image", "source": {"type": "url"}})
    messages[0]["content"][1], result["content"][1] = first, second
    assert made == {"model": "m", "max_tokens": 5, "messages": messages}


SOURCES: dict[str, Any] = {
    "missing": None,
    "a text": "https://example.org/a.png",
    "no type": {"data": DATA},
    "a file": {"type": "file", "file_id": "1"},
    "no data": {"type": "base64", "media_type": "image/png"},
    "data number": {"type": "base64", "data": 5},
    "media type number": {"type": "base64", "data": DATA, "media_type": 5},
    "no URL": {"type": "url"},
    "URL empty": {"type": "url", "url": ""},
    "URL number": {"type": "url", "url": 5},
    "type deep": {"type": [[[[]]]]},
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_sources_that_are_none_are_refused(source: Any) -> None:
    with pytest.raises(errors.InvalidRequest, match='is not supported; expected .*"base64"') as caught:
        parsed(user(text(), image(source)))
    assert caught.value.param == "messages[0].content[1].source"


def test_an_image_where_the_engine_would_lose_it_is_refused() -> None:
    result = {"type": "tool_result", "content": [image()]}
    for fields, param in (
        ({"system": [text(), image()]}, "system[1]"),
        ({"messages": [{"role": "assistant", "content": [image()]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "assistant", "content": [result]}]}, "messages[0].content[0].content[0]"),
        ({"messages": [{"role": "system", "content": [image()]}]}, "messages[0].content[0]"),
    ):
        with pytest.raises(errors.InvalidRequest, match="in user messages only") as caught:
            parsed(**fields)
        assert caught.value.param == param


def test_words_of_the_dial_are_on_the_block() -> None:
    asked = parsed(user(image(detail="low"), image(max_dynamic_patch=3)))
    assert [(one.options.detail, one.options.max_tiles) for one in asked.images] == [("low", None), ("auto", 3)]
    with pytest.raises(errors.InvalidRequest) as caught:
        parsed(user(image(max_dynamic_patch=0)))
    assert caught.value.param == "messages[0].content[0].max_dynamic_patch"


def test_what_is_no_message_is_refused() -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        parsed("a")
    assert caught.value.param == "messages"


def test_images_are_counted_and_words_that_mark_one_refused_beside_them() -> None:
    with pytest.raises(errors.TooManyImages):
        parsed(user(image(), image(), image()))
    hidden = {"type": "tool_use", "id": "1", "name": "f", "input": {"type": "image", "source": "<image>"}}
    for message in (user(text("<image>")), {"role": "assistant", "content": [hidden]}):
        with pytest.raises(errors.InvalidRequest, match="the placeholder of an image"):
            parsed(user(image()), message)
    with pytest.raises(errors.InvalidRequest, match="the placeholder of an image"):
        parsed(user(image()), system="see <IMG_CONTEXT>")
