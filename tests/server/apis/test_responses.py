"""Responses: their images are found wherever the engine would look for one, and become URLs of embeddings."""

import json
from typing import Any

import pytest

from common import errors
from common.embedding_ref import parse_embedding_url
from server.apis import responses
from server.apis.image_options import RequestPolicy
from tests.server.fakes.requests import data_url, image_file

parse_responses = responses.APIS[0].parse

URL = data_url(image_file())
KEYS = ["a" * 64, "b" * 64]


def image(**words: Any) -> dict[str, Any]:
    return {"type": "input_image", "image_url": URL, **words}


def text(said: str = "a") -> dict[str, Any]:
    return {"type": "input_text", "text": said}


def parsed(given: Any, **fields: Any) -> Any:
    return parse_responses(json.dumps({"model": "m", "input": given, **fields}).encode(), RequestPolicy(2))


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


@pytest.mark.parametrize("given", ["see <image>", None, [], [user(text("see <image>"))], [{"role": "user", "content": "a"}]])
def test_texts_pass_byte_for_byte(given: Any) -> None:
    asked = parsed(given, instructions="be brief")
    assert asked.with_embeddings([], []) is asked.raw


def test_images_are_replaced_in_messages_and_in_what_tools_gave() -> None:
    call = {"type": "function_call", "call_id": "1", "name": "look", "arguments": "{}"}
    seen = {"type": "function_call_output", "call_id": "1", "output": [text("here"), image(detail="low", max_dynamic_patch=1)]}
    given = [user(text(), image(detail="original", vir={"mode": "off"})), call, seen]
    asked = parsed(given, vir={"mode": "all"}, temperature=0.5)
    assert [one.url for one in asked.images] == [URL, URL]
    assert [one.options.location for one in asked.images] == ["input[0].content[1]", "input[2].output[1]"]
    assert [one.options.detail for one in asked.images] == ["original", "low"]
    made = json.loads(asked.with_embeddings(KEYS, [10, 20]))
    first, second = made["input"][0]["content"][1], made["input"][2]["output"][1]
    for part, key, tokens in ((first, KEYS[0], 10), (second, KEYS[1], 20)):
        handed = parse_embedding_url(part.pop("image_url"))
        assert handed is not None
        assert (handed.key, handed.tokens, part) == (key, tokens, {"type": "input_image", "detail": "auto"})
    given[0]["content"][1], seen["output"][1] = first, second
    assert made == {"model": "m", "input": given, "temperature": 0.5}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a chat's image": ({"type": "image_url", "image_url": {"url": URL}}, ""),
    "an embedding": ({"type": "image_embeds", "image_embeds": {"image_num_tokens": [1]}, "uuid": "a"}, ""),
    "an embedding in an image": (image(image_embeds={"image_num_tokens": [1]}), ""),
    "a key in an image": (image(uuid="stolen"), ""),
    "a key in a text": ({**text(), "uuid": "stolen"}, ""),
    "an image in a text": ({**text(), "image_url": URL}, ""),
    "a file": ({"type": "input_file", "file_id": "1"}, ""),
    "an image in a file": ({"type": "input_image", "file_id": "1"}, ""),
    "URL as an object": (image(image_url={"url": URL}), ""),
    "URL empty": (image(image_url=""), ""),
    "no type": ({"text": "a"}, ""),
    "null": (None, ""),  # type: ignore[dict-item]
    "a word": (image(detail="max"), ".detail"),
    "the router": (image(vir={"mode": "on"}), ".vir.mode"),
}


@pytest.mark.parametrize(("part", "param"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("name", ["content", "output"])
def test_parts_that_may_not_pass_are_refused_with_their_place(name: str, part: Any, param: str) -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        parsed([user(text()), {"role": "user", name: [text(), part]}])
    assert caught.value.param == f"input[1].{name}[1]{param}"


@pytest.mark.parametrize("name", ["previous_response_id", "previous_input_messages", "background"])
def test_what_would_need_a_memory_is_refused(name: str) -> None:
    with pytest.raises(errors.InvalidRequest, match="responses are not stored") as caught:
        parsed("a", **{name: "x"})
    assert caught.value.param == name
    assert parsed("a", **{name: None}).images == []
    assert parsed("a", background=False, store=True).images == []


def test_images_are_counted_and_words_that_mark_one_refused_beside_them() -> None:
    with pytest.raises(errors.TooManyImages) as caught:
        parsed([user(image(), image(), image())])
    assert caught.value.param == "input"
    for fields in ({"instructions": "see <image>"}, {"tools": [{"name": "<IMG_CONTEXT>"}]}):
        with pytest.raises(errors.InvalidRequest, match="the placeholder of an image"):
            parsed([user(image())], **fields)
    with pytest.raises(errors.InvalidRequest, match="the placeholder of an image"):
        parsed([user(image(), text("<image>"))])
