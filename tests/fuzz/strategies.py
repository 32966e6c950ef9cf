"""Strategies that several properties use: damaged files, and JSON bodies near to valid ones."""

import random
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

json_values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=30),
        st.sampled_from(["", "image_url", "text", "user", "data:,", "auto", "\x00", "<image>", "dvd:x/1", "\U0001f600"]),
    ),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=12), children, max_size=4),
    max_leaves=12,
)  # fmt: skip
"""Any JSON value."""


def damaged(files: list[bytes], most: int = 8) -> "st.SearchStrategy[bytes]":
    """Return files with a few bytes changed, removed, repeated or exchanged with those of another file."""
    return st.builds(_damage, st.sampled_from(files), st.sampled_from(files), st.integers(0, 2**32), st.integers(0, most))


def _damage(file: bytes, other: bytes, seed: int, count: int) -> bytes:
    generator, data = random.Random(seed), bytearray(file)
    for _ in range(count):
        _DAMAGES[generator.randrange(len(_DAMAGES))](data, other, generator)
    return bytes(data)


def _position(data: bytes | bytearray, generator: random.Random) -> int:
    """Return a position, a header's in half of the cases: what follows are mostly pixels."""
    return generator.randrange(min(len(data), 200 if generator.random() < 0.5 else 1 << 30) or 1)


def _change(data: bytearray, _other: bytes, generator: random.Random) -> None:
    if data:
        data[_position(data, generator)] = generator.choice((0, 1, 0x7F, 0x80, 0xFF, generator.randrange(256)))


def _large_number(data: bytearray, _other: bytes, generator: random.Random) -> None:
    start = _position(data, generator)
    data[start : start + 4] = generator.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0"))


def _cut(data: bytearray, _other: bytes, generator: random.Random) -> None:
    del data[_position(data, generator) :]


def _remove(data: bytearray, _other: bytes, generator: random.Random) -> None:
    start = _position(data, generator)
    del data[start : start + generator.randrange(1, 64)]


def _repeat(data: bytearray, _other: bytes, generator: random.Random) -> None:
    start = _position(data, generator)
    part = data[start : start + generator.randrange(1, 200)]
    data[start:start] = part * generator.randrange(1, 20)


def _exchange(data: bytearray, other: bytes, generator: random.Random) -> None:
    start, size = _position(data, generator), generator.randrange(1, 400)
    data[start : start + size] = other[start : start + size]


_DAMAGES: list[Callable[[bytearray, bytes, random.Random], None]] = [
    _change,
    _change,
    _large_number,
    _cut,
    _remove,
    _repeat,
    _exchange,
]


@st.composite
def near(draw: Callable[..., Any], example: Any, others: Any = json_values) -> Any:
    """Return `example` with some of its values exchanged, removed or added."""
    if draw(st.integers(0, 7)) == 0:
        return draw(others)
    if isinstance(example, dict):
        body = {key: draw(near(value, others)) for key, value in example.items() if draw(st.integers(0, 15))}
        if not draw(st.integers(0, 7)):
            body[draw(st.text(max_size=10))] = draw(others)
        return body
    if isinstance(example, list):
        items = [draw(near(value, others)) for value in example]
        return items * draw(st.sampled_from([1, 1, 1, 0, 2]))
    return example
