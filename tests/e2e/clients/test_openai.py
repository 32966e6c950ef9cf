"""OpenAI's official client: chat completions. Weights are random, so only formats are asserted."""

import asyncio
from typing import Any

import pytest
from openai import AsyncOpenAI, OpenAI

from tests.e2e.clients.content import MODEL, SQUARE, report, url_part, user
from tests.e2e.serving import Served


def details(usage: Any) -> dict[str, Any]:
    """Returns `prompt_tokens_details`; older clients lack some of its fields."""
    fields: dict[str, Any] = usage.prompt_tokens_details.to_dict()
    return fields


def test_a_chat_and_its_usage(client: OpenAI) -> None:
    answer = client.chat.completions.with_raw_response.create(model=MODEL, messages=user(SQUARE, "x"), max_tokens=4)
    parsed = answer.parse()
    assert (parsed.object, parsed.model, parsed.choices[0].message.role) == ("chat.completion", MODEL, "assistant")
    assert isinstance(parsed.choices[0].message.content, str)
    assert parsed.choices[0].finish_reason in ("length", "stop")
    assert parsed.usage is not None
    assert parsed.usage.total_tokens == parsed.usage.prompt_tokens + parsed.usage.completion_tokens
    assert details(parsed.usage)["image_tokens"] == 256 < parsed.usage.prompt_tokens
    assert 0 <= details(parsed.usage)["cached_tokens"] <= parsed.usage.prompt_tokens
    assert report(answer.headers)["tokens"] == 256
    text = client.chat.completions.create(model=MODEL, messages=user("x"), max_tokens=4)
    assert text.usage is not None
    assert "image_tokens" not in str(text.usage.to_dict())


def test_an_image_by_url_has_the_answer_of_its_bytes(private_client: OpenAI, images_url: str) -> None:
    def answer(part: dict[str, Any]) -> str | None:
        create = private_client.chat.completions.create
        result = create(model=MODEL, messages=user(part, "x"), max_tokens=8, temperature=0)
        return result.choices[0].message.content

    assert answer(url_part(f"{images_url}/square.png")) == answer(SQUARE)


def test_the_asynchronous_client(served: Served, client: OpenAI) -> None:
    async def answer() -> str | None:
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as asynchronous:
            create = asynchronous.chat.completions.create
            result = await create(model=MODEL, messages=user(SQUARE, "x"), max_tokens=4, temperature=0)
            return result.choices[0].message.content

    expected = client.chat.completions.create(model=MODEL, messages=user(SQUARE, "x"), max_tokens=4, temperature=0)
    assert asyncio.run(answer()) == expected.choices[0].message.content


# Streams


def test_a_stream(client: OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=MODEL, messages=user(SQUARE, "x"), max_tokens=4, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason in ("length", "stop")
    assert all(chunk.object == "chat.completion.chunk" and chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize("continuous", [False, True])
def test_a_stream_with_usage(client: OpenAI, continuous: bool) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": continuous}
    stream = client.chat.completions.create(
        model=MODEL, messages=user(SQUARE, "x"), max_tokens=4, stream=True, stream_options=options
    )
    chunks = list(stream)
    assert chunks[-1].choices == []
    for chunk in chunks if continuous else chunks[-1:]:
        assert details(chunk.usage)["image_tokens"] == 256
    last = chunks[-1].usage
    assert last is not None
    assert last.completion_tokens > 0
    assert details(last)["cached_tokens"] <= last.prompt_tokens


def test_the_pieces_of_a_stream_are_the_answer_of_a_chat(client: OpenAI) -> None:
    request: Any = {"model": MODEL, "messages": user(SQUARE, "x"), "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**request).choices[0].message.content
    stream = client.chat.completions.create(**request, stream=True)
    pieces = [choice.delta.content or "" for chunk in stream for choice in chunk.choices]
    assert "".join(pieces) == whole


# Choices, structured output and tools


def test_choices_and_log_probabilities(client: OpenAI) -> None:
    result = client.chat.completions.create(
        model=MODEL, messages=user(SQUARE, "x"), max_tokens=4, n=3, temperature=1, seed=7, logprobs=True, top_logprobs=2
    )
    assert [choice.index for choice in result.choices] == [0, 1, 2]
    for choice in result.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content
        for token in choice.logprobs.content:
            assert token.logprob <= 0
            assert len(token.top_logprobs) == 2
    again = client.chat.completions.create(model=MODEL, messages=user(SQUARE, "x"), max_tokens=4, n=3, temperature=1, seed=7)
    assert [c.message.content for c in again.choices] == [c.message.content for c in result.choices]


def test_models_and_texts(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    result = client.completions.create(model=MODEL, prompt="a", max_tokens=2)
    assert result.object == "text_completion"


SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}


def test_structured_output(client: OpenAI) -> None:
    response_format: Any = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}
    result = client.chat.completions.create(
        model=MODEL, messages=user(SQUARE, "x"), max_tokens=200, response_format=response_format
    )
    choice = result.choices[0]
    assert choice.message.content in ('{"a":true}', '{"a":false}'), "without white space, even from random weights"


def test_a_tool_that_must_be_called(client: OpenAI) -> None:
    tools: Any = [{"type": "function", "function": {"name": "look", "parameters": SCHEMA}}]
    choice: Any = {"type": "function", "function": {"name": "look"}}
    result = client.chat.completions.create(
        model=MODEL, messages=user(SQUARE, "x"), max_tokens=200, tools=tools, tool_choice=choice
    )
    assert result.choices[0].message.tool_calls
    call: Any = result.choices[0].message.tool_calls[0]
    assert (call.type, call.function.name) == ("function", "look")
    messages: Any = [
        *user(SQUARE, "x"),
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "a circle"},
    ]
    assert client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2, tools=tools, tool_choice="none").choices
