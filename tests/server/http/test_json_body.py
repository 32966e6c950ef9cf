"""Decoding of bodies: only JSON objects are accepted, and large strings are decoded as by any other parser."""

import base64
import json
from typing import Any

import pytest

from common import errors
from server.http.json_body import count_values, decode_object, quote

INVALID_BODIES = {
    "empty": b"",
    "white space": b"  \n",
    "not JSON": b"hello",
    "truncated": b'{"model": "a"',
    "array": b"[]",
    "number": b"5",
    "null": b"null",
    "string": b'"{}"',
    "two objects": b"{} {}",
    "comment": b"{/**/}",
    "trailing comma": b'{"a": 1,}',
    "byte-order mark": b"\xef\xbb\xbf{}",
    "UTF-16": "{}".encode("utf-16"),
    "Latin-1": b'{"a": "\xe9"}',
    "overlong UTF-8": b'{"a": "\xc0\xaf"}',
    "encoded surrogate": b'{"a": "\xed\xa0\x80"}',
    "lone surrogate": rb'{"a": "\ud800"}',
    "lone surrogate in capitals": rb'{"a": "\uD800"}',
    "lone low surrogate": rb'{"a": "\udc00"}',
    "lone surrogate beside other text": '{"b": "é", "a": "\\ud800"}'.encode(),
    "surrogates in the wrong order": rb'{"a": "\udc00\ud800"}',
    "surrogate in a field name": rb'{"\ud800": 1}',
    "NaN": b'{"temperature": NaN}',
    "infinite": b'{"temperature": Infinity}',
    "minus infinite": b'{"temperature": -Infinity}',
    "number too large": b'{"seed": 1e400}',
    "number too small": b'{"seed": -1e400}',
    "number of 5000 digits": b'{"seed": ' + b"9" * 5000 + b"}",
    "raw control character": b'{"a": "\x00"}',
    "deep arrays": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\xab\xae\x05\x00\x43\xbf\xa6\xa3\x02\x00\x00\x00",
    "form": b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\na\r\n--x--\r\n',
}


@pytest.mark.parametrize("body", INVALID_BODIES.values(), ids=INVALID_BODIES)
def test_a_body_that_is_not_a_json_object_is_rejected(body: bytes) -> None:
    with pytest.raises(errors.InvalidRequest):
        decode_object(body)


URL = "data:image/png;base64," + base64.b64encode(bytes(range(256)) * 300).decode()
BASE64 = URL.partition(",")[2]

LARGE_BODIES: dict[str, Any] = {
    "data: URL": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": URL}}]}]},
    "several files": {
        "messages": [{"url": URL}, {"url": URL + "x"}, {"text": "b"}, {"url": URL}],
        "url": URL,
    },
    "bare base64": {"source": {"data": BASE64, "media_type": "image/png"}},
    "files in a list": {"input": [URL, URL]},
    "file as a field name": {URL: URL, "a": {BASE64: 1}},
    "text that resembles the end of a file": {"a:": "b:", "c": URL + "é", "d": 'x: "' + URL, "e": URL},
    "escapes after a file": {"url": URL + "\n", "other": URL + '"', "third": URL + "\\"},
    "long text": {"text": "a" * 100_000 + " b " * 50_000, "other": "é" * 70_000},
    "surrogate pair beside a file": {"url": URL, "text": "\N{GRINNING FACE}"},
}


@pytest.mark.parametrize("body", LARGE_BODIES.values(), ids=LARGE_BODIES)
@pytest.mark.parametrize("options", [{}, {"ensure_ascii": False}, {"indent": 3}, {"separators": (",", ":")}], ids=str)
def test_large_files_are_decoded_unchanged(body: dict[str, Any], options: dict[str, Any]) -> None:
    raw = json.dumps(body, **options).encode()
    assert decode_object(raw) == json.loads(raw) == body


def test_escaped_slashes_are_decoded() -> None:
    raw = json.dumps({"url": URL}).replace("/", "\\/").encode()
    assert decode_object(raw) == {"url": URL}


BROKEN_BODIES = {
    "extra quote": '{"a": "b: "%s"}',
    "missing quote": '{"a": %s"}',
    "unterminated string": '{"a": "%s',
    "raw line break": '{"a": "%s\n"}',
    "raw tab": '{"a": "%s\t"}',
    "lone surrogate beside a file": '{"a": "%s", "b": "\\ud800"}',
    "trailing comma": '{"a": "%s",}',
    "array": '["%s"]',
}


@pytest.mark.parametrize("body", BROKEN_BODIES.values(), ids=BROKEN_BODIES)
@pytest.mark.parametrize("file", [URL, BASE64], ids=["data: URL", "bare base64"])
def test_invalid_json_with_a_large_file_is_rejected(body: str, file: str) -> None:
    with pytest.raises(errors.InvalidRequest):
        decode_object((body % file).encode())


VALUES = {
    b"{}": 0,
    b'{"a": 1}': 2,
    b'{"a": [1, 2, {"b": null}]}': 7,
    b'{"a": "' + b"A" * 500_000 + b'"}': 2,
    b"[" * 70_000: 0,
    b'"a, b: [c] {d}"': 4,
}


@pytest.mark.parametrize(("raw", "count"), VALUES.items(), ids=range(len(VALUES)))
def test_values_are_counted_by_their_separators(raw: bytes, count: int) -> None:
    assert count_values(raw, 100) == count


@pytest.mark.parametrize("separator", [b",", b":", b"{,", b"[,"])
def test_more_values_than_allowed_are_rejected(separator: bytes) -> None:
    raw = b'{"image": "' + b"A" * 1_000_000 + b'", ' + separator * 100_000
    assert count_values(raw, 300_000) >= 100_000
    with pytest.raises(errors.BudgetExceeded, match="more than 90000 values") as error_info:
        count_values(raw, 90_000)
    assert error_info.value.budget == "json_values"


def test_lists_that_are_only_nested_are_left_to_the_decoder() -> None:
    with pytest.raises(errors.InvalidRequest, match="nested too deeply"):
        decode_object(b"[" * 10_000_000)


QUOTED: dict[str, tuple[Any, str]] = {
    "null": (None, "null"),
    "true": (True, "true"),
    "number": (1.5, "1.5"),
    "text": ('a "word"', '"a \\"word\\""'),
    "letters": ("ä…", '"ä…"'),
    "long": ("x" * 101, f'"{"x" * 99}…"'),
    "just short enough": ("x" * 100, f'"{"x" * 100}"'),
    "list": ([1], "a list"),
    "object": ({"a": 1}, "an object"),
}


@pytest.mark.parametrize(("value", "expected"), QUOTED.values(), ids=QUOTED)
def test_a_value_is_quoted_as_json(value: Any, expected: str) -> None:
    assert quote(value) == expected


@pytest.mark.parametrize("character", ['"', "\n", "\x01", "\\"])
def test_a_text_is_not_cut_inside_an_escape(character: str) -> None:
    quoted = quote(character * 200)
    assert len(quoted) <= 102
    assert set(json.loads(quoted)) == {character, "…"}
