"""Values that vLLM takes for granted: without these checks it would answer a caller's mistake with an internal error."""

from collections.abc import Iterator, Mapping
from typing import Any

from common import errors
from server.apis.request import Path, format_path

_MIN_INTEGER, _MAX_INTEGER = -(1 << 63), (1 << 64) - 1
"""Range of the integers that vLLM sends between its processes, in MessagePack."""


def check_integers(body: Mapping[str, Any]) -> None:
    """Check that every integer of a body fits 64 bits. Raises `InvalidRequest` with the location of one that does not."""
    if all(map(_fits, _leaves(body))):
        return
    path, value = next((path, value) for path, value in _located_leaves(body) if not _fits(value))
    location = format_path(path)[:200]  # its names are the caller's
    raise errors.InvalidRequest(
        f"{location} is an integer of {value.bit_length()} bits: expected one from -2^63 to 2^64 - 1.", param=location
    )


def _fits(value: Any) -> bool:
    return type(value) is not int or _MIN_INTEGER <= value <= _MAX_INTEGER


def _leaves(value: Any) -> Iterator[Any]:
    """Yield every value that is no object and no list."""
    pending = [value]  # a stack, since a caller decides how deep recursion would go
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)
        else:
            yield item


def _located_leaves(value: Any) -> Iterator[tuple[Path, Any]]:
    """Like `_leaves`, with paths, which cost much more."""
    pending: list[tuple[Path, Any]] = [((), value)]
    while pending:
        path, item = pending.pop()
        if isinstance(item, dict):
            pending += [((*path, name), inner) for name, inner in item.items()]
        elif isinstance(item, list):
            pending += [((*path, i), inner) for i, inner in enumerate(item)]
        else:
            yield path, item
