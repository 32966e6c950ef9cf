"""What is no JSON object is refused; and a body with large files in it is read as any parser would read it."""

import base64
import json
from typing import Any

import pytest

from common import errors
from server.http.json_body import decode_object

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
        decode_object(body)


FILE = "data:image/png;base64," + base64.b64encode(bytes(range(256)) * 300).decode()
BARE = FILE.partition(",")[2]

LARGE: dict[str, Any] = {
    "a data: URL": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": FILE}}]}]},
    "several": {"messages": [{"url": FILE}, {"url": FILE + "x"}, {"text": "b"}, {"url": FILE}], "url": FILE},
    "no URL": {"source": {"data": BARE, "media_type": "image/png"}},
    "in a list": {"input": [FILE, FILE]},
    "as a name": {FILE: FILE, "a": {BARE: 1}},
    "beside what looks like its end": {"a:": "b:", "c": FILE + "é", "d": 'x: "' + FILE, "e": FILE},
    "with escapes": {"url": FILE + "\n", "other": FILE + '"', "third": FILE + "\\"},
    "not a file": {"text": "a" * 100_000 + " b " * 50_000, "other": "é" * 70_000},
    "surrogates beside it": {"url": FILE, "text": "\N{GRINNING FACE}"},
}


@pytest.mark.parametrize("body", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("options", [{}, {"ensure_ascii": False}, {"indent": 3}, {"separators": (",", ":")}], ids=str)
def test_large_files_are_read_as_they_came(body: dict[str, Any], options: dict[str, Any]) -> None:
    raw = json.dumps(body, **options).encode()
    assert decode_object(raw) == json.loads(raw) == body


def test_slashes_may_be_escaped() -> None:
    raw = json.dumps({"url": FILE}).replace("/", "\\/").encode()
    assert decode_object(raw) == {"url": FILE}


BROKEN = {
    "a quote too many": '{"a": "b: "%s"}',
    "a quote too few": '{"a": %s"}',
    "not ended": '{"a": "%s',
    "a line break in it": '{"a": "%s\n"}',
    "a tab in it": '{"a": "%s\t"}',
    "a lone surrogate beside it": '{"a": "%s", "b": "\\ud800"}',
    "a comma too many": '{"a": "%s",}',
    "no object": '["%s"]',
}


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("file", [FILE, BARE], ids=["URL", "bare"])
def test_what_is_broken_beside_a_large_file_is_refused(body: str, file: str) -> None:
    with pytest.raises(errors.InvalidRequest):
        decode_object((body % file).encode())
