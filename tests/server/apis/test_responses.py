"""OpenAI Responses: images are found wherever vLLM reads one, and replaced by URLs of embeddings."""

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


def image(**options: Any) -> dict[str, Any]:
    return {"type": "input_image", "image_url": URL, **options}


def text(content: str = "a") -> dict[str, Any]:
    return {"type": "input_text", "text": content}


def parse(items: Any, **fields: Any) -> Any:
    return parse_responses(json.dumps({"model": "m", "input": items, **fields}).encode(), RequestPolicy(2))


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


@pytest.mark.parametrize("items", ["see <image>", None, [], [user(text("see <image>"))], [{"role": "user", "content": "a"}]])
def test_a_text_request_passes_byte_for_byte(items: Any) -> None:
    request = parse(items, instructions="be brief")
    assert request.with_embeddings([], []) is request.raw


def test_images_are_replaced_in_messages_and_tool_results() -> None:
    call = {"type": "function_call", "call_id": "1", "name": "look", "arguments": "{}"}
    output: dict[str, Any] = {
        "type": "function_call_output",
        "call_id": "1",
        "output": [text("here"), image(detail="low", max_dynamic_patch=1)],
    }
    items = [user(text(), image(detail="original", vir={"mode": "off"})), call, output]
    request = parse(items, vir={"mode": "all"}, temperature=0.5)
    assert [part.url for part in request.images] == [URL, URL]
    assert [part.options.location for part in request.images] == ["input[0].content[1]", "input[2].output[1]"]
    assert [part.options.detail for part in request.images] == ["original", "low"]
    body = json.loads(request.with_embeddings(KEYS, [10, 20]))
    first, second = body["input"][0]["content"][1], body["input"][2]["output"][1]
    for part, key, tokens in ((first, KEYS[0], 10), (second, KEYS[1], 20)):
        ref = parse_embedding_url(part.pop("image_url"))
        assert ref is not None
        assert (ref.key, ref.tokens, part) == (key, tokens, {"type": "input_image", "detail": "auto"})
    items[0]["content"][1], output["output"][1] = first, second
    assert body == {"model": "m", "input": items, "temperature": 0.5}


@pytest.mark.parametrize("part", [{"type": "input_text"}, {"type": "input_text", "text": 5}, {"type": "refusal", "text": "no"}])
def test_a_part_without_its_text_is_named(part: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidRequest, match="expected a string") as error_info:
        parse([user(text(), part)])
    assert error_info.value.param == f"input[0].content[1].{'refusal' if part['type'] == 'refusal' else 'text'}"


INVALID_PARTS: dict[str, tuple[dict[str, Any], str]] = {
    "image_url part of a chat": ({"type": "image_url", "image_url": {"url": URL}}, ""),
    "embedding": ({"type": "image_embeds", "image_embeds": {"image_num_tokens": [1]}, "uuid": "a"}, ""),
    "embedding in an image part": (image(image_embeds={"image_num_tokens": [1]}), ""),
    "uuid in an image part": (image(uuid="stolen"), ""),
    "uuid in a text part": ({**text(), "uuid": "stolen"}, ""),
    "image in a text part": ({**text(), "image_url": URL}, ""),
    "file": ({"type": "input_file", "file_id": "1"}, ""),
    "uploaded image": ({"type": "input_image", "file_id": "1"}, ""),
    "URL as an object": (image(image_url={"url": URL}), ""),
    "URL empty": (image(image_url=""), ""),
    "type missing": ({"text": "a"}, ""),
    "null": (None, ""),  # type: ignore[dict-item]
    "invalid detail": (image(detail="max"), ".detail"),
    "invalid vir": (image(vir={"mode": "on"}), ".vir.mode"),
}


@pytest.mark.parametrize(("part", "param"), INVALID_PARTS.values(), ids=INVALID_PARTS)
@pytest.mark.parametrize("name", ["content", "output"])
def test_invalid_parts_are_rejected_with_their_location(name: str, part: Any, param: str) -> None:
    with pytest.raises(errors.InvalidRequest) as error_info:
        parse([user(text()), {"role": "user", name: [text(), part]}])
    assert error_info.value.param == f"input[1].{name}[1]{param}"


@pytest.mark.parametrize("name", ["previous_response_id", "previous_input_messages", "background"])
def test_stateful_fields_are_rejected(name: str) -> None:
    with pytest.raises(errors.InvalidRequest, match="responses are not stored") as error_info:
        parse("a", **{name: "x"})
    assert error_info.value.param == name
    assert parse("a", **{name: None}).images == []
    assert parse("a", background=False, store=True).images == []


def test_images_are_counted() -> None:
    with pytest.raises(errors.TooManyImages) as error_info:
        parse([user(image(), image(), image())])
    assert error_info.value.param == "input"


def test_placeholders_in_text_pass_unchanged_beside_an_image() -> None:
    fields = {"instructions": "see <image>", "tools": [{"name": "<IMG_CONTEXT>"}]}
    body = json.loads(parse([user(image(), text("<image>"))], **fields).with_embeddings(KEYS[:1], [1]))
    assert body["input"][0]["content"][1] == text("<image>")
    assert {name: body[name] for name in fields} == fields


def test_unknown_keys_of_an_image_are_rejected() -> None:
    with pytest.raises(errors.InvalidRequest, match="did you mean detail?") as error_info:
        parse([user(text(), image(details="low"))])
    assert error_info.value.param == "input[0].content[1].details"
    assert len(parse([user(image(file_id=None, vir="off"))]).images) == 1, "OpenAI's client sends null for what is not set"


def reply(*parts: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "message", "role": "assistant", "content": list(parts), **fields}


def output_text(content: str) -> dict[str, Any]:
    return {"type": "output_text", "text": content, "annotations": []}


REFUSAL = {"type": "refusal", "refusal": "no"}
REPLIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "refusal": (reply(REFUSAL, id="m", status="completed"), reply(output_text("no"), id="m", status="completed")),
    "text and refusal": (reply(output_text("I say "), REFUSAL), reply(output_text("I say no"))),
    "two texts": (reply(output_text("a"), output_text("b")), reply(output_text("ab"))),
    "nothing": (reply(), reply(output_text(""))),
    "without type": ({"role": "assistant", "content": [REFUSAL]}, {"role": "assistant", "content": [output_text("no")]}),
}


@pytest.mark.parametrize(("item", "joined"), REPLIES.values(), ids=REPLIES)
def test_a_reply_of_several_parts_or_a_refusal_becomes_one_text(item: dict[str, Any], joined: dict[str, Any]) -> None:
    question = user(text("and?"))
    assert json.loads(parse([question, item, question]).with_embeddings([], []))["input"] == [question, joined, question]


def test_a_reply_of_one_text_passes_byte_for_byte() -> None:
    for item in (reply(output_text("a")), {"role": "assistant", "content": "a"}, reply(text("a")), {"type": "reasoning"}):
        request = parse([item])
        assert request.with_embeddings([], []) is request.raw


@pytest.mark.parametrize("part", [image(), {"type": "output_text"}, {"type": "refusal", "text": "no"}, "a", None])
def test_a_part_that_vllm_would_leave_out_of_a_reply_is_rejected(part: Any) -> None:
    with pytest.raises(errors.InvalidRequest) as error_info:
        parse([user(text()), reply(output_text("a"), part)])
    assert error_info.value.param == "input[1].content[1]"
