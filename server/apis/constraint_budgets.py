"""Budgets of what constrains the form of a response: choices, schemas, regular expressions and grammars.

vLLM compiles them in its engine, which all callers share. Its compiler has no bound of its own: a list of choices of a few
megabytes takes minutes and gigabytes.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from common import errors
from server.apis.budgets import over_budget
from server.apis.constraints import requires_tool
from server.apis.expressions import Cost, parse_grammar, regex_cost
from server.apis.request import Path, format_path
from server.apis.schema_loops import find_loop

MAX_CHOICES = 1024
MAX_CHOICE_CHARACTERS = 32_768
"""Maximum number of characters of all choices together."""
MAX_SCHEMA_BYTES = 65_536
MAX_SCHEMA_NODES = 8192
"""Maximum number of objects, lists and values in all schemas of a request together."""
MAX_SCHEMA_DEPTH = 64
MAX_SCHEMA_PROPERTIES = 256
"""Maximum number of properties of one object: the time to compile them grows with their square."""
MAX_ENUM_VALUES = 4096
MAX_REPETITIONS = 100_000
"""Largest value of `minItems`, `maxLength` and the like."""
MAX_REGEX_CHARACTERS = 4096
MAX_REGEX_SIZE = 2048
"""Maximum number of characters and classes of a regular expression with its repetitions written out."""
MAX_REGEX_LOOPS = 128
"""Maximum number of `*`, `+` and `{n,}` in a regular expression with its repetitions written out."""
MAX_GRAMMAR_CHARACTERS = 16_384
MAX_GRAMMAR_SIZE = 16_384
MAX_GRAMMAR_LOOPS = 1024
MAX_GRAMMAR_RULES = 512
MAX_EXPRESSION_CHARACTERS = 65_536
"""Maximum number of characters of all regular expressions and grammars of a request: to measure one takes 1 µs each."""
MAX_EXPRESSION_DEPTH = 64
"""How deeply groups of an expression or a grammar may be nested."""
MAX_TOOL_BYTES = 1 << 20
"""Maximum size of the schema of a tool that vLLM does not compile, and of all of them together."""
MAX_TOOL_NODES = 131_072
"""Maximum number of objects, lists and values in all such schemas."""

_REPETITION_KEYS = frozenset({
    "minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties", "minContains", "maxContains",
})  # fmt: skip
_CHECKED_KEYS = _REPETITION_KEYS | {"properties", "patternProperties", "enum", "pattern", "regex", "grammar", "definition"}
_FORMAT_PATHS = (("response_format",), ("text", "format"), ("output_config", "format"), ("output_format",))
_TOOL_SCHEMA_PATHS = (("function", "parameters"), ("parameters",), ("input_schema",))
_STRICT_PATHS = (("strict",), ("function", "strict"))
_KINDS = {
    "json": "schema", "regex": "regex", "whitespace_pattern": "regex", "choice": "choice", "grammar": "grammar",
    "structural_tag": "format",
}  # fmt: skip
"""Kinds of constraint by their name in `structured_outputs`."""

_json = msgspec.json.Decoder()


@dataclass
class _Totals:
    """What all constraints of a request have had so far."""

    nodes: int = 0
    expression_characters: int = 0
    uncompiled_bytes: int = 0
    uncompiled_nodes: int = 0

    def add_expression(self, budget: str, location: str, text: str) -> None:
        """Count a regular expression or a grammar. Raises `BudgetExceeded` if all of them together are too long."""
        self.expression_characters += len(text)
        if self.expression_characters > MAX_EXPRESSION_CHARACTERS:
            raise over_budget(
                budget, location, self.expression_characters, MAX_EXPRESSION_CHARACTERS,
                "characters together with the expressions and grammars before it", "send fewer or shorter ones",
            )  # fmt: skip


def check_constraints(body: Mapping[str, Any], *, compiled_tools: bool = False) -> None:
    """Check all constraints of a request, and the schemas of tools.

    A schema of a tool is compiled if the model must call it, or if it is `strict`. Others only become a part of the prompt:
    their size is bounded, and not what they say. With `compiled_tools` all of them are compiled.

    Raises:
        BudgetExceeded: One is too large, with the field, its size and the bound.
        InvalidRequest: A schema or a grammar refers to itself without an end.
    """
    totals = _Totals()
    for path, kind, value in _constraints(body, compiled_tools):
        location = format_path(path)
        if kind == "uncompiled":
            _check_size(location, value, totals)
        elif kind == "choice":
            _check_choices(location, value)
        elif kind == "regex":
            _check_regex(location, value, totals)
        elif kind == "grammar":
            _check_grammar(location, value, totals)
        else:
            schema = _parsed(location, value)
            _check_tree(location, schema, totals)
            for root in [schema] if kind == "schema" else _schemas_of_format(schema):
                _check_loops(location, root)


def _constraints(body: Mapping[str, Any], compiled_tools: bool) -> Iterator[tuple[Path, str, Any]]:
    """Yield path, kind and value of each constraint of a request."""
    outputs = body.get("structured_outputs")
    for name, value in outputs.items() if isinstance(outputs, dict) else ():
        if name in _KINDS:
            yield ("structured_outputs", name), _KINDS[name], value
    for name, kind in _KINDS.items():
        if f"guided_{name}" in body:
            yield (f"guided_{name}",), kind, body[f"guided_{name}"]
    for path in _FORMAT_PATHS:
        if (value := _at(body, path)) is not None:
            yield path, "format", value
    all_compiled = compiled_tools or requires_tool(body.get("tool_choice"))
    for place, tool in _tools(("tools",), body):
        kind = "schema" if all_compiled or _is_strict(tool) else "uncompiled"
        for path in _TOOL_SCHEMA_PATHS:
            if (value := _at(tool, path)) is not None:
                yield (*place, *path), kind, value
        if (value := _at(tool, ("format",))) is not None:  # a tool that takes a text with a grammar
            yield (*place, "format"), "format", value


def _tools(path: Path, owner: Any) -> Iterator[tuple[Path, Any]]:
    """Yield all tools of a request, or of a namespace of tools, each with its path."""
    tools = _at(owner, ("tools",))
    for i, tool in enumerate(tools if isinstance(tools, list) else ()):
        yield (*path, i), tool
        if len(path) == 1:
            yield from _tools((*path, i, "tools"), tool)


def _is_strict(tool: Any) -> bool:
    """Return whether vLLM holds the model to the schema of a tool, although it need not call it."""
    return any(_at(tool, path) not in (None, False) for path in _STRICT_PATHS)


def _at(value: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _check_choices(location: str, choices: Any) -> None:
    if not isinstance(choices, list):
        return
    if len(choices) > MAX_CHOICES:
        raise over_budget("choices", location, len(choices), MAX_CHOICES, "choices")
    characters = sum(len(choice) for choice in choices if isinstance(choice, str))
    if characters > MAX_CHOICE_CHARACTERS:
        raise over_budget("choices", location, characters, MAX_CHOICE_CHARACTERS, "characters", "send fewer or shorter choices")


def _check_regex(location: str, regex: Any, totals: _Totals) -> None:
    if not isinstance(regex, str):
        return
    if len(regex) > MAX_REGEX_CHARACTERS:
        raise over_budget("regex", location, len(regex), MAX_REGEX_CHARACTERS, "characters", "send a shorter expression")
    totals.add_expression("regex", location, regex)
    _check_cost("regex", location, regex_cost(regex), MAX_REGEX_SIZE, MAX_REGEX_LOOPS)


def _check_grammar(location: str, text: Any, totals: _Totals) -> None:
    if not isinstance(text, str):
        return
    if len(text) > MAX_GRAMMAR_CHARACTERS:
        raise over_budget("grammar", location, len(text), MAX_GRAMMAR_CHARACTERS, "characters", "send a shorter grammar")
    totals.add_expression("grammar", location, text)
    grammar = parse_grammar(text)
    _check_cost("grammar", location, grammar.cost, MAX_GRAMMAR_SIZE, MAX_GRAMMAR_LOOPS)
    if len(grammar.rules) > MAX_GRAMMAR_RULES:
        raise over_budget("grammar", location, len(grammar.rules), MAX_GRAMMAR_RULES, "rules")
    if (rule := grammar.endless_rule()) is not None:
        name = "a group" if rule.startswith("(") else f"rule {rule[:100]!r}"
        raise errors.InvalidRequest(
            f"{location}: no text matches {name}, since every alternative refers to itself: add one that ends.", param=location
        )


def _check_cost(budget: str, location: str, cost: Cost, max_size: int, max_loops: int) -> None:
    if cost.depth > MAX_EXPRESSION_DEPTH:
        raise over_budget(budget, location, cost.depth, MAX_EXPRESSION_DEPTH, "nested groups")
    if cost.size > max_size:
        hint = "send smaller repetitions, or * and +"
        raise over_budget(budget, location, cost.size, max_size, "elements once its repetitions are written out", hint)
    if cost.loops > max_loops:
        raise over_budget(budget, location, cost.loops, max_loops, "repetitions without an end")


def _parsed(location: str, schema: Any) -> Any:
    """Return a schema, parsed if it is a text; None if it is not valid JSON, which vLLM rejects. Raises `BudgetExceeded`."""
    size = len(schema) if isinstance(schema, str) else len(msgspec.json.encode(schema))
    if size > MAX_SCHEMA_BYTES:
        raise over_budget("schema", location, size, MAX_SCHEMA_BYTES, "bytes", "send a smaller schema")
    try:
        return _json.decode(schema) if isinstance(schema, str) else schema
    except (ValueError, RecursionError):
        return None


def _schemas_of_format(value: Any) -> Iterator[Any]:
    """Yield the schemas in a `response_format` or its like."""
    yield from (_at(value, path) for path in (("json_schema", "schema"), ("schema",)))
    structures = _at(value, ("structures",))
    for structure in structures if isinstance(structures, list) else ():
        yield _at(structure, ("schema",))


def _check_size(location: str, schema: Any, totals: _Totals) -> None:
    """Check the size of a schema that is not compiled."""
    totals.uncompiled_bytes += len(msgspec.json.encode(schema))
    if totals.uncompiled_bytes > MAX_TOOL_BYTES:
        raise over_budget(
            "schema", location, totals.uncompiled_bytes, MAX_TOOL_BYTES, "bytes (all tools before it counted)",
            "send smaller schemas, or fewer tools",
        )  # fmt: skip
    level = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        totals.uncompiled_nodes += len(level)
        if totals.uncompiled_nodes > MAX_TOOL_NODES:
            hint = "send a smaller schema, or fewer tools"
            raise over_budget("schema", location, totals.uncompiled_nodes, MAX_TOOL_NODES, "values (all tools counted)", hint)
        level = [child for node in level for child in _children(node)]
        if not level:
            return
    raise over_budget("schema", location, MAX_SCHEMA_DEPTH + 1, MAX_SCHEMA_DEPTH, "levels", "nest it less")


def _check_loops(location: str, schema: Any) -> None:
    if (reference := find_loop(schema)) is not None:
        raise errors.InvalidRequest(
            f"{location}: the schema refers to itself without an end, at $ref {reference[:200]!r}: make what recurs optional.",
            param=location,
        )


def _check_tree(location: str, schema: Any, totals: _Totals) -> None:
    """Check everything inside of a schema."""
    enum_values, level = 0, [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        totals.nodes += len(level)
        if totals.nodes > MAX_SCHEMA_NODES:
            hint = "send a smaller schema, or fewer tools"
            raise over_budget("schema", location, totals.nodes, MAX_SCHEMA_NODES, "values (all schemas counted)", hint)
        enum_values += sum(_check_object(location, node, totals) for node in level if isinstance(node, dict))
        if enum_values > MAX_ENUM_VALUES:
            raise over_budget("schema", location, enum_values, MAX_ENUM_VALUES, "values in enum", "send fewer")
        level = [child for node in level for child in _children(node)]
        if not level:
            return
    raise over_budget("schema", location, MAX_SCHEMA_DEPTH + 1, MAX_SCHEMA_DEPTH, "levels", "nest it less")


def _check_object(location: str, node: dict[str, Any], totals: _Totals) -> int:
    """Check one object of a schema. Returns the number of values in its `enum`."""
    if _CHECKED_KEYS.isdisjoint(node):
        return 0
    properties, enum = node.get("properties"), node.get("enum")
    if isinstance(properties, dict) and len(properties) > MAX_SCHEMA_PROPERTIES:
        raise over_budget("schema", f"{location}.properties", len(properties), MAX_SCHEMA_PROPERTIES, "properties")
    for name in _REPETITION_KEYS & node.keys():
        value = node[name]
        if isinstance(value, int | float) and value > MAX_REPETITIONS:
            raise errors.BudgetExceeded.of(
                "schema", f"{location}: {name} is {value}; the maximum is {MAX_REPETITIONS}: omit it.", location
            )
    for name in ("pattern", "regex"):
        _check_regex(f"{location}.{name}", node.get(name), totals)
    for pattern in node["patternProperties"] if isinstance(node.get("patternProperties"), dict) else ():
        _check_regex(f"{location}.patternProperties", pattern, totals)
    for name in ("grammar", "definition"):
        _check_grammar(f"{location}.{name}", node.get(name), totals)
    return len(enum) if isinstance(enum, list) else 0


def _children(node: Any) -> Iterable[Any]:
    return node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
