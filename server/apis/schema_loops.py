"""JSON schemas that refer to themselves without an end, so that no finite value fits them or no value is ever reached."""

from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote

_HERE = ("allOf", "anyOf", "oneOf")
"""Keywords whose schemas describe the same value."""

_Edges = Callable[[dict[str, Any], Any], Iterator[Any]]
"""Yields the schemas that one leads to, from the schema and the root of the document."""


def find_loop(root: Any) -> str | None:
    """Return a reference that leads back to itself; None if there is none.

    Two kinds of loop are looked for: one that stays at the same value (references, `allOf`, `anyOf`, `oneOf`), and one through
    what a value cannot do without (references, `allOf`, required properties, items if there must be one).
    """
    references = list(_references(root))  # most schemas have none
    return _search(root, references, _same_value) or _search(root, references, _needed)


def _search(root: Any, references: list[str], edges: _Edges) -> str | None:
    """Return a reference on a cycle of the graph of schemas that has these edges. A cycle has at least one reference."""
    finished: set[int] = set()
    for start in references:
        stack = [(0, iter([_resolve(root, start)]))]  # a stack, since a caller decides how deep recursion would go
        active: set[int] = set()
        while stack:
            node, children = stack[-1]
            child = next((child for child in children if isinstance(child, dict) and id(child) not in finished), None)
            if child is None:
                stack.pop()
                active.discard(node)
                finished.add(node)
            elif id(child) in active:
                return start
            else:
                active.add(id(child))
                stack.append((id(child), edges(child, root)))
    return None


def _same_value(node: dict[str, Any], root: Any) -> Iterator[Any]:
    """Yield the schemas that describe the same value as `node`."""
    if isinstance(node.get("$ref"), str):
        yield _resolve(root, node["$ref"])
    for name in _HERE:
        yield from _list(node.get(name))


def _needed(node: dict[str, Any], root: Any) -> Iterator[Any]:
    """Yield the schemas to which a value of `node` must have a value, too."""
    if isinstance(node.get("$ref"), str):
        yield _resolve(root, node["$ref"])
    yield from _list(node.get("allOf"))
    for name in ("anyOf", "oneOf"):
        if len(alternatives := _list(node.get(name))) == 1:
            yield alternatives[0]
    properties, least = node.get("properties"), node.get("minItems")
    if node.get("type") == "object" and isinstance(properties, dict):
        yield from (properties.get(name) for name in _list(node.get("required")) if isinstance(name, str))
    if node.get("type") == "array" and isinstance(least, int) and least > 0:
        yield (_list(node.get("prefixItems")) or [node.get("items")])[0]


def _references(root: Any) -> Iterator[str]:
    pending = [root]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                yield node["$ref"]
            pending.extend(node.values())
        elif isinstance(node, list):
            pending.extend(node)


def _resolve(root: Any, reference: str) -> Any:
    """Return what a local reference names, `#` or `#/$defs/name`; None for any other, about which vLLM decides."""
    pointer = reference.removeprefix("#")
    if pointer == reference or (pointer and not pointer.startswith("/")):
        return None
    node = root
    for step in pointer.split("/")[1:]:
        step = unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(node, list) and step.isdecimal() and len(step) < 6 and int(step) < len(node):
            node = node[int(step)]
        elif isinstance(node, dict):
            node = node.get(step)
        else:
            return None
    return node


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
