"""Budgets: how much work one request may ask for. What exceeds one is rejected before vLLM, or an image, is touched.

Bounds that depend on the model's context are in `server/context_length.py`, those of schemas, expressions and grammars in
`constraint_budgets.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common import errors
from server.http import json_body

_MAX_WIDTH = 1 << 62
"""Larger numbers of sequences count as this one."""


@dataclass(frozen=True)
class Budget:
    """A bound on a list, an object or a text of a request.

    Attributes:
        name: Name of the budget, for metrics.
        fields: Fields of a request's body that it bounds, each by itself.
        limit: Maximum number of items; of characters for a text.
        unit: What is counted, in the plural.
        text_limit: Maximum number of characters of each item that is a text; 0 for no bound of its own.
    """

    name: str
    fields: tuple[str, ...]
    limit: int
    unit: str
    text_limit: int = 0


BUDGETS = (
    Budget("messages", ("messages", "input"), 16_384, "items"),
    Budget("tools", ("tools",), 256, "tools"),
    Budget("stop", ("stop", "stop_sequences"), 16, "strings", text_limit=1024),
    Budget("stop", ("stop_token_ids",), 1024, "token ids"),
    Budget("bad_words", ("bad_words",), 128, "strings", text_limit=1024),
    Budget("logit_bias", ("logit_bias",), 1024, "entries"),
    Budget("token_ids", ("allowed_token_ids", "logprob_token_ids"), 16_384, "token ids"),
    Budget("documents", ("documents",), 1024, "documents"),
)
"""Budgets that every API shares. tests/docs/budgets.py makes a table of them."""


def check_budgets(body: Mapping[str, Any]) -> None:
    """Check the fields of a body. Raises `BudgetExceeded` with the field, its size and the bound."""
    for budget in BUDGETS:
        for field in budget.fields:
            if field in body:
                _check_field(budget, field, body[field])


def _check_field(budget: Budget, field: str, value: Any) -> None:
    if isinstance(value, list | dict) and len(value) > budget.limit:
        raise over_budget(budget.name, field, len(value), budget.limit, budget.unit)
    if not budget.text_limit:
        return
    texts = value if isinstance(value, list) else [value]
    for i, text in enumerate(texts):
        if isinstance(text, str) and len(text) > budget.text_limit:
            location = f"{field}[{i}]" if texts is value else field
            raise over_budget(budget.name, location, len(text), budget.text_limit, "characters")


def over_budget(budget: str, field: str, size: int, limit: int, unit: str, hint: str = "") -> errors.BudgetExceeded:
    """Return the error for a field that exceeds a budget.

    Args:
        budget: Name of the budget.
        field: The field.
        size: Its size.
        limit: The bound.
        unit: What is counted, in the plural.
        hint: What to do, as the end of a sentence; by default to send less.
    """
    text = f"{field} has {size} {unit}; the maximum is {limit}: {hint or f'send fewer {unit}'}."
    return errors.BudgetExceeded.of(budget, text, field)


def count_sequences(body: Mapping[str, Any], limit: int) -> int:
    """Return the number of sequences that a request generates: `n`, or the width of its beam search, for each prompt.

    Raises:
        BudgetExceeded: There are more than `limit`.
        InvalidRequest: `n` or `best_of` is no whole number of at least 1.
    """
    name, width = max(((name, _width(name, body.get(name))) for name in ("n", "best_of")), key=lambda item: item[1])
    prompts = _count_prompts(body.get("prompt"))
    sequences = width * prompts
    if sequences > limit:
        field = "prompt" if prompts > width else name
        raise errors.BudgetExceeded.of(
            "sequences",
            f"{field} asks for {'at least ' if width == _MAX_WIDTH else ''}{sequences} sequences "
            f"(n {width} × {prompts} prompts); the maximum is {limit} "
            "(--max-sequences): send several requests.",
            field,
        )
    return sequences


def _width(field: str, value: Any) -> int:
    """Return the number in a field, 1 if it has none. Raises `InvalidRequest`, for texts with digits too: vLLM reads those."""
    if value is None:
        return 1
    if isinstance(value, int | float) and value == value // 1 and value >= 1:
        return min(int(value), _MAX_WIDTH)
    raise errors.InvalidRequest(f"{field} is {json_body.quote(value)}: expected a whole number of at least 1.", param=field)


def _count_prompts(prompt: Any) -> int:
    """Return the number of prompts: a list has several, unless it is the token ids of one."""
    return len(prompt) if isinstance(prompt, list) and prompt and type(prompt[0]) is not int else 1
