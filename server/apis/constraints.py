"""Constraints on the form of a response (schemas, expressions, grammars, tools), which vLLM compiles in its engine only."""

from collections.abc import Mapping
from typing import Any

_FREE_FORMATS = ("text", None)


def constraint_field(body: Mapping[str, Any]) -> str | None:
    """Return the name of the field that constrains the form of a response; None if the model may write anything."""
    if body.get("structured_outputs") is not None:
        return "structured_outputs"
    for path in (("response_format",), ("text", "format"), ("output_config", "format")):
        value: Any = body
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None and not (isinstance(value, dict) and value.get("type") in _FREE_FORMATS):
            return ".".join(path)
    return "tools" if body.get("tools") and requires_tool(body.get("tool_choice")) else None


def requires_tool(choice: Any) -> bool:
    """Return whether a response must call a tool: `required`, or in an object a tool's name or Anthropic's `any`."""
    if isinstance(choice, dict):
        return choice.get("type") not in ("auto", "none")  # without a type, it is the name of a tool
    return choice not in (None, "auto", "none")
