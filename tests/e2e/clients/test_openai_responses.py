"""OpenAI's official client: the Responses API."""

from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.e2e.clients.content import BROKEN, MODEL, SQUARE, report, response_input, url_part, user


def test_a_response_has_the_answer_of_a_chat(client: OpenAI) -> None:
    chat = client.chat.completions.create(model=MODEL, messages=user(SQUARE, "x"), max_tokens=8, temperature=0)
    answer = client.responses.with_raw_response.create(
        model=MODEL, input=response_input(SQUARE, "x"), max_output_tokens=8, temperature=0
    )
    parsed = answer.parse()
    assert parsed.object == "response"
    assert parsed.output_text == chat.choices[0].message.content
    assert chat.usage is not None
    assert parsed.usage is not None
    assert parsed.usage.input_tokens == chat.usage.prompt_tokens
    assert parsed.usage.input_tokens_details.to_dict()["image_tokens"] == 256
    assert report(answer.headers)["reused"] == 1


def test_an_image_by_url_has_the_answer_of_its_bytes(private_client: OpenAI, images_url: str) -> None:
    def answer(part: dict[str, Any]) -> str:
        create = private_client.responses.create
        return create(model=MODEL, input=response_input(part, "x"), max_output_tokens=8, temperature=0).output_text

    assert answer(url_part(f"{images_url}/square.png")) == answer(SQUARE)


def test_a_streamed_response(client: OpenAI) -> None:
    whole = client.responses.create(model=MODEL, input=response_input(SQUARE, "x"), max_output_tokens=8, temperature=0)
    events = list(client.responses.create(
        model=MODEL, input=response_input(SQUARE, "x"), max_output_tokens=8, temperature=0, stream=True
    ))  # fmt: skip
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created"
    assert kinds[-1] in ("response.completed", "response.incomplete")
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    last: Any = events[-1]
    assert last.response.usage.input_tokens_details.to_dict()["image_tokens"] == 256


def test_a_response_to_a_text_and_to_invalid_requests(client: OpenAI) -> None:
    assert client.responses.create(model=MODEL, input="x", max_output_tokens=2).usage is not None
    for fields, param in (
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": response_input(BROKEN)}, "input[0].content[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "1"}]}]}, "input[0].content[0]"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(**{"model": MODEL, "input": "x", "max_output_tokens": 2, **fields})
        assert caught.value.param == param
