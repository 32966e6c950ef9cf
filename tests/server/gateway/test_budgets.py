"""Budgets of a request, each at its edge: what is at the bound is served, one more is rejected with the field and the bound."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from common import errors
from server.apis import constraint_budgets as constraint
from server.apis.budgets import BUDGETS, count_sequences
from server.context_length import CHARACTERS_PER_TOKEN, MAX_LONG_PROMPTS
from tests.server.fakes.handlers import hang
from tests.server.fakes.requests import chat, image_part
from tests.server.fakes.stack import Stack, start_stack
from tests.server.fakes.vllm import MODEL
from tests.server.fakes.waiting import wait_until
from tests.server.gateway.helpers import A, assert_serves_images

CONTEXT = 32_768
CHARACTERS = CONTEXT * CHARACTERS_PER_TOKEN
SEQUENCES = 12
JSON_VALUES = 100_000

CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"


@pytest.fixture(scope="module")
async def bounded(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """A gateway whose model has a known context."""
    limits: dict[str, Any] = {"max_sequences": SEQUENCES, "max_json_values": JSON_VALUES}
    async with start_bounded(tmp_path_factory.mktemp("budgets"), **limits) as running:
        yield running


@contextlib.asynccontextmanager
async def start_bounded(folder: Path, **options: Any) -> AsyncIterator[Stack]:
    """Starts a gateway that knows its model's context."""
    async with start_stack(folder, **options) as running:
        running.engine.models["data"][0]["max_model_len"] = CONTEXT

        async def is_known() -> bool:
            return (await running.chat("a", max_tokens=CONTEXT + 1)).status == 400

        await wait_until(is_known, "the gateway knows the model's context")
        yield running


def with_field(name: str, value: Any) -> tuple[str, dict[str, Any]]:
    """Return the path and the body of a request with this field."""
    if name == "input":
        return RESPONSES, {"model": MODEL, "input": value}
    if name == "stop_sequences":
        return MESSAGES, {**chat("a"), "max_tokens": 4, name: value}
    return CHAT, {**chat("a"), name: value}


def items(field: str, count: int) -> Any:
    """Return a value of a field with this number of items."""
    if field == "logit_bias":
        return {str(i): 0 for i in range(count)}
    item = {"messages": {"role": "user", "content": "a"}, "input": {"role": "user", "content": "a"}}.get(field)
    texts = "x" if field in ("stop", "stop_sequences", "bad_words") else {}
    return [item or (1 if field.endswith("_ids") else texts)] * count


async def assert_edge(stack: Stack, path: str, good: Any, bad: Any, param: str, *numbers: int) -> None:
    """Assert that one body is served, and another one rejected without reaching the engine."""
    response = await stack.post(good, path=path)
    assert response.status == 200, response.body[:1000]
    before = len(stack.engine.requests)
    response = await stack.post(bad, path=path)
    error = response.json["error"]
    assert (response.status, error["param"]) == (400, param), response.body
    assert error["code"] in ("budget_exceeded", "context_length_exceeded")
    assert all(str(number) in error["message"] for number in (param, *numbers)), error
    assert len(response.body) < 1000
    assert len(stack.engine.requests) == before
    assert (await stack.chat("next")).status == 200


COUNTED = [(budget.limit, field) for budget in BUDGETS for field in budget.fields]
TEXTS = [
    (budget.text_limit, field)
    for budget in BUDGETS
    if budget.text_limit
    for field in budget.fields
    if field != "stop_token_ids"
]


@pytest.mark.parametrize(("limit", "field"), COUNTED)
async def test_the_number_of_items(bounded: Stack, limit: int, field: str) -> None:
    path, good = with_field(field, items(field, limit))
    _, bad = with_field(field, items(field, limit + 1))
    await assert_edge(bounded, path, good, bad, field, limit, limit + 1)


@pytest.mark.parametrize(("limit", "field"), TEXTS)
async def test_the_length_of_items(bounded: Stack, limit: int, field: str) -> None:
    path, good = with_field(field, ["x" * limit])
    _, bad = with_field(field, ["y", "x" * (limit + 1)])
    await assert_edge(bounded, path, good, bad, f"{field}[1]", limit, limit + 1)


def structured(**constraint: Any) -> dict[str, Any]:
    return {**chat("a"), "structured_outputs": constraint}


def chain(length: int) -> str:
    """Return a grammar of this many rules."""
    return "\n".join([*(f"r{i} ::= r{i + 1}" for i in range(length - 1)), f'r{length - 1} ::= "a"'])


def nested(levels: int) -> Any:
    """Return a schema that is nested in this many levels, one of them a value."""
    schema: Any = "string"
    for _ in range(levels - 1):
        schema = {"items": schema}
    return schema


def padded(size: int) -> dict[str, Any]:
    """Return a schema of this many bytes."""
    return {"description": "x" * (size - len('{"description":""}'))}


LIMITS: dict[str, tuple[str, Any, Any, int]] = {
    "choices": ("choice", ["a"] * constraint.MAX_CHOICES, ["a"] * (constraint.MAX_CHOICES + 1), constraint.MAX_CHOICES),
    "characters of choices": (
        "choice",
        ["a", "b" * (constraint.MAX_CHOICE_CHARACTERS - 1)],
        ["a", "b" * constraint.MAX_CHOICE_CHARACTERS],
        constraint.MAX_CHOICE_CHARACTERS,
    ),
    "characters of a regex": (
        "regex",
        "|" * constraint.MAX_REGEX_CHARACTERS,
        "|" * (constraint.MAX_REGEX_CHARACTERS + 1),
        constraint.MAX_REGEX_CHARACTERS,
    ),
    "size of a regex": (
        "regex",
        f"a{{1,{constraint.MAX_REGEX_SIZE}}}",
        f"(a{{1,{constraint.MAX_REGEX_SIZE}}}b)",
        constraint.MAX_REGEX_SIZE,
    ),
    "repetitions in repetitions": ("regex", "((a{16}){16}){8}", "((a{16}){16}){9}", constraint.MAX_REGEX_SIZE),
    "loops of a regex": (
        "regex",
        "a*" * constraint.MAX_REGEX_LOOPS,
        f"(a+){{{constraint.MAX_REGEX_LOOPS + 1}}}",
        constraint.MAX_REGEX_LOOPS,
    ),
    "groups of a regex": ("regex", "(" * 64 + "a" + ")" * 64, "(" * 65 + "a" + ")" * 65, constraint.MAX_EXPRESSION_DEPTH),
    "characters of a grammar": (
        "grammar",
        'root ::= "a"'.ljust(constraint.MAX_GRAMMAR_CHARACTERS),
        'root ::= "a"'.ljust(constraint.MAX_GRAMMAR_CHARACTERS + 1),
        constraint.MAX_GRAMMAR_CHARACTERS,
    ),
    "size of a grammar": (
        "grammar",
        f'root ::= "a"{{{constraint.MAX_GRAMMAR_SIZE}}}',
        f'root ::= "a"{{{constraint.MAX_GRAMMAR_SIZE + 1}}}',
        constraint.MAX_GRAMMAR_SIZE,
    ),
    "loops of a grammar": (
        "grammar",
        f'root ::= ("a"*){{{constraint.MAX_GRAMMAR_LOOPS}}}',
        f'root ::= ("a"*){{{constraint.MAX_GRAMMAR_LOOPS + 1}}}',
        constraint.MAX_GRAMMAR_LOOPS,
    ),
    "rules of a grammar": (
        "grammar",
        chain(constraint.MAX_GRAMMAR_RULES),
        chain(constraint.MAX_GRAMMAR_RULES + 1),
        constraint.MAX_GRAMMAR_RULES,
    ),
    "groups of a grammar": (
        "grammar",
        "root ::= " + "(" * 64 + '"a"' + ")" * 64,
        "root ::= " + "(" * 65 + '"a"' + ")" * 65,
        constraint.MAX_EXPRESSION_DEPTH,
    ),
    "bytes of a schema": (
        "json",
        padded(constraint.MAX_SCHEMA_BYTES),
        padded(constraint.MAX_SCHEMA_BYTES + 1),
        constraint.MAX_SCHEMA_BYTES,
    ),
    "values of a schema": (
        "json",
        {"x": [0] * (constraint.MAX_SCHEMA_NODES - 2)},
        {"x": [0] * (constraint.MAX_SCHEMA_NODES - 1)},
        constraint.MAX_SCHEMA_NODES,
    ),
    "levels of a schema": (
        "json",
        nested(constraint.MAX_SCHEMA_DEPTH),
        nested(constraint.MAX_SCHEMA_DEPTH + 1),
        constraint.MAX_SCHEMA_DEPTH,
    ),
    "values of enums": (
        "json",
        {"enum": ["a"] * constraint.MAX_ENUM_VALUES},
        {"anyOf": [{"enum": ["a"] * constraint.MAX_ENUM_VALUES}, {"enum": ["b"]}]},
        constraint.MAX_ENUM_VALUES,
    ),
    "minItems": (
        "json",
        {"minItems": constraint.MAX_REPETITIONS},
        {"minItems": constraint.MAX_REPETITIONS + 1},
        constraint.MAX_REPETITIONS,
    ),
    "maxLength": (
        "json",
        {"maxLength": constraint.MAX_REPETITIONS},
        {"items": {"maxLength": 1e308}},
        constraint.MAX_REPETITIONS,
    ),
}


@pytest.mark.parametrize(("kind", "good", "bad", "limit"), LIMITS.values(), ids=LIMITS)
async def test_what_constrains_a_response(bounded: Stack, kind: str, good: Any, bad: Any, limit: int) -> None:
    field = f"structured_outputs.{kind}"
    await assert_edge(bounded, CHAT, structured(**{kind: good}), structured(**{kind: bad}), field, limit)


async def test_the_number_of_properties_of_an_object(bounded: Stack) -> None:
    def body(count: int) -> dict[str, Any]:
        return structured(json={"properties": {f"p{i}": {} for i in range(count)}})

    limit = constraint.MAX_SCHEMA_PROPERTIES
    await assert_edge(bounded, CHAT, body(limit), body(limit + 1), "structured_outputs.json.properties", limit, limit + 1)


LARGE = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(a{1,100}){1,100}"}}}
PLACES: dict[str, tuple[str, dict[str, Any], str]] = {
    "response_format": (
        CHAT,
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": LARGE}}},
        "response_format.pattern",
    ),
    "structural tag": (
        CHAT,
        {"response_format": {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": LARGE}}},
        "response_format.pattern",
    ),
    "completions": (
        COMPLETIONS,
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": LARGE}}},
        "response_format.pattern",
    ),
    "schema as text": (
        CHAT,
        {"structured_outputs": {"json": '{"pattern": "(a{1,100}){1,100}"}'}},
        "structured_outputs.json.pattern",
    ),
    "guided_regex": (CHAT, {"guided_regex": "(a{1,100}){1,100}"}, "guided_regex"),
    "tool of a chat": (
        CHAT,
        {"tool_choice": "required", "tools": [{"type": "function", "function": {"name": "a", "parameters": LARGE}}]},
        "tools[0].function.parameters.pattern",
    ),
    "strict tool of a chat": (
        CHAT,
        {"tools": [{"type": "function", "function": {"name": "a", "strict": True, "parameters": LARGE}}]},
        "tools[0].function.parameters.pattern",
    ),
    "tool of a response": (
        RESPONSES,
        {
            "tool_choice": {"type": "function", "name": "a"},
            "tools": [{"type": "function", "name": "a", "parameters": LARGE}],
        },
        "tools[0].parameters.pattern",
    ),
    "tool of a namespace": (
        RESPONSES,
        {
            "tool_choice": "required",
            "tools": [{"type": "namespace", "name": "a", "tools": [{"type": "function", "name": "b", "parameters": LARGE}]}],
        },
        "tools[0].tools[0].parameters.pattern",
    ),
    "tool with a grammar": (
        RESPONSES,
        {
            "tools": [
                {
                    "type": "custom",
                    "name": "a",
                    "format": {"type": "grammar", "syntax": "regex", "definition": 'root ::= (("a"{100}){100}){100}'},
                }
            ]
        },
        "tools[0].format.definition",
    ),
    "format of a response": (
        RESPONSES,
        {"text": {"format": {"type": "json_schema", "name": "a", "schema": LARGE}}},
        "text.format.pattern",
    ),
    "tool of a message": (
        MESSAGES,
        {"tool_choice": {"type": "any"}, "tools": [{"name": "a", "input_schema": LARGE}]},
        "tools[0].input_schema.pattern",
    ),
    "format of a message": (
        MESSAGES,
        {"output_config": {"format": {"type": "json_schema", "schema": LARGE}}},
        "output_config.format.pattern",
    ),
}


@pytest.mark.parametrize(("path", "fields", "param"), PLACES.values(), ids=PLACES)
async def test_constraints_are_checked_wherever_they_are(bounded: Stack, path: str, fields: dict[str, Any], param: str) -> None:
    before = len(bounded.engine.requests)
    body = {
        "model": MODEL,
        "input": "a",
        "prompt": "a",
        "messages": [{"role": "user", "content": "a"}],
        "max_tokens": 4,
        **fields,
    }
    response = await bounded.post(body, path=path)
    error = response.json["error"]
    assert (response.status, error["param"], error["code"]) == (400, param, "budget_exceeded")
    assert "10000" in error["message"]
    assert len(bounded.engine.requests) == before


REAL_SCHEMAS: dict[str, Any] = {
    "pattern": {"type": "string", "pattern": "^.{1,4096}$"},
    "maxLength": {"type": "string", "maxLength": 200_000},
    "enum": {"enum": [f"city {i}" for i in range(20_000)]},
    "properties": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1000)}},
    "itself": {"$ref": "#"},
}
"""Schemas of tools that vLLM does not compile unless the model must call them."""


@pytest.mark.parametrize("schema", REAL_SCHEMAS.values(), ids=REAL_SCHEMAS)
async def test_schemas_that_are_not_compiled_may_say_more(bounded: Stack, schema: Any) -> None:
    function = {"name": "a", "parameters": schema}
    tools = [{"type": "function", "function": function}]
    message = {**chat("a"), "max_tokens": 4, "tools": [{"name": "a", "input_schema": schema}]}
    free: tuple[dict[str, Any], ...] = ({}, {"tool_choice": None}, {"tool_choice": "auto"}, {"tool_choice": "none"})
    for choice in free:
        assert (await bounded.chat("a", tools=tools, **choice)).status == 200
    assert (await bounded.post({**message, "tool_choice": {"type": "auto"}}, path=MESSAGES)).status == 200
    before = len(bounded.engine.requests)
    forced: tuple[dict[str, Any], ...] = (
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "a"}}},
        {"tool_choice": {"function": {"name": "a"}}},
        {"tools": [{"type": "function", "function": {**function, "strict": True}}]},
        {"tools": [{"type": "function", "function": {**function, "strict": "true"}}]},
    )
    for choice in forced:
        response = await bounded.chat("a", **{"tools": tools, **choice})
        assert (response.status, response.error["code"] in ("budget_exceeded", "invalid_request")) == (400, True)
    assert (await bounded.post({**message, "tool_choice": {"type": "tool", "name": "a"}}, path=MESSAGES)).status == 400
    assert len(bounded.engine.requests) == before


async def test_an_operator_can_say_that_all_schemas_are_compiled(tmp_path_factory: pytest.TempPathFactory) -> None:
    async with start_stack(tmp_path_factory.mktemp("compiled"), compiled_tools=True) as stack:
        for schema in REAL_SCHEMAS.values():
            tools = [{"type": "function", "function": {"name": "a", "parameters": schema}}]
            assert (await stack.chat("a", tools=tools)).status == 400
        assert (await stack.chat("a", tools=[{"type": "function", "function": {"name": "a"}}])).status == 200


TOOL_LIMITS: dict[str, tuple[Any, Any, int]] = {
    "bytes": (padded(constraint.MAX_TOOL_BYTES), padded(constraint.MAX_TOOL_BYTES + 1), constraint.MAX_TOOL_BYTES),
    "levels": (nested(constraint.MAX_SCHEMA_DEPTH), nested(constraint.MAX_SCHEMA_DEPTH + 1), constraint.MAX_SCHEMA_DEPTH),
    "values": (
        {"x": [0] * (constraint.MAX_TOOL_NODES - 2)},
        {"x": [0] * (constraint.MAX_TOOL_NODES - 1)},
        constraint.MAX_TOOL_NODES,
    ),
}


@pytest.mark.parametrize(("good", "bad", "limit"), TOOL_LIMITS.values(), ids=TOOL_LIMITS)
async def test_schemas_that_are_not_compiled_are_bounded_too(
    tmp_path_factory: pytest.TempPathFactory, good: Any, bad: Any, limit: int
) -> None:
    def body(schema: Any) -> dict[str, Any]:
        return {**chat("a"), "tools": [{"type": "function", "function": {"name": "a", "parameters": schema}}]}

    async with start_stack(tmp_path_factory.mktemp("tools"), max_prompt_characters=2 * constraint.MAX_TOOL_BYTES) as stack:
        await assert_edge(stack, CHAT, body(good), body(bad), "tools[0].function.parameters", limit)


@pytest.mark.parametrize(
    "constraint",
    [{"json": {"$ref": "#"}}, {"json": '{"$ref": "#"}'}, {"grammar": "root ::= root"}, {"grammar": 'root ::= "a" x\nx ::= x'}],
)
async def test_what_refers_to_itself_is_the_callers_mistake(bounded: Stack, constraint: dict[str, Any]) -> None:
    before = len(bounded.engine.requests)
    response = await bounded.post(structured(**constraint))
    assert (response.status, response.error["code"]) == (400, "invalid_request")
    assert response.error["param"] == f"structured_outputs.{next(iter(constraint))}"
    assert "itself" in response.error["message"]
    assert len(bounded.engine.requests) == before


PROMPTS: dict[str, tuple[str, Any, str]] = {
    "tokenize": ("/tokenize", lambda text: {"model": MODEL, "prompt": text}, "prompt"),
    "chat": (CHAT, lambda text: chat(text), "messages"),
    "chat in parts": (CHAT, lambda text: chat(image_part(A), {"type": "text", "text": text}), "messages"),
    "completions": (COMPLETIONS, lambda text: {"model": MODEL, "prompt": text}, "prompt"),
    "responses": (RESPONSES, lambda text: {"model": MODEL, "input": text}, "input"),
    "instructions": (RESPONSES, lambda text: {"model": MODEL, "input": "a", "instructions": text}, "instructions"),
    "messages": (MESSAGES, lambda text: {**chat("a"), "max_tokens": 4, "system": text}, "system"),
    "count_tokens": ("/v1/messages/count_tokens", lambda text: chat(text), "messages"),
}


@pytest.mark.parametrize(("path", "make", "param"), PROMPTS.values(), ids=PROMPTS)
async def test_the_characters_of_a_prompt(bounded: Stack, path: str, make: Any, param: str) -> None:
    await assert_edge(bounded, path, make("a " * (CHARACTERS // 2 - 200)), make("é" * CHARACTERS), param, CHARACTERS)


async def test_the_characters_of_several_prompts(bounded: Stack) -> None:
    good, bad = ({"model": MODEL, "prompt": ["x" * (CHARACTERS - 100)] * count} for count in (8, 9))
    await assert_edge(bounded, COMPLETIONS, good, bad, "prompt", MAX_LONG_PROMPTS * CHARACTERS)


async def test_large_images_are_no_text(bounded: Stack) -> None:
    assert (await bounded.chat(image_part(A + bytes(2 * CHARACTERS)), "what?")).status == 200


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        (COMPLETIONS, "prompt", lambda ids: ids),
        (COMPLETIONS, "prompt", lambda ids: [[1], ids]),
        ("/detokenize", "tokens", lambda ids: ids),
    ],
    ids=["prompt", "prompts", "tokens"],
)
async def test_the_number_of_token_ids(bounded: Stack, path: str, field: str, value: Any) -> None:
    good, bad = ({"model": MODEL, field: value([1] * count)} for count in (CONTEXT, CONTEXT + 1))
    await assert_edge(bounded, path, good, bad, field, CONTEXT, CONTEXT + 1)


async def test_the_operator_can_set_the_characters_of_a_prompt(tmp_path_factory: pytest.TempPathFactory) -> None:
    async with start_stack(tmp_path_factory.mktemp("characters"), max_prompt_characters=1000) as stack:
        assert (await stack.chat("x" * 950)).status == 200
        response = await stack.chat("x" * 1001)
        assert (response.status, response.error["code"]) == (400, "budget_exceeded")
        assert "--max-prompt-characters" in response.error["message"]
        assert await stack.metric('dvd_requests_over_budget_total{budget="prompt_characters"}') == 1


SEQUENCE_EDGES = {
    "n": (CHAT, {**chat("a"), "n": SEQUENCES}, {**chat("a"), "n": SEQUENCES + 1}, "n"),
    "huge n": (CHAT, {**chat("a"), "n": 1}, {**chat("a"), "n": 2**62}, "n"),
    "beams": (CHAT, chat("a"), {**chat("a"), "best_of": 1000}, "best_of"),
    "prompts": (COMPLETIONS, {"prompt": ["a"] * SEQUENCES}, {"prompt": ["a"] * (SEQUENCES + 1)}, "prompt"),
    "lists of ids": (COMPLETIONS, {"prompt": [[1]] * SEQUENCES}, {"prompt": [[1]] * (SEQUENCES + 1)}, "prompt"),
    "both": (COMPLETIONS, {"prompt": ["a"] * 4, "n": 3}, {"prompt": ["a"] * 4, "n": 4}, "n"),
}


@pytest.mark.parametrize(("path", "good", "bad", "param"), SEQUENCE_EDGES.values(), ids=SEQUENCE_EDGES)
async def test_the_number_of_sequences(bounded: Stack, path: str, good: Any, bad: Any, param: str) -> None:
    await assert_edge(bounded, path, good, bad, param, SEQUENCES)


NO_NUMBERS: dict[str, tuple[Any, str]] = {
    "digits": ("12", '"12"'),
    "word": ("many", '"many"'),
    "quotes": ("it's", '"it\'s"'),
    "exponent": ("1e9", '"1e9"'),
    "long": ("x" * 3000, '"' + "x" * 99 + '…"'),
    "fraction": (1.5, "1.5"),
    "list": ([1], "a list"),
    "object": ({"x": None}, "an object"),
    "zero": (0, "0"),
    "negative": (-5, "-5"),
}
"""What is no number of sequences, and how the error names it: as JSON, since callers do not write Python."""


@pytest.mark.parametrize(("width", "shown"), NO_NUMBERS.values(), ids=NO_NUMBERS)
@pytest.mark.parametrize("field", ["n", "best_of"])
async def test_a_number_of_sequences_is_no_text(bounded: Stack, field: str, width: Any, shown: str) -> None:
    """vLLM reads numbers in texts, which would be counted nowhere."""
    before = len(bounded.engine.requests)
    response = await bounded.chat("a", **{field: width})
    assert (response.status, response.error["param"], response.error["code"]) == (400, field, "invalid_request")
    assert response.error["message"] == f"{field} is {shown}: expected a whole number of at least 1."
    assert len(bounded.engine.requests) == before
    for good in (None, 2, 2.0, True):
        assert (await bounded.post({**chat("a"), field: good})).status == 200


OUTPUT_TOKENS = 40_000
OUTPUT_EDGES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "chat": (CHAT, {**chat("a"), "n": 8, "max_tokens": 5000}, {**chat("a"), "n": 8, "max_tokens": 5001}, "max_tokens"),
    "first field": (
        CHAT,
        {**chat("a"), "n": 8, "max_completion_tokens": 5000, "max_tokens": 9000},
        {**chat("a"), "n": 8, "max_completion_tokens": 5001, "max_tokens": 1},
        "max_completion_tokens",
    ),
    "the rest of the context": (CHAT, chat("a"), {**chat("a"), "n": 2}, "max_completion_tokens"),
    "null": (CHAT, chat("a", max_tokens=None), {**chat("a", max_tokens=None), "n": 2}, "max_completion_tokens"),
    "a text": (CHAT, chat("a", max_tokens="9999"), {**chat("a", max_tokens="9999"), "n": 2}, "max_tokens"),
    "nothing": (CHAT, chat("a", max_tokens=0), {**chat("a", max_tokens=0), "n": 2}, "max_tokens"),
    "prompts": (
        COMPLETIONS,
        {"prompt": ["a"] * 4, "n": 2, "max_tokens": 5000},
        {"prompt": ["a"] * 5, "n": 2, "max_tokens": 5000},
        "max_tokens",
    ),
    "16 tokens": (COMPLETIONS, {"prompt": ["a"] * 12}, {"prompt": ["a"] * 12, "max_tokens": 3334}, "max_tokens"),
}


@pytest.fixture(scope="module")
async def short(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """A gateway whose requests may generate few tokens."""
    async with start_bounded(tmp_path_factory.mktemp("short"), max_output_tokens=OUTPUT_TOKENS) as running:
        yield running


@pytest.mark.parametrize(("path", "good", "bad", "param"), OUTPUT_EDGES.values(), ids=OUTPUT_EDGES)
async def test_the_number_of_tokens_of_all_sequences(short: Stack, path: str, good: Any, bad: Any, param: str) -> None:
    await assert_edge(short, path, good, bad, param, OUTPUT_TOKENS)


async def test_what_a_normal_service_does_has_few_enough_tokens(bounded: Stack) -> None:
    assert (await bounded.chat("a", n=8, max_tokens=4096)).status == 200
    assert (await bounded.chat("a", n=8)).status == 200
    assert (await bounded.post({"prompt": ["a"] * SEQUENCES, "max_tokens": CONTEXT}, path=COMPLETIONS)).status == 200


async def test_sequences_take_permits(tmp_path_factory: pytest.TempPathFactory) -> None:
    async with start_stack(tmp_path_factory.mktemp("permits"), max_in_flight=40, trusted_proxies=["127.0.0.1"]) as stack:
        stack.engine.respond = hang
        many = [
            await stack.start_chat(chat("a", n=15), f"X-Forwarded-For: 203.0.113.1\nAuthorization: Bearer {i}\n")
            for i in range(2)
        ]
        await stack.wait_for_metric("dvd_requests_in_flight", 30)
        greedy = {"X-Forwarded-For": "203.0.113.1", "Authorization": "Bearer another key"}
        assert (await stack.chat("a", n=8, headers=greedy)).status == 429, "the last ones are kept for others"
        before = len(stack.engine.requests)
        other = await stack.start_chat(chat("a", n=4), "X-Forwarded-For: 203.0.113.2\n")
        await wait_until(lambda: len(stack.engine.requests) == before + 1, "another caller's request is served")
        for _, writer in (*many, other):
            writer.close()
        await stack.wait_until_idle()


async def test_the_number_of_json_values(bounded: Stack) -> None:
    def body(count: int) -> bytes:
        return b'{"model":"internvl","messages":[{"role":"user","content":"a"}],"x":[%s]}' % b",".join([b"1"] * count)

    await assert_edge(bounded, CHAT, body(JSON_VALUES - 50), body(JSON_VALUES + 1), "body", JSON_VALUES)


@pytest.mark.parametrize("piece", [b"{},", b"[],", b'{"a":1},', b'"":0,'])
async def test_a_body_of_tiny_values_is_rejected_before_it_is_decoded(bounded: Stack, piece: bytes) -> None:
    raw = b"[" + piece * (20_000_000 // len(piece)) + b"0]"
    other = asyncio.create_task(bounded.chat("another request"))
    response = await bounded.post(b'{"messages":' + raw + b"}")
    assert (response.status, response.error["param"]) == (400, "body")
    assert (await other).status == 200
    await bounded.wait_for_metric("dvd_request_body_bytes", 0)


async def test_nothing_is_held_after_all_of_this(bounded: Stack) -> None:
    assert await bounded.metric("dvd_requests_over_budget_total") > 0
    await assert_serves_images(bounded)
    await bounded.wait_for_metric("dvd_requests_in_flight", 0)
    await bounded.wait_for_metric("dvd_request_body_bytes", 0)
    await bounded.wait_for_metric("dvd_connections", 1)


def test_a_number_of_sequences_beyond_all_counting_is_no_exact_one_in_the_message() -> None:
    with pytest.raises(errors.BudgetExceeded, match=r"best_of asks for at least 4611686018427387904 sequences"):
        count_sequences({"best_of": 1e300}, 64)
