"""Values that vLLM takes for granted: without these checks it would answer a caller's mistake with an internal error."""

from collections.abc import Iterator, Mapping
from typing import Any

from common import errors
from server.apis.request import Path, format_path

_MIN_INTEGER, _MAX_INTEGER = -(1 << 63), (1 << 64) - 1
"""Range of the integers that vLLM sends between its processes, in MessagePack."""


def check_integers(body: Mapping[str, Any]) -> None:
    """Check that every integer of a body fits 64 bits. Raises `InvalidRequest` with the location of one that does not."""
    if not _has_large_integer(body):
        return
    path, value = next((path, value) for path, value in _located_leaves(body) if _is_large(value))
    location = format_path(path)[:200]  # its names are the caller's
    raise errors.InvalidRequest(
        f"{location} is an integer of {value.bit_length()} bits: expected one from -2^63 to 2^64 - 1.", param=location
    )


def _is_large(value: Any) -> bool:
    return type(value) is int and not _MIN_INTEGER <= value <= _MAX_INTEGER


def _has_large_integer(value: Any) -> bool:
    """Return whether a value has a large integer."""
    pending = [value]  # a stack, since a caller decides how deep recursion would go
    while pending:
        item = pending.pop()
        if type(item) is int:
            if _is_large(item):
                return True
        elif type(item) is dict:
            pending.extend(item.values())
        elif type(item) is list and set(map(type, item)) == {int}:  # fast: a prompt may be a list of 100,000 token ids
            pending += [min(item), max(item)]
        elif type(item) is list:
            pending.extend(item)
    return False


def _located_leaves(value: Any) -> Iterator[tuple[Path, Any]]:
    """Yield path and value of everything that is no object and no list."""
    pending: list[tuple[Path, Any]] = [((), value)]
    while pending:
        path, item = pending.pop()
        if isinstance(item, dict):
            pending += [((*path, name), inner) for name, inner in item.items()]
        elif isinstance(item, list):
            pending += [((*path, i), inner) for i, inner in enumerate(item)]
        else:
            yield path, item
