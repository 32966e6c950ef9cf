"""Bodies to JSON objects, without a stall for everybody else where megabytes of base64 are in them."""

import json
import math
import re
import secrets
from typing import Any, NoReturn

from common import errors

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_FILE = re.compile(rb':[ \t\r\n]*"(?=data:|[A-Za-z0-9+/_-]{256})')
"""Before a value that may be a file. A string's closing quote can follow a colon too, but then none of these comes next."""
_LARGE = 1 << 16
"""Bytes of a value from which it is worth while not to have the parser read it."""


def parse_object(raw: bytes) -> dict[str, Any]:
    """A JSON object that is valid UTF-8 all through. Raises `InvalidRequest`."""
    rest, files = _without_files(raw)
    try:
        body = json.loads(rest.decode(), parse_constant=_no_constant, parse_float=_finite, object_hook=_restoring(files))
        if _SURROGATE.search(rest):  # a lone one passes the parser but is no text
            json.dumps(body, ensure_ascii=False).encode()
    except UnicodeError:
        raise errors.InvalidRequest("the body is not valid UTF-8") from None
    except RecursionError:
        raise errors.InvalidRequest("the body is nested too deeply") from None
    except ValueError as error:
        # a place in the body without its files is none in what the caller sent
        why = error.msg if files and isinstance(error, json.JSONDecodeError) else str(error)
        raise errors.InvalidRequest(f"the body is not valid JSON: {why[:200]}") from None
    if not isinstance(body, dict):
        raise errors.InvalidRequest(f"the body must be a JSON object, not {type(body).__name__}")
    return body


def _without_files(raw: bytes) -> tuple[bytes, dict[str, str]]:
    """The body with a short name for each large value that is a file, and what the names stand for.

    The parser looks at every character and holds the interpreter meanwhile, 2 ms a megabyte; to look for the end of a string
    costs a fiftieth. A value with anything in it that JSON writes in another way, or forbids, is left for the parser.
    """
    if len(raw) < _LARGE:
        return raw, {}
    name, files, parts, done, at = secrets.token_hex(16), dict[str, str](), list[bytes](), 0, 0
    while found := _FILE.search(raw, at):
        start = found.end()
        at = raw.find(b'"', start)
        if at < 0:
            break
        if at - start >= _LARGE and _is_plain(value := raw[start:at]):
            stand_in = f"file-{name}-{len(files)}"
            files[stand_in] = value.decode("ascii")
            parts += [raw[done:start], stand_in.encode()]
            done = at
    return b"".join([*parts, raw[done:]]), files


def _is_plain(value: bytes) -> bool:
    return value.isascii() and not any(odd in value for odd in (b"\\", b"\n", b"\r", b"\t", b"\0"))


def _restoring(files: dict[str, str]) -> Any:
    """For the parser: puts them back."""
    if not files:
        return None
    return lambda made: {key: files.get(value, value) if type(value) is str else value for key, value in made.items()}


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_constant(text[:100])
