"""Texts of vLLM's errors as callers get them: short, about their request, without the words of the libraries that vLLM uses.

tests/e2e/test_hostile_fields.py compares them with what the pinned vLLM answers.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from server.context_length import max_tokens_field
from server.http import json_body

MAX_TEXT = 500
"""Maximum number of characters of a message."""
_MAX_RAW_TEXT = 4096
"""Characters of vLLM's message that are looked at: it may repeat the whole request."""

_VALIDATION = re.compile(
    r"""^(\d+) validation errors?:\s*\{.*?'loc': '(?P<loc>[^']*)', 'msg': (?P<quote>['"])(?P<msg>.*?)(?P=quote), '""", re.DOTALL
)
"""vLLM's list of what is wrong with a body: the first entry's place and message."""
_MODEL_VALIDATION = re.compile(r"^(\d+) validation errors? for \w+\s+(?P<loc>\S+)\s+(?P<msg>.*?) \[type=", re.DOTALL)
"""The same for a part of a body that vLLM reads later, in the validator's own form."""
_PARAMETER = re.compile(r"\s*\(parameter=(?P<param>[\w.]+)(, value=.*)?\)\s*$", re.DOTALL)
_REPRESENTATION = re.compile(r"[:,]?\s*\{'.*", re.DOTALL)
"""A dictionary as Python prints it, to the end of the text."""
_SOURCE = re.compile(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ")
"""Time and line of a compiler's message."""
_INSTANCE = re.compile(r" or an instance of \w+| or object to extract fields from")
_INTERNAL = re.compile(
    r"pydantic|xgrammar|guidance|outlines|format.?enforcer|transformers|tokenizers?\b.*\bnot support|jinja|torch|tekken|msgspec"
    r"|\bobject (of type|is not|has no)|NoneType|<class|site-packages|Traceback|\.(py|cc|rs|cpp)\b|\wError:|(?-i:VLLM_)"
    r"|keyword argument|<locals>|multiple values for",
    re.IGNORECASE,
)
"""Words of libraries, and of Python."""
_EXPECTED = re.compile(
    r"^(?P<loc>\S+): Input should be (?P<expected>.*?)(, (unable to|got a) [^(]*?)?(?P<count> \(\d+ problems in all\))?$",
    re.DOTALL,
)
_REQUIRED = re.compile(r"^(?P<loc>\S+): Field required(?P<count> \(\d+ problems in all\))?$")
_TYPES = {"a valid integer": "an integer", "a valid dictionary": "an object", "a dictionary": "an object"}
"""What vLLM's validator calls a type, where it is not enough to leave out that a value should be valid."""
_FIRST_WORD = re.compile(r"`?([a-z]\w*)`? ")
_MAX_TOKENS = re.compile(r"\bmax_tokens\b")
_STEP = re.compile(r"[\w-]+")
_NOTHING = object()
_ABOUT = {
    re.compile("tool[ _-]choice", re.IGNORECASE): ("tools",),
    re.compile("empty conversation"): ("messages", "input"),
    re.compile("Token id|at least one prompt"): ("prompt",),
}
"""Patterns of messages that vLLM writes without a parameter, and the fields of a request that they may be about."""
_CONSTRAINT = re.compile(r"grammar|regex|schema|structural|structured|(?<!tool[ _-])choice", re.IGNORECASE)


def is_about_constraint(text: str) -> bool:
    """Return whether an error is about a schema, an expression, a grammar or choices."""
    return _CONSTRAINT.search(text) is not None


def describe(text: str, param: str | None) -> tuple[str, str | None]:
    """Return the message and the parameter of one of vLLM's errors for the caller.

    Args:
        text: vLLM's message.
        param: vLLM's parameter, which may be a path of its own classes.
    """
    text, param = text[:_MAX_RAW_TEXT], _location(param) if param else None
    if match := _VALIDATION.match(text) or _MODEL_VALIDATION.match(text):
        location = _location(match["loc"])
        message = match["msg"].removeprefix("Value error, ")
        further = f" ({match[1]} problems in all)" if match[1] != "1" else ""
        text, param = f"{location}: {message}{further}", location
    elif match := _PARAMETER.search(text):
        text, param = text[: match.start()], param or match["param"]
    text = _REPRESENTATION.sub(".", _INSTANCE.sub("", _SOURCE.sub("", text)))
    if _INTERNAL.search(text):
        text = f"vLLM does not accept {f'the value of {param}' if param else 'a value of the request'}."
    return _cut(text), param


def in_words_of(body: Mapping[str, Any], text: str, param: str | None, length_fields: Sequence[str]) -> tuple[str, str | None]:
    """Return the message and the parameter of an error with the names and values of its request.

    Args:
        body: The request.
        text: The message, as `describe` returns it.
        param: Its parameter. Without one, a field of the request with which the message begins.
        length_fields: What the request may call the maximum length of its response. vLLM has one name for all of them.
    """
    param = param or _field_of(text, body)
    length = max_tokens_field(body, length_fields) or "max_tokens"
    text, param = _MAX_TOKENS.sub(length, text), length if param == "max_tokens" else param
    if param == "logprobs" and "top_logprobs" in body:  # vLLM's name of both
        param = "top_logprobs"
    if text.startswith("[") and (place := _place_of_tool_calls(body)):
        text, param = f"{place}{text}", f"{place}{param}"
    if match := _REQUIRED.match(text):
        text = f"{match['loc']} is missing{match['count'] or ''}."
    elif match := _EXPECTED.match(text):
        text = _expectation(match["loc"], match["expected"], match["count"] or "", _value_at(body, match["loc"]))
    return _cut(text), param


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"


def _field_of(text: str, body: Mapping[str, Any]) -> str | None:
    """Return the field of a request that a message without a parameter is about, None if the message does not show it."""
    if (word := _FIRST_WORD.match(text)) and word[1] in body:
        return word[1]
    candidates = next((names for pattern, names in _ABOUT.items() if pattern.search(text)), ())
    return next((name for name in candidates if name in body), None)


def _place_of_tool_calls(body: Mapping[str, Any]) -> str | None:
    """Return where the calls of tools are. vLLM reads them later than the rest, and names places in them only."""
    messages = body.get("messages")
    places = [
        f"messages[{i}].tool_calls"
        for i, message in enumerate(messages if isinstance(messages, list) else ())
        if isinstance(message, dict) and message.get("tool_calls")
    ]
    return places[0] if len(places) == 1 else None


def _expectation(location: str, expected: str, count: str, value: Any) -> str:
    """Return what the validator expected where, with the value that it got."""
    shown = location if value is _NOTHING else f"{location} is {json_body.quote(value)}"
    if count and isinstance(value, dict | list):  # it names one of several types, which may be the value's own
        return f"{shown}, but in none of the forms that are accepted{count}."
    expected = _TYPES.get(expected, expected.replace("a valid ", "a ").replace("'", '"'))
    number = "a number " if expected.startswith(("greater", "less")) else ""
    others = ", or what another accepted form has" if count else ""
    return f"{shown}: expected {number}{expected}{others}{count}."


def _value_at(body: Any, location: str) -> Any:
    """Return the value at a location of a body, `_NOTHING` if there is none."""
    value = body
    for step in _STEP.findall(location):
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return _NOTHING
    return value


def _location(path: str) -> str:
    """Return a path as callers write it: without vLLM's classes, and with indices in brackets."""
    steps = [step for step in path[:MAX_TEXT].split(".") if re.fullmatch(r"[a-z_][\w\[\]-]*|\d+", step)]
    steps = steps[1:] if steps[:1] == ["body"] and len(steps) > 1 else steps
    return "".join(f"[{step}]" if step.isdecimal() else f".{step}" for step in steps).removeprefix(".") or "body"
