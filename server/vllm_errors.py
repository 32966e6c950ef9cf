"""Texts of vLLM's errors as callers get them: short, about their request, without the words of the libraries that vLLM uses.

tests/e2e/test_hostile_fields.py compares them with what the pinned vLLM answers.
"""

import re

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
    r"|keyword argument",
    re.IGNORECASE,
)
"""Words of libraries, and of Python."""
_CONSTRAINT = re.compile(r"grammar|regex|schema|structural|structured|choice", re.IGNORECASE)


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
    return (text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"), param


def _location(path: str) -> str:
    """Return a path as callers write it: without vLLM's classes, and with indices in brackets."""
    steps = [step for step in path[:MAX_TEXT].split(".") if re.fullmatch(r"[a-z_][\w\[\]-]*|\d+", step)]
    steps = steps[1:] if steps[:1] == ["body"] and len(steps) > 1 else steps
    return "".join(f"[{step}]" if step.isdecimal() else f".{step}" for step in steps).removeprefix(".") or "body"
