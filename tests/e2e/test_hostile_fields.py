"""No value of any field of vLLM's request models is answered with an internal error, and the next request is served.

The errors are short and name no library, which is also asserted of requests at the bounds of the gateway's budgets.
"""

import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from server.apis import constraint_budgets as constraint
from tests.e2e.hostile import field_bodies
from tests.e2e.serving import Answer, Served, image_part, text_part

MODEL = "checkpoint"
MESSAGES = [{"role": "user", "content": "a"}]
_PARALLEL = 8


def schema_of(name: str) -> dict[str, Any]:
    """Returns the JSON schema of one of vLLM's request models."""
    from vllm.entrypoints.anthropic.protocol import AnthropicCountTokensRequest, AnthropicMessagesRequest
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.serve.tokenize.protocol import DetokenizeRequest, TokenizeChatRequest, TokenizeCompletionRequest

    models = (
        AnthropicCountTokensRequest, AnthropicMessagesRequest, ChatCompletionRequest, CompletionRequest, ResponsesRequest,
        DetokenizeRequest, TokenizeChatRequest, TokenizeCompletionRequest,
    )  # fmt: skip
    schema: dict[str, Any] = next(model for model in models if model.__name__ == name).model_json_schema()
    return schema


REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ChatCompletionRequest": ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 1, "max_completion_tokens": 1}),
    "CompletionRequest": ("/v1/completions", {"prompt": "a", "max_tokens": 1}),
    "ResponsesRequest": ("/v1/responses", {"input": "a", "max_output_tokens": 1}),
    "AnthropicMessagesRequest": ("/v1/messages", {"model": MODEL, "messages": MESSAGES, "max_tokens": 1}),
    "AnthropicCountTokensRequest": ("/v1/messages/count_tokens", {"model": MODEL, "messages": MESSAGES}),
    "TokenizeChatRequest": ("/tokenize", {"messages": MESSAGES}),
    "TokenizeCompletionRequest": ("/tokenize", {"prompt": "a"}),
    "DetokenizeRequest": ("/detokenize", {"tokens": [5]}),
}
UNBOUNDED = {"CompletionRequest": {"max_tokens": None}, "ResponsesRequest": {"max_output_tokens": None}}
"""Valid values that would let the model write until its context is full."""


def failures(served: Served, path: str, bodies: Iterable[tuple[str, dict[str, Any]]]) -> list[str]:
    """Sends all bodies, and returns those that are answered with an internal error, or with a text that is not for callers."""

    def post(named: tuple[str, dict[str, Any]]) -> tuple[str, Answer]:
        return named[0], served.post(path, named[1])

    with ThreadPoolExecutor(_PARALLEL) as threads:
        answers = list(threads.map(post, bodies))
    return [f"{answer.status} {name}: {answer.text[:300]}" for name, answer in answers if not is_for_callers(answer)]


_LIBRARY_WORDS = re.compile(
    r"pydantic|xgrammar|ValidatorIterator|[a-z]Params?\b|NoneType|\{'|Traceback|\.py\b|<class|input_type"
)


def is_for_callers(answer: Answer) -> bool:
    """Returns whether an answer is no internal error, and its message, if it is an error, short and without library words."""
    if answer.status < 400:
        return True
    message = answer.error["message"]
    return answer.status < 500 and len(message) <= 500 and not _LIBRARY_WORDS.search(message)


@pytest.mark.parametrize(("model", "request_base"), REQUESTS.items(), ids=REQUESTS)
def test_no_field_of_a_request_can_cause_an_internal_error(
    served: Served, model: str, request_base: tuple[str, dict[str, Any]]
) -> None:
    path, base = request_base
    bodies = [
        (name, body)
        for name, body in field_bodies(schema_of(model), base)
        if not any(field in body and body[field] is value for field, value in UNBOUNDED.get(model, {}).items())
    ]
    assert failures(served, path, bodies) == []
    assert served.post(path, base).status == 200, "the engine still serves"


@pytest.mark.parametrize("model", REQUESTS)
def test_a_field_that_is_null_counts_as_absent(served: Served, model: str) -> None:
    """Clients send null for what their caller has not set, also where vLLM's model has a default and takes no null."""
    path, base = REQUESTS[model]
    answer = served.post(path, {**dict.fromkeys(schema_of(model)["properties"]), **base})
    assert answer.status == 200, answer.text


LOOP = {"$ref": "#"}
SCHEMAS: dict[str, Any] = {
    "reference to itself": LOOP,
    "indirect": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    "in anyOf": {"anyOf": [{"type": "string"}, LOOP]},
    "in allOf": {"allOf": [LOOP]},
    "recursive": {"type": "object", "properties": {"a": LOOP}},
    "recursive, required": {"type": "object", "properties": {"a": LOOP}, "required": ["a"]},
    "missing reference": {"$ref": "#/$defs/absent"},
    "foreign reference": {"$ref": "https://example.org/schema.json"},
    "reference is a number": {"$ref": 5},
    "deep": {"type": "array", "items": {"type": "array", "items": {"type": "array", "items": {"type": "array"}}}},
    "type unknown": {"type": "hologram"},
    "type is a number": {"type": 5},
    "enum empty": {"enum": []},
    "enum large": {"enum": [f"value {i}" for i in range(3000)]},
    "pattern broken": {"type": "string", "pattern": "("},
    "pattern catastrophic": {"type": "string", "pattern": "^(a+)+$"},
    "pattern large": {"type": "string", "pattern": "^(a{1,1000}){1,1000}$"},
    "many items": {"type": "array", "minItems": 100_000, "items": {"type": "integer"}},
    "bounds crossed": {"type": "array", "minItems": 5, "maxItems": 1},
    "bounds negative": {"type": "string", "minLength": -5},
    "properties are a list": {"type": "object", "properties": []},
    "not": {"not": {}},
    "false": {"type": "object", "properties": {"a": False}},
    "list": [],
    "text": "x",
}
REGEXES = [
    "(",
    "a{1,100000}",
    "(a+)+b",
    "(a|a)*$",
    "[z-a]",
    "\\",
    "(?=a)b",
    "(((a{1,200}){1,200}){1,200})",
    "^(a{1,1000}){1,1000}$",
]
GRAMMARS = [
    "",
    "root ::=",
    'root ::= root "a"',
    "root ::= root",
    "root ::= other",
    'a ::= "x"',
    'root ::= "a" root | root',
    "(",
]


def structured_bodies() -> list[tuple[str, str, dict[str, Any]]]:
    """Returns name, path and body of requests with a hostile schema, regular expression or grammar."""
    chat, chat_body = REQUESTS["ChatCompletionRequest"]
    responses, responses_body = REQUESTS["ResponsesRequest"]
    messages, messages_body = REQUESTS["AnthropicMessagesRequest"]
    bodies: list[tuple[str, str, dict[str, Any]]] = []
    for name, schema in SCHEMAS.items():
        json_schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        tool = {"type": "function", "function": {"name": "a", "parameters": schema}}
        flat_tool = {"type": "function", "name": "a", "parameters": schema}
        flat_format = {"type": "json_schema", "name": "a", "schema": schema}
        named_tool = {"type": "function", "function": {"name": "a"}}
        anthropic = {"tools": [{"name": "a", "input_schema": schema}], "tool_choice": {"type": "any"}}
        bodies += [
            (f"response_format, {name}", chat, {**chat_body, "response_format": json_schema}),
            (f"structured_outputs, {name}", chat, {**chat_body, "structured_outputs": {"json": schema}}),
            (f"structured_outputs as text, {name}", chat, {**chat_body, "structured_outputs": {"json": json.dumps(schema)}}),
            (f"tools, {name}", chat, {**chat_body, "tools": [tool]}),
            (f"tool_choice required, {name}", chat, {**chat_body, "tools": [tool], "tool_choice": "required"}),
            (f"tool_choice named, {name}", chat, {**chat_body, "tools": [tool], "tool_choice": named_tool}),
            (f"responses text, {name}", responses, {**responses_body, "text": {"format": flat_format}}),
            (f"responses tools, {name}", responses, {**responses_body, "tools": [flat_tool]}),
            (f"responses required, {name}", responses, {**responses_body, "tools": [flat_tool], "tool_choice": "required"}),
            (f"messages tools, {name}", messages, {**messages_body, **anthropic}),
        ]
    for kind, texts in (("regex", REGEXES), ("grammar", GRAMMARS)):
        bodies += [(f"{kind} {text}", chat, {**chat_body, "structured_outputs": {kind: text}}) for text in texts]
    return bodies


def test_no_schema_expression_or_grammar_can_cause_an_internal_error(served: Served) -> None:
    failed = []
    for name, path, body in structured_bodies():
        failed += failures(served, path, [(f"{path} {name}", body)])
    assert failed == []
    assert served.chat("a", max_tokens=1).status == 200, "the engine still serves"


AT_THE_BOUNDS: dict[str, dict[str, Any]] = {
    "choices": {"choice": [f"value {i}" for i in range(constraint.MAX_CHOICES)]},
    "characters of choices": {"choice": [f"{i}" + "x" * 500 for i in range(constraint.MAX_CHOICE_CHARACTERS // 510)]},
    "one choice": {"choice": ["x" * constraint.MAX_CHOICE_CHARACTERS]},
    "repetition": {"regex": f".{{1,{constraint.MAX_REGEX_SIZE}}}"},
    "repetitions in repetitions": {"regex": r"(.{1,40}\n){1,40}"},
    "loops": {"regex": ".*" * constraint.MAX_REGEX_LOOPS},
    "ambiguous loops": {"regex": "(a|b|ab)*c" * constraint.MAX_REGEX_LOOPS},
    "classes": {"regex": "[^a]" * (constraint.MAX_REGEX_CHARACTERS // 4)},
    "grammar": {"grammar": f"root ::= [a-z]{{1,{constraint.MAX_GRAMMAR_SIZE}}}"},
    "long text in a grammar": {"grammar": 'root ::= "' + "x" * (constraint.MAX_GRAMMAR_CHARACTERS - 20) + '"'},
    "left recursion": {"grammar": 'root ::= root "a" | "b"'},
    "ambiguous recursion": {"grammar": 'root ::= "" | root root'},
    "properties": {"json": {"properties": {f"p{i}": {"type": "string"} for i in range(constraint.MAX_SCHEMA_PROPERTIES)}}},
    "enum": {"json": {"enum": [f"value {i}" for i in range(constraint.MAX_ENUM_VALUES)]}},
    "minItems": {"json": {"type": "array", "minItems": constraint.MAX_REPETITIONS, "items": {"type": "integer"}}},
}


@pytest.mark.parametrize("outputs", AT_THE_BOUNDS.values(), ids=AT_THE_BOUNDS)
def test_a_constraint_at_its_bound_does_not_stop_others(served: Served, outputs: dict[str, Any]) -> None:
    path, body = REQUESTS["ChatCompletionRequest"]
    with ThreadPoolExecutor(1) as thread:
        heavy = thread.submit(served.post, path, {**body, "structured_outputs": outputs})
        assert served.chat("a", max_tokens=1).status == 200, "another caller is served meanwhile"
        answer = heavy.result()
    assert is_for_callers(answer), answer.text
    assert served.chat("a", max_tokens=1).status == 200


IMAGE = image_part("square.png")
WITH_IMAGES: dict[str, dict[str, Any]] = {
    "truncation": {"truncate_prompt_tokens": 5},
    "truncation to the context": {"truncate_prompt_tokens": -1},
    "echo": {"echo": True},
    "echo of the image": {"echo": True, "add_generation_prompt": False},
    "echo in a stream": {"echo": True, "add_generation_prompt": False, "stream": True},
    "continued": {"continue_final_message": True, "add_generation_prompt": False},
    "log probabilities of the prompt": {"prompt_logprobs": 1},
    "beam search": {"use_beam_search": True, "n": 2},
    "tools": {"tools": [{"type": "function", "function": {"name": "a"}}], "tool_choice": "required"},
    "prompt text": {"return_prompt_text": True, "return_token_ids": True},
}


@pytest.mark.parametrize("fields", WITH_IMAGES.values(), ids=WITH_IMAGES)
def test_no_field_beside_an_image_can_cause_an_internal_error(served: Served, fields: dict[str, Any]) -> None:
    answer = served.chat(IMAGE, text_part("x"), **{"max_tokens": 1, **fields})
    assert answer.status < 500, answer.text
