"""Texts of vLLM's errors, as vLLM writes them, for callers."""

import pytest

from server.vllm_errors import MAX_TEXT, describe

ONE = "1 validation error:\n  {'type': 'int', 'loc': 'body.top_k', 'msg': 'Input should be a valid integer', 'input': 'x'}"
QUOTED = (
    "2 validation errors:\n  {'type': 'literal_error', 'loc': 'body.tools.0.type', 'msg': \"Input should be 'function'\", "
    "'input': 'None', 'ctx': {'expected': \"'function'\"}}\n  {'type': 'missing', 'loc': 'body.tools', 'msg': 'b', 'input': 1}"
)
CLASSES = (
    "1 validation error:\n  {'type': 'missing', 'loc': 'body.messages.0.ChatCompletionUserMessageParam.content', "
    "'msg': 'Value error, nothing there', 'input': '<dict of 0 items>'}"
)
VALIDATOR = (
    "3 validation errors for ValidatorIterator\n0.ToolCallParam.function\n  Field required [type=missing, input_value={}, "
    "input_type=dict]\n    For further information visit https://errors.pydantic.dev/2.14/v/missing"
)
TEXTS = {
    (ONE, "body.top_k"): ("top_k: Input should be a valid integer", "top_k"),
    (QUOTED, None): ("tools[0].type: Input should be 'function' (2 problems in all)", "tools[0].type"),
    (CLASSES, "body.messages.0.ChatCompletionUserMessageParam.content"): (
        "messages[0].content: nothing there", "messages[0].content"
    ),
    (VALIDATOR, None): ("[0].function: Field required (3 problems in all)", "[0].function"),
    ("bad", None): ("bad", None),
    ("bad", "stop"): ("bad", "stop"),
    ("bad", "tools[0].name"): ("bad", "tools[0].name"),
    ("Too long. (parameter=input_tokens, value=9)", "input_tokens"): ("Too long.", "input_tokens"),
    ("Not supported (parameter=prompt)", None): ("Not supported", "prompt"),
    ("None are specified: {'json': None, 'regex': None}", None): ("None are specified.", None),
    ("The schema has features not supported by xgrammar.", None): ("vLLM does not accept a value of the request.", None),
    ("pydantic says no", "stop"): ("vLLM does not accept the value of stop.", "stop"),
    ("object of type 'bool' has no len()", None): ("vLLM does not accept a value of the request.", None),
    ("'NoneType' object is not iterable", None): ("vLLM does not accept a value of the request.", None),
    ("It failed: [12:20:14] <path>:83: Regex parsing error", None): ("It failed: Regex parsing error", None),
    ("Input should be a dictionary or an instance of StructuredOutputsParams", None): ("Input should be a dictionary", None),
}  # fmt: skip


@pytest.mark.parametrize(("raw", "expected"), TEXTS.items())
def test_a_text_is_about_the_request_only(raw: tuple[str, str | None], expected: tuple[str, str | None]) -> None:
    assert describe(*raw) == expected


@pytest.mark.parametrize(
    "text", ["x" * 20_000_000, ONE.replace("integer", "x" * 1000), "a: " + "{'" * 1000, "(parameter=" * 5000]
)
def test_a_text_has_at_most_500_characters(text: str) -> None:
    message, _ = describe(text, "body." + "x" * 10_000)
    assert len(message) <= MAX_TEXT
