"""Bodies: what is refused at the door, what is replaced, and that all else stays as it was."""

import contextlib
import json
from typing import Any

import pytest

from protos import vision_pb2 as pb
from server.requests import check_fields, parse_chat, parse_object
from tests.server.peers import chat, image_part, picture, text_part
from wire import errors

IMAGE = image_part(picture())


def raw(body: Any) -> bytes:
    return json.dumps(body).encode()


NOT_AN_OBJECT = {
    "empty": b"",
    "space": b"  \n",
    "no JSON": b"hello",
    "cut": b'{"model": "a"',
    "array": b"[]",
    "number": b"5",
    "null": b"null",
    "string": b'"{}"',
    "two": b"{} {}",
    "comment": b"{/**/}",
    "trailing comma": b'{"a": 1,}',
    "byte-order mark": b"\xef\xbb\xbf{}",
    "UTF-16": "{}".encode("utf-16"),
    "Latin-1": b'{"a": "\xe9"}',
    "overlong": b'{"a": "\xc0\xaf"}',
    "encoded surrogate": b'{"a": "\xed\xa0\x80"}',
    "lone surrogate": rb'{"a": "\ud800"}',
    "lone surrogate in capitals": rb'{"a": "\uD800"}',
    "lone low surrogate": rb'{"a": "\udc00"}',
    "lone surrogate beside other text": '{"b": "é", "a": "\\ud800"}'.encode(),
    "surrogates in the wrong order": rb'{"a": "\udc00\ud800"}',
    "surrogate as a name": rb'{"\ud800": 1}',
    "NaN": b'{"temperature": NaN}',
    "infinite": b'{"temperature": Infinity}',
    "minus infinite": b'{"temperature": -Infinity}',
    "too large a number": b'{"seed": 1e400}',
    "too small a number": b'{"seed": -1e400}',
    "5000 digits": b'{"seed": ' + b"9" * 5000 + b"}",
    "raw control character": b'{"a": "\x00"}',
    "deep arrays": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\xab\xae\x05\x00\x43\xbf\xa6\xa3\x02\x00\x00\x00",
    "form": b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\na\r\n--x--\r\n',
}


@pytest.mark.parametrize("body", NOT_AN_OBJECT.values(), ids=NOT_AN_OBJECT)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(errors.InvalidRequest):
        parse_object(body)


@pytest.mark.parametrize("text", [r"\ud83d\ude00", r"\u0000", r"\\ud800", "😀", "\\u00e9"])
def test_every_text_that_is_one_passes(text: str) -> None:
    body = f'{{"model": "m", "messages": [{{"role": "user", "content": "{text}"}}]}}'.encode()
    assert parse_chat(body, 1).replaced([], []) is body


def test_of_a_name_that_comes_twice_the_last_counts_as_it_does_for_the_engine() -> None:
    body = b'{"model": "one", "model": "two", "messages": [{"role": "user", "content": "a"}]}'
    assert parse_chat(body, 1).model == json.loads(body)["model"] == "two"


def test_unknown_names_are_the_engines_business() -> None:
    body = raw({**chat("hello"), **{f"x{i}": i for i in range(100_000)}})
    assert parse_chat(body, 1).replaced([], []) is body


MESSAGES: dict[str, Any] = {
    "none": [],
    "null": None,
    "text": "hello",
    "an object": {"role": "user"},
    "a number": 5,
    "of texts": ["hello"],
    "of nulls": [None],
    "of lists": [[]],
}


@pytest.mark.parametrize("messages", MESSAGES.values(), ids=MESSAGES)
def test_messages_that_are_none_are_refused(messages: Any) -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        parse_chat(raw({"model": "m", "messages": messages}), 1)
    assert caught.value.param == "messages"


def test_a_request_without_messages_is_refused() -> None:
    with pytest.raises(errors.InvalidRequest, match="messages"):
        parse_chat(raw({"model": "m"}), 1)


def deep(depth: int) -> Any:
    made: Any = "x"
    for _ in range(depth):
        made = [made]
    return made


PARTS: dict[str, Any] = {
    "null": None,
    "number": 5,
    "list": [],
    "empty": {},
    "no type": {"text": "a"},
    "no type but an image": {"image_url": "https://example.org/a.png"},
    "type null": {"type": None},
    "type list": {"type": []},
    "type object": {"type": {}},
    "type deep": {"type": deep(900)},
    "type long": {"type": "x" * 100_000},
    "type unknown": {"type": "hologram"},
    "video": {"type": "video_url", "video_url": {"url": "https://example.org/a"}},
    "audio": {"type": "input_audio", "input_audio": {}},
    "embedding": {"type": "image_embeds", "image_embeds": {"image_num_tokens": [1]}, "uuid": "a"},
    "embedding in a text": {"type": "text", "text": "a", "image_embeds": {}},
    "image beside a text": {"type": "text", "text": "a", "image_url": {"url": "file:///etc/passwd"}},
    "key in an image": {**IMAGE, "uuid": "stolen"},
    "key in a text": {"type": "text", "text": "a", "uuid": "stolen"},
    "image that is missing": {"type": "image_url"},
    "image null": {"type": "image_url", "image_url": None},
    "image as a string": {"type": "image_url", "image_url": "https://example.org/a.png"},
    "image as a list": {"type": "image_url", "image_url": ["https://example.org/a.png"]},
    "image without URL": {"type": "image_url", "image_url": {"detail": "low"}},
    "URL null": {"type": "image_url", "image_url": {"url": None}},
    "URL empty": {"type": "image_url", "image_url": {"url": ""}},
    "URL number": {"type": "image_url", "image_url": {"url": 5}},
    "URL list": {"type": "image_url", "image_url": {"url": ["https://example.org/a.png"]}},
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_parts_that_are_neither_text_nor_image_are_refused_with_their_place(part: Any) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}, {"role": "user", "content": [text_part("b"), part]}]}
    with pytest.raises(errors.InvalidRequest) as caught:
        parse_chat(raw(body), 9)
    assert caught.value.param == "messages[1].content[1]"
    assert len(str(caught.value)) < 400


def test_models_that_are_no_names_are_refused() -> None:
    for model in (5, True, [], {}, deep(900)):
        with pytest.raises(errors.InvalidRequest) as caught:
            parse_chat(raw({**chat("a"), "model": model}), 1)
        assert caught.value.param == "model"


NOT_FROM_CALLERS = [
    "mm_processor_kwargs", "media_io_kwargs", "chat_template", "kv_transfer_params", "ec_transfer_params", "vllm_xargs",
    "prompt_embeds",
]  # fmt: skip


@pytest.mark.parametrize("name", NOT_FROM_CALLERS)
def test_what_only_the_operator_may_set_is_refused(name: str) -> None:
    for value in ({}, "x", {"code_revision": "main"}, False):
        with pytest.raises(errors.InvalidRequest) as caught:
            check_fields({"model": "m", name: value})
        assert caught.value.param == name
    check_fields({"model": "m", name: None})


OFF, ALL, HALF = pb.Router(mode=pb.Router.OFF), pb.Router(mode=pb.Router.ALL), pb.Router(relative_threshold=0.5)
BOTH = pb.Router(relative_threshold=0.5, absolute_threshold=0.25)
# what the caller says, what the operator does, what is in force
ROUTERS: dict[str, tuple[Any, pb.Router, pb.Router]] = {
    "nothing": (None, pb.Router(), pb.Router()),
    "nothing, and the operator off": (None, OFF, OFF),
    "empty, and the operator's thresholds": ({}, BOTH, BOTH),
    "nulls": ({"mode": None, "relative_threshold": None}, HALF, HALF),
    "off": ({"mode": "off"}, pb.Router(), OFF),
    "off, and the operator's thresholds have no part in it": ({"mode": "off"}, BOTH, OFF),
    "all": ({"mode": "all"}, OFF, ALL),
    "auto": ({"mode": "auto"}, ALL, pb.Router()),
    "auto, and the operator's thresholds": ({"mode": "auto"}, BOTH, BOTH),
    "threshold": ({"relative_threshold": 0.5}, pb.Router(), HALF),
    "threshold, and the operator's other one": ({"absolute_threshold": 0.25}, HALF, BOTH),
    "threshold instead of the operator's": ({"relative_threshold": 0.5}, pb.Router(relative_threshold=0.75), HALF),
    "auto with thresholds": ({"mode": "auto", "relative_threshold": 0.5, "absolute_threshold": 0.25}, OFF, BOTH),
    "whole numbers": (
        {"relative_threshold": 0, "absolute_threshold": 1}, BOTH, pb.Router(relative_threshold=0, absolute_threshold=1)
    ),
}  # fmt: skip


@pytest.mark.parametrize(("said", "own", "router"), ROUTERS.values(), ids=ROUTERS)
def test_the_router_is_the_callers_before_the_operators(said: Any, own: pb.Router, router: pb.Router) -> None:
    assert parse_chat(raw(chat("a", vir=said)), 1, own).router == router


def test_without_a_word_on_the_router_the_operators_is_in_force() -> None:
    assert parse_chat(raw(chat("a")), 1, HALF).router == HALF
    assert parse_chat(raw(chat("a")), 1).router == pb.Router()


NO_ROUTERS: dict[str, tuple[Any, str, str]] = {
    "a mode alone": ("off", "vir", "an object such as .*, not 'off'"),
    "false": (False, "vir", "not False"),
    "a list": ([{"mode": "off"}], "vir", "not list"),
    "deep": (deep(900), "vir", "not list"),
    "unknown field": ({"mode": "auto", "treshold": 0.5}, "vir", "no field 'treshold'; expected mode, relative_threshold"),
    "unknown field null": ({"treshold": None}, "vir", "no field 'treshold'"),
    "long field": ({"x" * 100_000: 1}, "vir", "no field 'xxx"),
    "mode unknown": ({"mode": "on"}, "vir.mode", "'on' is not one of auto, off, all"),
    "mode in capitals": ({"mode": "OFF"}, "vir.mode", "'OFF' is not one of"),
    "mode number": ({"mode": 1}, "vir.mode", "1 is not one of"),
    "mode deep": ({"mode": deep(900)}, "vir.mode", "list is not one of"),
    "mode long": ({"mode": "x" * 100_000}, "vir.mode", "'xxx"),
    "threshold text": ({"relative_threshold": "0.5"}, "vir.relative_threshold", "'0.5' is not a number from 0 to 1"),
    "threshold true": ({"absolute_threshold": True}, "vir.absolute_threshold", "True is not a number"),
    "threshold object": ({"absolute_threshold": {}}, "vir.absolute_threshold", "dict is not a number"),
    "threshold below": ({"relative_threshold": -0.01}, "vir.relative_threshold", "-0.01 is not"),
    "threshold above": ({"absolute_threshold": 1.01}, "vir.absolute_threshold", "1.01 is not"),
    "threshold of 4000 digits": ({"absolute_threshold": 10**4000}, "vir.absolute_threshold", "1000"),
    "off with a threshold": ({"mode": "off", "relative_threshold": 0.5}, "vir.relative_threshold", "0.5 is .* the mode is off"),
    "all with a threshold": ({"mode": "all", "absolute_threshold": 0}, "vir.absolute_threshold", "only for .* the mode is all"),
}


@pytest.mark.parametrize(("said", "param", "message"), NO_ROUTERS.values(), ids=NO_ROUTERS)
def test_settings_of_the_router_that_are_none_are_refused(said: Any, param: str, message: str) -> None:
    for content in ("a", IMAGE):
        with pytest.raises(errors.InvalidRequest, match=message) as caught:
            parse_chat(raw(chat(content, vir=said)), 1)
        assert caught.value.param == param
        assert len(str(caught.value)) < 400


def test_a_threshold_where_the_operator_asks_no_router_needs_a_mode() -> None:
    with pytest.raises(errors.InvalidRequest, match='the mode is off: .* "mode": "auto"'):
        parse_chat(raw(chat("a", vir={"relative_threshold": 0.5})), 1, OFF)


@pytest.mark.parametrize("said", [{"mode": "off"}, {}, None])
def test_the_setting_of_the_router_does_not_go_to_the_engine(said: Any) -> None:
    for content in ("a", IMAGE):
        parsed = parse_chat(raw(chat(content, vir=said, seed=5)), 1)
        made = json.loads(parsed.replaced(["k"] * len(parsed.images), [1] * len(parsed.images)))
        assert list(made) == ["model", "messages", "seed"]


def test_images_are_counted_over_all_messages() -> None:
    messages = [{"role": "user", "content": [IMAGE, IMAGE]}, {"role": "user", "content": [IMAGE]}]
    body = raw({"model": "m", "messages": messages})
    assert len(parse_chat(body, 3).images) == 3
    with pytest.raises(errors.TooManyImages, match="3 images in one request, at most 2"):
        parse_chat(body, 2)


def test_ten_thousand_messages_are_read() -> None:
    body = raw({"model": "m", "messages": [{"role": "user", "content": [text_part("a")]}] * 10_000})
    assert parse_chat(body, 1).replaced([], []) is body


WORDS = {
    "text": {"messages": [{"role": "user", "content": "<IMG_CONTEXT>" * 1000}]},
    "part": {"messages": [{"role": "user", "content": [text_part("see <image> here")]}]},
    "plain part": {"messages": [{"role": "user", "content": ["see <image> here"]}]},
    "escaped": {"messages": [{"role": "user", "content": "\u003cIMG_CONTEXT\u003e"}]},
    "name": {"messages": [{"role": "user", "name": "<image>", "content": "a"}]},
    "reasoning": {"messages": [{"role": "assistant", "content": None, "reasoning_content": "<image>"}]},
    "call": {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "<image>"}}]}]},
    "tool": {"tools": [{"type": "function", "function": {"name": "f", "description": "<IMG_CONTEXT>"}}]},
    "name in a tool": {"tools": [{"type": "function", "function": {"parameters": {"properties": {"<image>": {}}}}}]},
    "template": {"chat_template_kwargs": {"system": "<IMG_CONTEXT>"}},
}


@pytest.mark.parametrize("fields", WORDS.values(), ids=WORDS)
def test_words_that_mark_an_image_are_refused_beside_one(fields: dict[str, Any]) -> None:
    image = {"role": "user", "content": [IMAGE]}
    with pytest.raises(errors.InvalidRequest, match="which marks the place of an image") as caught:
        parse_chat(raw({"model": "m", **fields, "messages": [*fields.get("messages", []), image]}), 1)
    assert caught.value.param
    assert len(caught.value.param) <= 200
    alone = raw({"model": "m", "messages": [{"role": "user", "content": "a"}], **fields})
    assert parse_chat(alone, 1).replaced([], []) is alone, "without an image they are text"


def test_images_are_replaced_in_order_and_nothing_else_changes() -> None:
    images = [image_part(picture(i)) for i in range(4)]
    images[1]["image_url"]["detail"] = "high"
    body = {
        "model": "m",
        "temperature": 0.1,
        "logit_bias": {"7": -100},
        "seed": 2**63 - 1,
        "stop": ["é", "\u0000", "😀"],
        "unknown": {"nested": [None, True, 1.0, 1e-7, 12345678901234567890]},
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [images[0], text_part("and"), images[1]], "name": "me"},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function"}]},
            {"role": "user", "content": ["plain", text_part("then"), images[2]]},
            {"role": "user", "content": [images[3]]},
            {"role": "tool", "tool_call_id": "1"},
        ],
    }
    chat = parse_chat(raw(body), 4)
    assert chat.urls == [image["image_url"]["url"] for image in images]
    made = json.loads(chat.replaced(["k0", "k1", "k2", "k3"], [10, 11, 12, 13]))
    new = [{"type": "image_embeds", "image_embeds": {"image_num_tokens": [10 + i]}, "uuid": f"k{i}"} for i in range(4)]
    body["messages"][1]["content"] = [new[0], text_part("and"), new[1]]
    body["messages"][3]["content"] = ["plain", text_part("then"), new[2]]
    body["messages"][4]["content"] = [new[3]]
    assert made == body
    assert list(made) == list(body)


def test_equal_images_are_replaced_each_in_its_place() -> None:
    made = json.loads(parse_chat(raw(chat(IMAGE, text_part("a"), IMAGE)), 2).replaced(["k", "k"], [5, 5]))
    assert [part["type"] for part in made["messages"][0]["content"]] == ["image_embeds", "text", "image_embeds"]


def test_a_text_request_is_passed_byte_for_byte() -> None:
    body = b'{ "messages":[{"content":"a\\u00e9 \xc3\xa9","role":"user"}] , "model" :"m","x":1.50, "x":[ ]}\n'
    assert parse_chat(body, 1).replaced([], []) is body


@pytest.mark.parametrize("depth", [100, *range(900, 1000, 3)])
def test_any_depth_is_either_read_and_written_or_refused(depth: int) -> None:
    body = b'{"model": "m", "messages": [{"role": "user", "content": [%s]}], "x": %s}' % (
        raw(IMAGE),
        b"[" * depth + b"]" * depth,
    )
    with contextlib.suppress(errors.InvalidRequest) if depth > 100 else contextlib.nullcontext():
        assert json.loads(parse_chat(body, 1).replaced(["k"], [1]))["model"] == "m"
