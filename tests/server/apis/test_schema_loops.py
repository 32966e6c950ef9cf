"""JSON schemas that refer to themselves."""

from typing import Any

import pytest

from server.apis.schema_loops import find_loop

SELF: dict[str, Any] = {"$ref": "#"}
LOOPS: dict[str, Any] = {
    "itself": SELF,
    "by two definitions": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    "in a part": {"properties": {"x": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"$ref": "#/$defs/a"}}},
    "anyOf": {"anyOf": [{"type": "string"}, SELF]},
    "allOf": {"allOf": [SELF]},
    "required": {"type": "object", "properties": {"a": SELF}, "required": ["a"]},
    "required, indirectly": {
        "type": "object", "properties": {"a": {"$ref": "#/$defs/a~1b"}}, "required": ["a"],
        "$defs": {"a/b": {"type": "array", "minItems": 1, "items": SELF}},
    },
    "items": {"type": "array", "minItems": 2, "items": SELF},
    "prefix": {"type": "array", "minItems": 1, "prefixItems": [SELF]},
}  # fmt: skip


@pytest.mark.parametrize("schema", LOOPS.values(), ids=LOOPS)
def test_a_loop_without_an_end_is_found(schema: Any) -> None:
    assert str(find_loop(schema)).startswith("#")


TREE = {
    "type": "object",
    "properties": {"value": {"type": "integer"}, "children": {"type": "array", "items": {"$ref": "#"}}},
    "required": ["value", "children"],
}
FINITE: dict[str, Any] = {
    "tree": TREE,
    "optional": {"type": "object", "properties": {"next": SELF}},
    "or null": {"type": "object", "properties": {"next": {"anyOf": [SELF, {"type": "null"}]}}, "required": ["next"]},
    "null by type": {"type": ["object", "null"], "properties": {"next": SELF}, "required": ["next"]},
    "used twice": {"allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}], "$defs": {"a": {"type": "string"}}},
    "not resolved": {"anyOf": [{"$ref": "#/$defs/absent"}, {"$ref": "https://example.org/"}, {"$ref": "#anchor"}, {"$ref": 5}]},
    "odd": {"type": "object", "required": 5, "properties": [], "anyOf": {}, "$defs": {"a": {"$ref": "#/required/0"}}},
    "list": [],
    "text": "x",
    "true": True,
}


@pytest.mark.parametrize("schema", FINITE.values(), ids=FINITE)
def test_other_schemas_pass(schema: Any) -> None:
    assert find_loop(schema) is None


def test_a_deep_chain_of_references_is_followed() -> None:
    definitions = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(3000)}
    assert find_loop({"$defs": {**definitions, "d3000": {"type": "string"}}, "$ref": "#/$defs/d0"}) is None
    assert find_loop({"$defs": {**definitions, "d3000": {"$ref": "#/$defs/d0"}}, "$ref": "#/$defs/d0"}) is not None
