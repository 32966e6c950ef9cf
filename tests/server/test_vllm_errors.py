"""Texts of vLLM's errors, as vLLM writes them, for callers."""

from typing import Any

import pytest

from server.vllm_errors import MAX_TEXT, describe, in_words_of

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
    ("a.<locals>.b() got multiple values for argument 'x'", None): ("vLLM does not accept a value of the request.", None),
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


LENGTHS = ("max_completion_tokens", "max_tokens")
WORDS: dict[str, tuple[dict[str, Any], tuple[str, str | None], tuple[str, str | None]]] = {
    "the value": (
        {"top_k": "x"}, ("top_k: Input should be a valid integer, unable to parse string as an integer", "top_k"),
        ('top_k is "x": expected an integer.', "top_k"),
    ),
    "a fraction": (
        {"seed": 1.5}, ("seed: Input should be a valid integer, got a number with a fractional part", "seed"),
        ("seed is 1.5: expected an integer.", "seed"),
    ),
    "names": (
        {"service_tier": "x"}, ("service_tier: Input should be 'auto' or 'flex' (2 problems in all)", "service_tier"),
        (
            'service_tier is "x": expected "auto" or "flex", or what another accepted form has (2 problems in all).',
            "service_tier",
        ),
    ),
    "inside": (
        {"logit_bias": {"5": []}}, ("logit_bias[5]: Input should be a valid number", "logit_bias[5]"),
        ("logit_bias[5] is a list: expected a number.", "logit_bias[5]"),
    ),
    "in a list": (
        {"stop_token_ids": [1, None]}, ("stop_token_ids[1]: Input should be a valid integer", "stop_token_ids[1]"),
        ("stop_token_ids[1] is null: expected an integer.", "stop_token_ids[1]"),
    ),
    "a bound": (
        {"priority": -2}, ("priority: Input should be greater than or equal to -1", "priority"),
        ("priority is -2: expected a number greater than or equal to -1.", "priority"),
    ),
    "one of several types": (
        {"input": [5]}, ("input: Input should be a valid string (62 problems in all)", "input"),
        ("input is a list, but in none of the forms that are accepted (62 problems in all).", "input"),
    ),
    "nowhere": (
        {"tools": [5]}, ("tools[1].name: Input should be a valid dictionary", "tools[1].name"),
        ("tools[1].name: expected an object.", "tools[1].name"),
    ),
    "missing": (
        {"tools": [{}]}, ("tools[0].function: Field required", "tools[0].function"),
        ("tools[0].function is missing.", "tools[0].function"),
    ),
    "the field that it begins with": (
        {"min_p": 2}, ("min_p must be in [0, 1], got 2.0.", None), ("min_p must be in [0, 1], got 2.0.", "min_p"),
    ),
    "a word that is no field": ({"min_p": 2}, ("You must pass a prompt", None), ("You must pass a prompt", None)),
    "the length, by its own name": (
        {"max_completion_tokens": 0}, ("max_tokens must be at least 1, got 0.", "max_tokens"),
        ("max_completion_tokens must be at least 1, got 0.", "max_completion_tokens"),
    ),
    "the length, where another field does not count": (
        {"max_tokens": 5, "max_completion_tokens": 0}, ("max_tokens must be at least 1, got 0.", "max_tokens"),
        ("max_completion_tokens must be at least 1, got 0.", "max_completion_tokens"),
    ),
    "the length, in another field's error": (
        {"max_tokens": None, "max_completion_tokens": 1, "min_tokens": 5},
        ("min_tokens must be less than or equal to max_tokens=1, got 5.", None),
        ("min_tokens must be less than or equal to max_completion_tokens=1, got 5.", "min_tokens"),
    ),
    "inside the only calls of tools": (
        {"messages": [{"role": "user"}, {"role": "assistant", "tool_calls": [{}]}]},
        ("[0].id: Field required (3 problems in all)", "[0].id"),
        ("messages[1].tool_calls[0].id is missing (3 problems in all).", "messages[1].tool_calls[0].id"),
    ),
    "inside one of several calls of tools": (
        {"messages": [{"tool_calls": [{}]}, {"tool_calls": [{}]}]}, ("[0].id: Field required", "[0].id"),
        ("[0].id is missing.", "[0].id"),
    ),
    "the number of log probabilities": (
        {"logprobs": True, "top_logprobs": 99}, ("Requested sample logprobs of 99", "logprobs"),
        ("Requested sample logprobs of 99", "top_logprobs"),
    ),
    "the choice of a tool": (
        {"tools": [{}], "response_format": {}}, ('"auto" tool choice requires a parser', None),
        ('"auto" tool choice requires a parser', "tools"),
    ),
    "tools, in the words of responses": (
        {"tools": []}, ("Tool choice 'required' must be specified with 'tools' parameter.", None),
        ("Tool choice 'required' must be specified with 'tools' parameter.", "tools"),
    ),
    "no messages": (
        {"input": []}, ("An empty conversation. Provide at least one message.", None),
        ("An empty conversation. Provide at least one message.", "input"),
    ),
    "a token id": ({"prompt": [9]}, ("Token id 9 is out of vocabulary", None), ("Token id 9 is out of vocabulary", "prompt")),
    "the length, by vLLM's name": (
        {"max_tokens": 0}, ("max_tokens must be at least 1, got 0.", "max_tokens"),
        ("max_tokens must be at least 1, got 0.", "max_tokens"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("body", "error", "expected"), WORDS.values(), ids=WORDS)
def test_an_error_has_the_names_and_values_of_its_request(
    body: dict[str, Any], error: tuple[str, str | None], expected: tuple[str, str | None]
) -> None:
    assert in_words_of(body, *error, LENGTHS) == expected


def test_an_error_with_a_value_has_at_most_500_characters() -> None:
    text = f"stop: Input should be {'x' * (MAX_TEXT - 30)}"
    assert len(in_words_of({"stop": "x" * 10_000}, text, "stop", LENGTHS)[0]) == MAX_TEXT
