"""Hostile values for every field of vLLM's request models, found by walking the models' JSON schemas."""

import itertools
from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]

_DEEP: Any = "x"
for _ in range(60):
    _DEEP = [_DEEP]

VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 2**62, 2**70, 1e308, "", "x" * 3000, [], {}, ["x"], [{}], {"x": 2**40}, {"type": None}, _DEEP,
)  # fmt: skip
"""Values for a field of a request: of each type, at its bounds, empty and nested."""

INNER_VALUES: tuple[Any, ...] = (None, -1, "", [], 2**62, {}, "x", [None], {"type": "x"}, [{}], True)
"""Values for a field inside another one. There are thousands of such fields, so each gets only the next one or two."""

_MAX_DEPTH = 3


def field_bodies(
    schema: Schema, base: dict[str, Any], skip: frozenset[str] = frozenset()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each field of a model with each value, and each field inside it. The name says which one it is."""
    for name, field in schema["properties"].items():
        for value in VALUES:
            yield f"{name}={value!r:.60}", {**base, name: value}
        for where, value in _inner_values(schema, field, itertools.cycle(INNER_VALUES), 0, set()):
            yield f"{name}{where}={value!r:.300}", {**base, name: value}


def _inner_values(
    root: Schema, schema: Schema, hostile: Iterator[Any], depth: int, seen: set[int]
) -> Iterator[tuple[str, Any]]:
    """Yields values of a schema that are valid but for one hostile value somewhere inside.

    A definition that other ones refer to is walked once for each field of the request: `seen` has those that were.
    """
    if depth > _MAX_DEPTH:
        return
    for option in _options(root, schema):
        if id(option) in seen:
            continue
        seen.add(id(option))
        properties = option.get("properties", {})
        valid = {name: _valid(root, properties.get(name, {})) for name in option.get("required", [])}
        for name, field in properties.items():
            for value in itertools.islice(hostile, 1 if depth else 2):
                yield f".{name}", {**valid, name: value}
            for where, value in _inner_values(root, field, hostile, depth + 1, seen):
                yield f".{name}{where}", {**valid, name: value}
        if properties:
            for name in valid:
                yield f" without {name}", {other: value for other, value in valid.items() if other != name}
            yield "", valid
        if "items" in option:
            for where, value in _inner_values(root, option["items"], hostile, depth + 1, seen):
                yield f"[0]{where}", [value]


def _options(root: Schema, schema: Schema) -> list[Schema]:
    """Returns what a schema may be, with references resolved."""
    if "$ref" in schema:
        return _options(root, root["$defs"][schema["$ref"].rpartition("/")[2]])
    alternatives = [*schema.get("anyOf", []), *schema.get("oneOf", [])]
    return list(itertools.chain.from_iterable(_options(root, option) for option in alternatives)) or [schema]


def _valid(root: Schema, schema: Schema, depth: int = 0) -> Any:
    """Returns a small valid value of a schema."""
    option = _options(root, schema)[0]
    if "const" in option or "enum" in option:
        return option.get("const", option.get("enum", [None])[0])
    if option.get("type") == "object":
        properties = option.get("properties", {})
        return {name: _valid(root, properties.get(name, {}), depth + 1) for name in option.get("required", []) if depth < 6}
    simple: dict[Any, Any] = {"array": [], "string": "a", "integer": 1, "number": 1, "boolean": True}
    return simple.get(option.get("type"))
