"""Anthropic's official client. Weights are random, so only formats are asserted."""

from typing import Any

import anthropic
import pytest
from anthropic import Anthropic
from openai import OpenAI

from tests.e2e.clients.content import BROKEN, MODEL, SQUARE, WIDE, block, blocks, user
from tests.e2e.serving import Served, text_part


def text_of(message: Any) -> str:
    """Returns the text of a message."""
    return "".join(block.text for block in message.content if block.type == "text")


def test_a_message_has_the_answer_of_a_chat(client: OpenAI, claude: Anthropic) -> None:
    chat = client.chat.completions.create(model=MODEL, messages=user(SQUARE, "x", WIDE), max_tokens=8, temperature=0)
    body: Any = {"model": MODEL, "messages": blocks(SQUARE, "x", WIDE), "max_tokens": 8, "extra_body": {"temperature": 0}}
    result = claude.messages.create(**body)
    assert (result.type, result.role) == ("message", "assistant")
    assert text_of(result) == chat.choices[0].message.content
    assert chat.usage is not None
    assert result.usage.input_tokens + (result.usage.cache_read_input_tokens or 0) == chat.usage.prompt_tokens
    counted = claude.messages.count_tokens(model=MODEL, messages=blocks(SQUARE, "x", WIDE))
    assert counted.input_tokens == chat.usage.prompt_tokens
    with claude.messages.stream(**body) as stream:
        assert "".join(stream.text_stream) == chat.choices[0].message.content
        assert text_of(stream.get_final_message()) == chat.choices[0].message.content


def test_an_image_by_url_has_the_answer_of_its_bytes(private_claude: Anthropic, images_url: str) -> None:
    by_url = {"type": "image", "source": {"type": "url", "url": f"{images_url}/square.png"}}

    def answer(image: dict[str, Any]) -> str:
        messages: Any = [{"role": "user", "content": [image, text_part("x")]}]
        return text_of(
            private_claude.messages.create(model=MODEL, messages=messages, max_tokens=8, extra_body={"temperature": 0})
        )

    assert answer(by_url) == answer(block(SQUARE))


def test_an_image_in_a_tool_result(claude: Anthropic) -> None:
    result = {"type": "tool_result", "tool_use_id": "t", "content": [block(SQUARE), text_part("it")]}
    messages: Any = [
        {"role": "user", "content": "look"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "look", "input": {}}]},
        {"role": "user", "content": [result]},
    ]
    counted = claude.messages.count_tokens(model=MODEL, messages=messages)
    assert counted.input_tokens > 256
    assert claude.messages.create(model=MODEL, messages=messages, max_tokens=2).content


def test_errors_have_anthropics_format(claude: Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        claude.messages.create(model=MODEL, messages=blocks(BROKEN), max_tokens=2)
    body: Any = caught.value.body
    assert (body["type"], body["error"]["type"], body["error"]["code"]) == ("error", "invalid_request_error", "invalid_image")
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="absent", messages=blocks("x"), max_tokens=2)


def test_a_wrong_key_is_rejected(limited: Served) -> None:
    with (
        Anthropic(base_url=limited.url, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(anthropic.AuthenticationError) as caught,
    ):
        stranger.messages.create(model=MODEL, messages=blocks("x"), max_tokens=2)
    body: Any = caught.value.body
    assert body["error"]["type"] == "authentication_error"
