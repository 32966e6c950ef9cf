"""Which fields constrain the form of a response."""

from typing import Any

import pytest

from server.apis.constraints import constraint_field

TOOLS = [{"type": "function", "function": {"name": "a"}}]
FIELDS: dict[str, tuple[dict[str, Any], str | None]] = {
    "nothing": ({}, None),
    "schema": ({"response_format": {"type": "json_schema"}}, "response_format"),
    "object": ({"response_format": {"type": "json_object"}}, "response_format"),
    "text": ({"response_format": {"type": "text"}}, None),
    "null": ({"response_format": None, "structured_outputs": None, "text": None}, None),
    "of another type": ({"response_format": 5}, "response_format"),
    "expression": ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
    "no object": ({"structured_outputs": 7}, "structured_outputs"),
    "responses": ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
    "responses, text": ({"text": {"format": {"type": "text"}}}, None),
    "responses, verbosity": ({"text": {"verbosity": "low"}}, None),
    "messages": ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format"),
    "tools": ({"tools": TOOLS}, None),
    "tool by choice": ({"tools": TOOLS, "tool_choice": "auto"}, None),
    "tool required": ({"tools": TOOLS, "tool_choice": "required"}, "tools"),
    "tool named": ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "a"}}, "tools"),
    "any tool": ({"tools": TOOLS, "tool_choice": {"type": "any"}}, "tools"),
    "Anthropic's auto": ({"tools": TOOLS, "tool_choice": {"type": "auto"}}, None),
}


@pytest.mark.parametrize(("body", "field"), FIELDS.values(), ids=FIELDS)
def test_the_field_that_constrains_a_response_is_named(body: dict[str, Any], field: str | None) -> None:
    assert constraint_field(body) == field
