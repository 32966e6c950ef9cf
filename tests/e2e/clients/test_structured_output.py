"""OpenAI's and Anthropic's official clients: structured output and tool calls, parsed by the client.

They need a server that writes JSON without white space, and so run with `make test-clients`.
"""

from typing import Any

import openai
import pytest
from anthropic import Anthropic
from openai import OpenAI

from tests.e2e.clients.content import MODEL, SQUARE, Shape, blocks, response_input, user

pytestmark = pytest.mark.usefixtures("compact_tool_calls")


def test_a_structured_answer_is_parsed(client: OpenAI) -> None:
    result = client.chat.completions.parse(
        model=MODEL, messages=user(SQUARE, "x"), max_tokens=200, temperature=0, response_format=Shape
    )
    assert isinstance(result.choices[0].message.parsed, Shape)


def test_a_tool_call_is_parsed_and_its_result_is_accepted(client: OpenAI) -> None:
    tools: Any = [openai.pydantic_function_tool(Shape, name="draw")]
    choice: Any = {"type": "function", "function": {"name": "draw"}}
    request: Any = {"model": MODEL, "tools": tools, "temperature": 0}
    result = client.chat.completions.parse(messages=user(SQUARE, "x"), max_tokens=200, tool_choice=choice, **request)
    assert result.choices[0].message.tool_calls
    call = result.choices[0].message.tool_calls[0]
    assert (call.type, call.function.name) == ("function", "draw")
    assert isinstance(call.function.parsed_arguments, Shape)
    messages: Any = [
        *user(SQUARE, "x"),
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump(exclude={"function": {"parsed_arguments"}})]},
        {"role": "tool", "tool_call_id": call.id, "content": "a circle"},
    ]
    assert client.chat.completions.create(messages=messages, max_tokens=2, tool_choice="none", **request).choices


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "draw"}}])
def test_a_streamed_tool_call(client: OpenAI, choice: Any) -> None:
    tools: Any = [openai.pydantic_function_tool(Shape, name="draw")]
    chunks = client.chat.completions.create(
        model=MODEL,
        messages=user(SQUARE, "x"),
        max_tokens=200,
        temperature=0,
        tools=tools,
        tool_choice=choice,
        stream=True,
        parallel_tool_calls=False,
    )
    calls = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or ()]
    assert {call.index for call in calls} == {0}
    assert [call.function.name for call in calls if call.function and call.function.name] == ["draw"]
    Shape.model_validate_json("".join(call.function.arguments or "" for call in calls if call.function))


def test_a_structured_response_is_parsed(client: OpenAI) -> None:
    result = client.responses.parse(
        model=MODEL, input=response_input(SQUARE, "x"), max_output_tokens=200, temperature=0, text_format=Shape
    )
    assert isinstance(result.output_parsed, Shape)


def test_a_responses_tool_call_is_parsed(client: OpenAI) -> None:
    schema = openai.pydantic_function_tool(Shape)["function"]["parameters"]
    tools: Any = [{"type": "function", "name": "draw", "parameters": schema, "strict": True}]
    result = client.responses.create(
        model=MODEL,
        input=response_input(SQUARE, "x"),
        max_output_tokens=200,
        temperature=0,
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=False,
    )
    (call,) = (item for item in result.output if item.type == "function_call")
    assert call.name == "draw"
    Shape.model_validate_json(call.arguments)


@pytest.mark.parametrize("choice", [{"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "draw"}])
def test_a_messages_tool_call_is_parsed(claude: Anthropic, choice: Any) -> None:
    tools: Any = [{"name": "draw", "input_schema": {**Shape.model_json_schema(), "additionalProperties": False}}]
    body: Any = {
        "model": MODEL, "messages": blocks(SQUARE, "x"), "max_tokens": 200, "tools": tools, "tool_choice": choice,
        "extra_body": {"temperature": 0},
    }  # fmt: skip
    with claude.messages.stream(**body) as stream:
        streamed = stream.get_final_message()
    for message in (claude.messages.create(**body), streamed):
        assert message.stop_reason == "tool_use"
        calls: list[Any] = [block for block in message.content if block.type == "tool_use"]
        (call,) = calls
        assert call.name == "draw"
        Shape.model_validate(call.input)
