"""Bounds that hold for all constraints of a request together; those of one are in tests/server/gateway/test_budgets.py."""

from typing import Any

import pytest

from common import errors
from server.apis import constraint_budgets as budgets


def tools(count: int, field: str, text: str) -> dict[str, Any]:
    return {
        "tool_choice": "required",
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {field: text}}}] * count,
    }


@pytest.mark.parametrize(
    ("field", "limit", "text"),
    [("pattern", budgets.MAX_REGEX_CHARACTERS, "|"), ("definition", budgets.MAX_GRAMMAR_CHARACTERS, "#")],
)
def test_all_expressions_and_grammars_of_a_request_together(field: str, limit: int, text: str) -> None:
    """Each may be short enough: to measure a thousand of them would hold up all other requests."""
    most = budgets.MAX_EXPRESSION_CHARACTERS // limit
    budgets.check_constraints(tools(most, field, text * limit))
    with pytest.raises(errors.BudgetExceeded, match=f"tools\\[{most}\\].function.parameters.*; the maximum is 65536") as error:
        budgets.check_constraints(tools(most + 1, field, text * limit))
    assert error.value.budget == {"pattern": "regex", "definition": "grammar"}[field]
