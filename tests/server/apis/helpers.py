"""Values that several test modules of the APIs use."""

from typing import Any


def nested_list(depth: int) -> Any:
    """Return a string inside `depth` lists."""
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value
