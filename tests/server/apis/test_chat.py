"""Chat completions: which bodies are rejected, how images are replaced, and that nothing else changes."""

import contextlib
import json
from dataclasses import replace
from typing import Any

import pytest

from common import errors
from protos import vision_pb2 as pb
from server.apis import chat as chat_api
from server.apis import tokenize
from server.apis.image_options import RequestPolicy
from server.http.json_body import decode_object
from tests.server.apis.helpers import nested_list
from tests.server.fakes.requests import chat, image_file, image_part, text_part

parse_chat = chat_api.APIS[0].parse
parse_tokenize = tokenize.APIS[0].parse

IMAGE = image_part(image_file())


def raw(body: Any) -> bytes:
    return json.dumps(body).encode()


@pytest.mark.parametrize("text", [r"\ud83d\ude00", r"\u0000", r"\\ud800", "😀", "\\u00e9"])
def test_valid_unicode_text_passes_unchanged(text: str) -> None:
    body = f'{{"model": "m", "messages": [{{"role": "user", "content": "{text}"}}]}}'.encode()
    assert parse_chat(body, RequestPolicy(1)).with_embeddings([], []) is body


def test_the_last_of_duplicate_fields_counts_as_in_vllm() -> None:
    body = b'{"model": "one", "model": "two", "messages": [{"role": "user", "content": "a"}]}'
    assert parse_chat(body, RequestPolicy(1)).model == json.loads(body)["model"] == "two"


def test_unknown_fields_are_passed_to_vllm() -> None:
    body = raw({**chat("hello"), **{f"x{i}": i for i in range(100_000)}})
    assert parse_chat(body, RequestPolicy(1)).with_embeddings([], []) is body


INVALID_MESSAGES: dict[str, Any] = {
    "empty list": [],
    "null": None,
    "string": "hello",
    "object": {"role": "user"},
    "number": 5,
    "list of strings": ["hello"],
    "list of nulls": [None],
    "list of lists": [[]],
}


@pytest.mark.parametrize("messages", INVALID_MESSAGES.values(), ids=INVALID_MESSAGES)
def test_invalid_messages_are_rejected(messages: Any) -> None:
    with pytest.raises(errors.InvalidRequest) as error_info:
        parse_chat(raw({"model": "m", "messages": messages}), RequestPolicy(1))
    assert error_info.value.param == ("messages[0]" if isinstance(messages, list) and messages else "messages")


def test_a_request_without_messages_is_rejected() -> None:
    with pytest.raises(errors.InvalidRequest, match="messages"):
        parse_chat(raw({"model": "m"}), RequestPolicy(1))


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
NO_MESSAGES: dict[str, tuple[dict[str, Any], str]] = {
    "no role": ({"content": "a"}, "role is missing: expected a string."),
    "role": ({"role": 5, "content": "a"}, "role is 5: expected a string."),
    "name": ({"role": "user", "content": "a", "name": []}, "name is a list: expected a string."),
    "content": ({"role": "user", "content": {}}, "content is an object: expected a string or a list of parts."),
    "calls of tools": ({"role": "assistant", "tool_calls": True}, "tool_calls is true: expected a list."),
    "id of a call": ({"role": "tool", "content": "a", "tool_call_id": 5}, "tool_call_id is 5: expected a string."),
    "call": ({"role": "assistant", "tool_calls": [5]}, "tool_calls[0] is 5: expected an object."),
    "function": (
        {"role": "assistant", "tool_calls": [CALL, {"function": "f"}]},
        'tool_calls[1].function is "f": expected an object with name and arguments.',
    ),
    "name of a function": (
        {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]},
        "tool_calls[0].function.name is null: expected a string.",
    ),
    "arguments": (
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
        "tool_calls[0].function.arguments is an object: expected a string with a JSON object.",
    ),
}


@pytest.mark.parametrize(("message", "problem"), NO_MESSAGES.values(), ids=NO_MESSAGES)
def test_a_field_of_a_message_of_the_wrong_type_is_named(message: dict[str, Any], problem: str) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}, message]}
    with pytest.raises(errors.InvalidRequest) as error_info:
        parse_chat(raw(body), RequestPolicy(1))
    assert str(error_info.value) == f"messages[1].{problem}"
    assert error_info.value.param == f"messages[1].{problem.split()[0]}"


def test_a_message_without_a_name_may_say_so() -> None:
    messages = [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    request = parse_chat(raw({"model": "m", "messages": messages}), RequestPolicy(1))
    sent = json.loads(request.with_embeddings([], []))["messages"]
    assert sent == [{"role": "user", "content": "a"}, messages[1]]


def test_a_call_of_another_kind_is_left_to_vllm() -> None:
    messages = [{"role": "assistant", "tool_calls": [{"id": "1", "type": "custom", "custom": {}}]}]
    parse_chat(raw({"model": "m", "messages": messages}), RequestPolicy(1))


def test_a_token_id_that_no_vocabulary_has_is_named() -> None:
    with pytest.raises(errors.InvalidRequest, match=r"^tokens\[1\] is 2147483648: expected a token id") as error_info:
        tokenize.APIS[1].parse(raw({"model": "m", "tokens": [2**31 - 1, 2**31]}), RequestPolicy(1))
    assert error_info.value.param == "tokens[1]"


NO_TEXTS: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"type": "text"}, "text is missing"),
    "null": ({"type": "text", "text": None}, "text is null"),
    "number": ({"type": "text", "text": 5}, "text is 5"),
    "list": ({"type": "text", "text": ["a"]}, "text is a list"),
    "another field": ({"type": "refusal", "text": "a"}, "refusal is missing"),
    "the spelling of Responses": ({"type": "input_text", "text": True}, "text is true"),
}


@pytest.mark.parametrize(("part", "problem"), NO_TEXTS.values(), ids=NO_TEXTS)
def test_a_part_without_its_text_is_named(part: dict[str, Any], problem: str) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": [text_part("a"), part]}]}
    with pytest.raises(errors.InvalidRequest) as error_info:
        parse_chat(raw(body), RequestPolicy(1))
    assert str(error_info.value) == f"messages[0].content[1].{problem}: expected a string."
    assert error_info.value.param == f"messages[0].content[1].{problem.split()[0]}"


INVALID_PARTS: dict[str, Any] = {
    "null": None,
    "number": 5,
    "list": [],
    "empty": {},
    "no type": {"text": "a"},
    "image without type": {"image_url": "https://example.org/a.png"},
    "type null": {"type": None},
    "type list": {"type": []},
    "type object": {"type": {}},
    "type nested deeply": {"type": nested_list(900)},
    "type too long": {"type": "x" * 100_000},
    "type unknown": {"type": "hologram"},
    "video without URL": {"type": "video_url", "video_url": {"num_frames": 4}},
    "video in an image part": {**IMAGE, "video_url": {"url": "https://example.org/a"}},
    "audio": {"type": "input_audio", "input_audio": {}},
    "embedding": {"type": "image_embeds", "image_embeds": {"image_num_tokens": [1]}, "uuid": "a"},
    "embedding in a text part": {"type": "text", "text": "a", "image_embeds": {}},
    "image in a text part": {"type": "text", "text": "a", "image_url": {"url": "file:///etc/passwd"}},
    "uuid in an image part": {**IMAGE, "uuid": "stolen"},
    "uuid in a text part": {"type": "text", "text": "a", "uuid": "stolen"},
    "image missing": {"type": "image_url"},
    "image null": {"type": "image_url", "image_url": None},
    "image as a list": {"type": "image_url", "image_url": ["https://example.org/a.png"]},
    "image without URL": {"type": "image_url", "image_url": {"detail": "low"}},
    "URL null": {"type": "image_url", "image_url": {"url": None}},
    "URL empty": {"type": "image_url", "image_url": {"url": ""}},
    "URL number": {"type": "image_url", "image_url": {"url": 5}},
    "URL list": {"type": "image_url", "image_url": {"url": ["https://example.org/a.png"]}},
}


@pytest.mark.parametrize("part", INVALID_PARTS.values(), ids=INVALID_PARTS)
def test_unsupported_parts_are_rejected_with_their_location(part: Any) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}, {"role": "user", "content": [text_part("b"), part]}]}
    with pytest.raises(errors.InvalidRequest) as error_info:
        parse_chat(raw(body), RequestPolicy(9))
    assert error_info.value.param == "messages[1].content[1]"
    assert len(str(error_info.value)) < 400


@pytest.mark.parametrize("vir", [{"mode": "off"}, {}, None])
def test_vir_is_not_passed_to_vllm(vir: Any) -> None:
    for content in ("a", IMAGE):
        parsed = parse_chat(raw(chat(content, vir=vir, seed=5)), RequestPolicy(1))
        body = json.loads(parsed.with_embeddings(["k"] * len(parsed.images), [1] * len(parsed.images)))
        assert list(body) == ["model", "messages", "seed"]


OFF, ALL, HALF = pb.Router(mode=pb.Router.OFF), pb.Router(mode=pb.Router.ALL), pb.Router(relative_threshold=0.5)


def image_with(**options: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {**IMAGE["image_url"], **options}}


def test_vir_of_an_image_precedes_that_of_its_request_and_of_the_operator() -> None:
    images = [IMAGE, image_with(vir={"mode": "all"}), image_with(vir={"mode": "auto"}), image_with(vir={})]
    parsed = parse_chat(raw(chat(*images, vir={"mode": "off"})), RequestPolicy(4, HALF))
    assert [image.options.router for image in parsed.images] == [OFF, ALL, pb.Router(), OFF]
    parsed = parse_chat(raw(chat(*images)), RequestPolicy(4, HALF))
    assert [image.options.router for image in parsed.images] == [HALF, ALL, HALF, HALF]


def test_invalid_image_options_are_rejected_with_their_location() -> None:
    for options, param in (({"detail": "max"}, "detail"), ({"vir": {"mode": "on"}}, "vir.mode"), ({"vir": 1}, "vir")):
        with pytest.raises(errors.InvalidRequest) as error_info:
            parse_chat(raw(chat(text_part("a"), image_with(**options))), RequestPolicy(1))
        assert error_info.value.param == f"messages[0].content[1].image_url.{param}"


def test_an_invalid_vir_is_rejected_without_images_too() -> None:
    with pytest.raises(errors.InvalidRequest) as error_info:
        parse_chat(raw(chat("a", vir={"mode": "on"})), RequestPolicy(1))
    assert error_info.value.param == "vir.mode"


def test_tokenize_accepts_a_prompt_or_a_chat() -> None:
    text = raw({"model": "m", "prompt": "see <image>"})
    assert parse_tokenize(text, RequestPolicy(1)).with_embeddings([], []) is text
    assert len(parse_tokenize(raw(chat(IMAGE)), RequestPolicy(1)).images) == 1
    with pytest.raises(errors.InvalidRequest, match="messages"):
        parse_tokenize(raw({"messages": []}), RequestPolicy(1))


def test_images_are_counted_over_all_messages() -> None:
    messages = [{"role": "user", "content": [IMAGE, IMAGE]}, {"role": "user", "content": [IMAGE]}]
    body = raw({"model": "m", "messages": messages})
    assert len(parse_chat(body, RequestPolicy(3)).images) == 3
    with pytest.raises(errors.TooManyImages, match="has 3 images; the maximum is 2"):
        parse_chat(body, RequestPolicy(2))


def test_ten_thousand_messages_are_accepted() -> None:
    body = raw({"model": "m", "messages": [{"role": "user", "content": [text_part("a")]}] * 10_000})
    assert parse_chat(body, RequestPolicy(1)).with_embeddings([], []) is body


PLACEHOLDER_TEXTS = {
    "content": {"messages": [{"role": "user", "content": "<IMG_CONTEXT>" * 1000}]},
    "text part": {"messages": [{"role": "user", "content": [text_part("see <image> here")]}]},
    "string part": {"messages": [{"role": "user", "content": ["see <image> here"]}]},
    "escaped": {"messages": [{"role": "user", "content": "\u003cIMG_CONTEXT\u003e"}]},
    "participant name": {"messages": [{"role": "user", "name": "<image>", "content": "a"}]},
    "reasoning": {"messages": [{"role": "assistant", "content": None, "reasoning_content": "<image>"}]},
    "tool call": {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "<image>"}}]}]},
    "tool description": {"tools": [{"type": "function", "function": {"name": "f", "description": "<IMG_CONTEXT>"}}]},
    "tool parameter": {"tools": [{"type": "function", "function": {"parameters": {"properties": {"<image>": {}}}}}]},
    "chat template": {"chat_template_kwargs": {"system": "<IMG_CONTEXT>"}},
    "tool that resembles an image part": {"tools": [{"type": "image_url", "description": "<image>"}]},
}


@pytest.mark.parametrize("fields", PLACEHOLDER_TEXTS.values(), ids=PLACEHOLDER_TEXTS)
def test_placeholders_in_text_pass_unchanged(fields: dict[str, Any]) -> None:
    image = {"role": "user", "content": [IMAGE]}
    request = parse_chat(raw({"model": "m", **fields, "messages": [*fields.get("messages", []), image]}), RequestPolicy(1))
    assert len(request.images) == 1
    body = json.loads(request.with_embeddings(["k"], [1]))
    assert {**body, "messages": body["messages"][:-1]} == {"model": "m", "messages": [], **fields}
    text_only = raw({"model": "m", "messages": [{"role": "user", "content": "a"}], **fields})
    assert parse_chat(text_only, RequestPolicy(1)).with_embeddings([], []) is text_only


def test_images_are_replaced_in_order_and_nothing_else_changes() -> None:
    images = [image_part(image_file(i)) for i in range(4)]
    images[1]["image_url"]["detail"] = "high"
    body: dict[str, Any] = {
        "model": "m",
        "temperature": 0.1,
        "logit_bias": {"7": -100},
        "seed": 2**63 - 1,
        "stop": ["é", "\u0000", "😀"],
        "unknown": {"nested": [None, True, 1.0, 1e-7, 12345678901234567890]},
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [images[0], text_part("and"), images[1]], "name": "me"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "user", "content": ["plain", text_part("then"), images[2]]},
            {"role": "user", "content": [images[3]]},
            {"role": "tool", "tool_call_id": "1"},
        ],
    }
    request = parse_chat(raw(body), RequestPolicy(4))
    assert [image.url for image in request.images] == [image["image_url"]["url"] for image in images]
    assert [image.options.detail for image in request.images] == ["auto", "high", "auto", "auto"]
    result = json.loads(request.with_embeddings(["k0", "k1", "k2", "k3"], [10, 11, 12, 13]))
    parts = [{"type": "image_embeds", "image_embeds": {"image_num_tokens": [10 + i]}, "uuid": f"k{i}"} for i in range(4)]
    body["messages"][1]["content"] = [parts[0], text_part("and"), parts[1]]
    body["messages"][3]["content"] = ["plain", text_part("then"), parts[2]]
    body["messages"][4]["content"] = [parts[3]]
    assert result == body
    assert list(result) == list(body)


def test_each_of_two_equal_images_is_replaced() -> None:
    request = parse_chat(raw(chat(IMAGE, text_part("a"), IMAGE)), RequestPolicy(2))
    body = json.loads(request.with_embeddings(["k", "k"], [5, 5]))
    assert [part["type"] for part in body["messages"][0]["content"]] == ["image_embeds", "text", "image_embeds"]


def test_a_text_request_is_passed_byte_for_byte() -> None:
    body = b'{ "messages":[{"content":"a\\u00e9 \xc3\xa9","role":"user"}] , "model" :"m","x":1.50, "x":[ ]}\n'
    assert parse_chat(body, RequestPolicy(1)).with_embeddings([], []) is body


@pytest.mark.parametrize("depth", [100, *range(900, 1000, 3)])
def test_a_deeply_nested_body_is_either_forwarded_or_rejected(depth: int) -> None:
    body = b'{"model": "m", "messages": [{"role": "user", "content": [%s]}], "x": %s}' % (
        raw(IMAGE),
        b"[" * depth + b"]" * depth,
    )
    with contextlib.suppress(errors.InvalidRequest) if depth > 100 else contextlib.nullcontext():
        assert decode_object(parse_chat(body, RequestPolicy(1)).with_embeddings(["k"], [1]))["model"] == "m"


def video(**options: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": "https://example.org/a.mp4", **options}}


def test_a_video_has_eight_frames_of_one_tile_by_default() -> None:
    parts = [video(), video(num_frames=3, vir={"mode": "off"}), video(max_dynamic_patch=2), video(detail="high")]
    images = parse_chat(raw(chat(IMAGE, *parts)), RequestPolicy(28)).images
    assert [image.frames for image in images] == [0, 8, 3, 8, 8]
    assert [image.options.detail for image in images] == ["auto", "low", "low", "auto", "high"]
    assert [image.options.max_tiles for image in images] == [None, None, None, 2, None]
    assert [image.options.router.mode for image in images] == [0, 0, pb.Router.OFF, 0, 0]


def test_frames_count_as_images() -> None:
    with pytest.raises(errors.TooManyImages, match=r"has 12 images \(frames of videos counted\); the maximum is 11"):
        parse_chat(raw(chat(IMAGE, video(), video(num_frames=3))), RequestPolicy(11))


@pytest.mark.parametrize("count", [0, -1, 1.0, "8", True, [8]])
def test_invalid_frame_counts_are_rejected_with_their_location(count: Any) -> None:
    with pytest.raises(errors.InvalidRequest, match="expected an integer from 1 to 9, not .*; omit it for 8") as error_info:
        parse_chat(raw(chat(text_part("a"), video(num_frames=count))), RequestPolicy(9))
    assert error_info.value.param == "messages[0].content[1].video_url.num_frames"


UNKNOWN_KEYS: dict[str, tuple[dict[str, Any], str, str]] = {
    "typo": (image_with(max_dynamic_patches=4), "image_url.max_dynamic_patches", "did you mean max_dynamic_patch?"),
    "typo of detail": (image_with(detial="low"), "image_url.detial", "did you mean detail?"),
    "another API's name": (image_with(max_num=4), "image_url.max_num", "did you mean max_dynamic_patch?"),
    "frames per second": (video(fps=2), "video_url.fps", "did you mean num_frames?"),
    "option of videos": (image_with(num_frames=2), "image_url.num_frames", "expected url, detail"),
    "no resemblance": (image_with(xyz=2), "image_url.xyz", "expected url, detail, max_dynamic_patch, vir"),
    "beside the object": ({**IMAGE, "detail": "low"}, "detail", "did you mean image_url.detail?"),
    "typo beside the object": ({**video(), "num_frame": 2}, "num_frame", "did you mean video_url.num_frames?"),
    "too long": (image_with(**{"x" * 100_000: 1}), "image_url." + "x" * 100, "expected url"),
}


@pytest.mark.parametrize(("part", "param", "hint"), UNKNOWN_KEYS.values(), ids=UNKNOWN_KEYS)
def test_unknown_keys_of_a_part_are_rejected_with_the_nearest_known_one(part: Any, param: str, hint: str) -> None:
    with pytest.raises(errors.InvalidRequest) as error_info:
        parse_chat(raw(chat(text_part("a"), part)), RequestPolicy(9))
    assert error_info.value.param == f"messages[0].content[1].{param}"
    assert hint in str(error_info.value)
    assert len(str(error_info.value)) < 400


@pytest.mark.parametrize(
    "part",
    [image_with(format="image/png"), {**IMAGE, "cache_control": {"type": "ephemeral"}}, image_with(frames=None), video()],
)
def test_keys_that_other_clients_send_are_accepted(part: Any) -> None:
    assert len(parse_chat(raw(chat(part)), RequestPolicy(9)).images) == 1


def test_a_mode_alone_is_a_router() -> None:
    (image,) = parse_chat(raw(chat(image_with(vir="all"), vir="off")), RequestPolicy(1)).images
    assert image.options.router == ALL
    (image,) = parse_chat(raw(chat(IMAGE, vir="off")), RequestPolicy(1)).images
    assert image.options.router == OFF


def test_a_video_is_replaced_by_its_labelled_frames() -> None:
    parsed = parse_chat(
        raw(chat(IMAGE, video(), text_part("and"), video(num_frames=1), IMAGE, text_part("?"))), RequestPolicy(28)
    )
    image, long, short, last = parsed.images
    frames = [replace(long, label=f"Frame{i}: ") for i in (1, 2)]
    request = replace(parsed, images=[image, *frames, replace(short, label="Frame1: "), last])
    (message,) = json.loads(request.with_embeddings([*"abcde"], [1] * 5))["messages"]
    content = [part.get("uuid") or part["text"] for part in message["content"]]
    assert content == ["a", "Frame1: ", "b", "Frame2: ", "c", "and", "Frame1: ", "d", "e", "?"]
