"""What all bodies have in common: what is no JSON object, what only the operator may set, and texts passed as they came."""

import json
from typing import Any

import pytest

from server.requests.body import check_fields, parse_object, parse_text, place
from server.requests.dial import Allowed
from wire import errors


def deep(depth: int) -> Any:
    made: Any = "x"
    for _ in range(depth):
        made = [made]
    return made


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


def test_models_that_are_no_names_are_refused() -> None:
    for model in (5, True, [], {}, deep(900)):
        with pytest.raises(errors.InvalidRequest) as caught:
            parse_text(json.dumps({"model": model}).encode(), Allowed(1))
        assert caught.value.param == "model"


def test_a_text_is_passed_byte_for_byte() -> None:
    body = b'{ "prompt" : "a\\u00e9 \xc3\xa9", "model" :"m","x":1.50}\n'
    assert parse_text(body, Allowed(1)).replaced([], []) is body


def test_places_are_named_as_callers_write_them() -> None:
    assert place(("messages", 0, "content", 12)) == "messages[0].content[12]"
