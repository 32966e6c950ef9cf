"""The official clients, OpenAI's and Anthropic's, through the real path. Weights are random: what is asserted is shape."""

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from openai import OpenAI

from tests.e2e.conftest import Golden
from tests.e2e.serving import Served, image_part, start, stop, text_part, wait_ready
from tests.ports import free_port

MODEL = "checkpoint"
SQUARE = image_part("square.png")
WIDE = image_part("wide_1300x800.jpg")
KEY = "a-secret-for-this-test"


@pytest.fixture(scope="session")
def client(served: Served) -> OpenAI:
    return OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="session")
def narrow(golden: Golden) -> Iterator[Served]:
    """Another gateway before the same workers: it wants a key and serves one request at a time."""
    port = free_port()
    flags = (*golden.workers, f"--port={port}", "--max-in-flight=1")
    made = start("gateway", *flags, url=f"http://127.0.0.1:{port}", environment={"DVD_API_KEY": KEY})
    try:
        wait_ready(made)
        yield made
    finally:
        stop(made)


def user(*parts: Any) -> list[Any]:
    return [{"role": "user", "content": [text_part(part) if isinstance(part, str) else part for part in parts]}]


def with_words(part: dict[str, Any], **words: Any) -> dict[str, Any]:
    return {**part, "image_url": {**part["image_url"], **words}}


def report(headers: Any) -> dict[str, int]:
    pairs = (pair.split("=") for pair in headers["x-dvd-images"].split("; "))
    return {name: int(value) for name, value in pairs}


def details(usage: Any) -> dict[str, Any]:
    """Of a prompt's tokens; in older clients some of these are no fields."""
    made: dict[str, Any] = usage.prompt_tokens_details.to_dict()
    return made


# Chat


def test_a_chat_and_its_usage(client: OpenAI) -> None:
    answer = client.chat.completions.with_raw_response.create(model=MODEL, messages=user(SQUARE, "x"), max_tokens=4)
    said = answer.parse()
    assert (said.object, said.model, said.choices[0].message.role) == ("chat.completion", MODEL, "assistant")
    assert isinstance(said.choices[0].message.content, str)
    assert said.choices[0].finish_reason in ("length", "stop")
    assert said.usage is not None
    assert said.usage.total_tokens == said.usage.prompt_tokens + said.usage.completion_tokens
    assert details(said.usage)["image_tokens"] == 256 < said.usage.prompt_tokens
    assert 0 <= details(said.usage)["cached_tokens"] <= said.usage.prompt_tokens
    assert report(answer.headers)["tokens"] == 256
    text = client.chat.completions.create(model=MODEL, messages=user("x"), max_tokens=4)
    assert text.usage is not None
    assert "image_tokens" not in str(text.usage.to_dict())


def test_the_dial(client: OpenAI) -> None:
    def tokens(*parts: Any, **fields: Any) -> dict[str, int]:
        create = client.chat.completions.with_raw_response.create
        answer = create(model=MODEL, messages=user(*parts, "x"), max_tokens=1, extra_body=fields)
        said = report(answer.headers)
        assert details(answer.parse().usage)["image_tokens"] == said["tokens"]
        return said

    off = {"mode": "off"}
    assert tokens(with_words(WIDE, detail="low"), vir=off)["tokens"] == 256
    assert tokens(with_words(WIDE, detail="high"), vir=off)["tokens"] == 7 * 256
    assert tokens(with_words(WIDE, max_dynamic_patch=2), vir=off)["tokens"] == 3 * 256
    assert tokens(with_words(WIDE, vir={"mode": "all"}))["tokens"] == 7 * 64
    again = tokens(with_words(WIDE, detail="auto"), vir=off)
    assert (again["tokens"], again["reused"]) == (7 * 256, 1)


def test_costs_are_what_a_chat_then_costs(served: Served, client: OpenAI) -> None:
    messages = user(WIDE, SQUARE, "what would it cost?")
    costs = served.post("/v1/images/tokens", {"messages": messages, "route": True}, Authorization="Bearer none").json
    answer = client.chat.completions.with_raw_response.create(model=MODEL, messages=messages, max_tokens=1)
    said = report(answer.headers)
    total = costs["total"]
    assert (total["tiles"], total["routed"]["tokens"]) == (said["tiles"], said["tokens"])
    assert total["routed"]["compressed"] == said["compressed"]
    assert total["tokens"]["auto"][0] <= said["tokens"] <= total["tokens"]["auto"][1]
    assert said["encoded"] == 0, "what was routed has not been made again"


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


def test_choices_and_log_probabilities(client: OpenAI) -> None:
    said = client.chat.completions.create(
        model=MODEL, messages=user(SQUARE, "x"), max_tokens=4, n=3, temperature=1, seed=7, logprobs=True, top_logprobs=2
    )
    assert [choice.index for choice in said.choices] == [0, 1, 2]
    for choice in said.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content
        for token in choice.logprobs.content:
            assert token.logprob <= 0
            assert len(token.top_logprobs) == 2
    again = client.chat.completions.create(model=MODEL, messages=user(SQUARE, "x"), max_tokens=4, n=3, temperature=1, seed=7)
    assert [c.message.content for c in again.choices] == [c.message.content for c in said.choices]


SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}


def test_structured_output(client: OpenAI) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}
    said = client.chat.completions.create(model=MODEL, messages=user(SQUARE, "x"), max_tokens=200, response_format=wanted)
    choice = said.choices[0]
    assert choice.message.content is not None
    assert choice.finish_reason == "length" or set(json.loads(choice.message.content)) == {"a"}


def test_a_tool_that_must_be_called(client: OpenAI) -> None:
    tools: Any = [{"type": "function", "function": {"name": "look", "parameters": SCHEMA}}]
    choice: Any = {"type": "function", "function": {"name": "look"}}
    said = client.chat.completions.create(
        model=MODEL, messages=user(SQUARE, "x"), max_tokens=200, tools=tools, tool_choice=choice
    )
    assert said.choices[0].message.tool_calls
    call = said.choices[0].message.tool_calls[0]
    assert (call.type, call.function.name) == ("function", "look")
    answered: Any = [
        *user(SQUARE, "x"),
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "a circle"},
    ]
    assert client.chat.completions.create(model=MODEL, messages=answered, max_tokens=2, tools=tools, tool_choice="none").choices


def test_models_and_texts(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    said = client.completions.create(model=MODEL, prompt="a", max_tokens=2)
    assert said.object == "text_completion"


# Errors, and what the client makes of them


def test_errors_are_the_clients_own_exceptions(client: OpenAI) -> None:
    create = client.chat.completions.create
    cases: list[tuple[dict[str, Any], type[openai.APIStatusError], str, str | None]] = [
        ({"messages": user(image_part(b"hello"))}, openai.BadRequestError, "invalid_image", None),
        ({"messages": user("word " * 20_000)}, openai.BadRequestError, "context_length_exceeded", None),
        ({"messages": user(*[SQUARE] * 33)}, openai.BadRequestError, "too_many_images", "messages"),
        ({"messages": user("x"), "temperature": -1}, openai.BadRequestError, "invalid_request", "temperature"),
        ({"messages": user("x"), "model": "absent"}, openai.NotFoundError, "model_not_found", "model"),
        (
            {"messages": user("x", with_words(SQUARE, detail="max"))},
            openai.BadRequestError, "invalid_request", "messages[0].content[1].image_url.detail",
        ),
    ]  # fmt: skip
    for fields, kind, code, param in cases:
        with pytest.raises(kind) as caught:
            create(**{"model": MODEL, "max_tokens": 4, **fields})
        assert (caught.value.code, caught.value.type) == (code, "invalid_request_error")
        if param is not None:
            assert caught.value.param == param
        with pytest.raises(kind) as caught:
            create(**{"model": MODEL, "max_tokens": 4, **fields, "stream": True})
        assert caught.value.code == code, "an error has its status also where a stream was asked for"


def test_a_wrong_key(narrow: Served) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        OpenAI(base_url=f"{narrow.url}/v1", api_key="wrong", max_retries=0).models.list()
    assert caught.value.code == "invalid_api_key"


def test_a_busy_server_is_tried_again_when_it_said(narrow: Served) -> None:
    client = OpenAI(base_url=f"{narrow.url}/v1", api_key=KEY, max_retries=0)
    long: Any = {"max_tokens": 7000, "extra_body": {"ignore_eos": True}}
    stream = client.chat.completions.create(model=MODEL, messages=user("go on"), stream=True, **long)
    try:
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model=MODEL, messages=user("x"), max_tokens=1)
        assert (caught.value.code, caught.value.response.headers["retry-after"]) == ("overloaded", "1")
        answers: list[Any] = []
        patient = client.with_options(max_retries=60).chat.completions.with_raw_response
        asking = threading.Thread(
            target=lambda: answers.append(patient.create(model=MODEL, messages=user("x"), max_tokens=1)), daemon=True
        )
        asking.start()
        until = time.monotonic() + 120
        while refused(narrow) < 2:
            assert time.monotonic() < until
            time.sleep(0.05)
    finally:
        stream.close()
    asking.join(120)
    assert answers[0].retries_taken >= 1
    assert answers[0].parse().choices


def refused(served: Served) -> int:
    lines = served.get("/metrics").text.splitlines()
    return sum(int(float(line.rsplit(" ", 1)[1])) for line in lines if 'code="429"' in line and "requests_total" in line)


def test_a_request_whose_time_is_up_is_not_tried_again(served: Served) -> None:
    def given_up() -> float:
        lines = served.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if 'code="504"' in line and "requests_total" in line)

    before = given_up()
    client = OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=3)
    long: Any = {"max_tokens": 7000, "extra_body": {"ignore_eos": True}, "extra_headers": {"X-Request-Timeout": "0.2"}}
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model=MODEL, messages=user("x"), **long)
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
    assert given_up() == before + 1


# Responses


def asked(*parts: Any) -> Any:
    return [{"role": "user", "content": [_input(part) for part in parts]}]


def _input(part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "input_text", "text": part}
    return {"type": "input_image", "detail": "auto", "image_url": part["image_url"]["url"]}


def test_a_response_says_what_a_chat_says(client: OpenAI) -> None:
    chat = client.chat.completions.create(model=MODEL, messages=user(SQUARE, "x"), max_tokens=8, temperature=0)
    answer = client.responses.with_raw_response.create(
        model=MODEL, input=asked(SQUARE, "x"), max_output_tokens=8, temperature=0
    )
    said = answer.parse()
    assert said.object == "response"
    assert said.output_text == chat.choices[0].message.content
    assert chat.usage is not None
    assert said.usage is not None
    assert said.usage.input_tokens == chat.usage.prompt_tokens
    assert said.usage.input_tokens_details.to_dict()["image_tokens"] == 256
    assert report(answer.headers)["reused"] == 1


def test_a_response_in_events(client: OpenAI) -> None:
    whole = client.responses.create(model=MODEL, input=asked(SQUARE, "x"), max_output_tokens=8, temperature=0)
    events = list(client.responses.create(
        model=MODEL, input=asked(SQUARE, "x"), max_output_tokens=8, temperature=0, stream=True
    ))  # fmt: skip
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created"
    assert kinds[-1] in ("response.completed", "response.incomplete")
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    last: Any = events[-1]
    assert last.response.usage.input_tokens_details.to_dict()["image_tokens"] == 256


def test_a_response_to_a_text_and_errors(client: OpenAI) -> None:
    assert client.responses.create(model=MODEL, input="x", max_output_tokens=2).usage is not None
    for fields, param in (
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": asked(image_part(b"hello"))}, None),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "1"}]}]}, "input[0].content[0]"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(**{"model": MODEL, "input": "x", "max_output_tokens": 2, **fields})
        assert caught.value.param == param


# Anthropic's client


@pytest.fixture(scope="session")
def claude(served: Served) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0)


def blocks(*parts: Any) -> Any:
    return [{"role": "user", "content": [_block(part) for part in parts]}]


def _block(part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return text_part(part)
    data = part["image_url"]["url"].partition(",")[2]
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}


def test_a_message_says_what_a_chat_says(client: OpenAI, claude: anthropic.Anthropic) -> None:
    chat = client.chat.completions.create(model=MODEL, messages=user(SQUARE, "x", WIDE), max_tokens=8, temperature=0)
    body: Any = {"model": MODEL, "messages": blocks(SQUARE, "x", WIDE), "max_tokens": 8, "extra_body": {"temperature": 0}}
    said = claude.messages.create(**body)
    assert (said.type, said.role) == ("message", "assistant")
    assert [block.text for block in said.content if block.type == "text"] == [chat.choices[0].message.content]
    assert chat.usage is not None
    assert said.usage.input_tokens + (said.usage.cache_read_input_tokens or 0) == chat.usage.prompt_tokens
    counted = claude.messages.count_tokens(model=MODEL, messages=blocks(SQUARE, "x", WIDE))
    assert counted.input_tokens == chat.usage.prompt_tokens
    with claude.messages.stream(**body) as stream:
        assert "".join(stream.text_stream) == chat.choices[0].message.content


def test_an_image_that_a_tool_gave(claude: anthropic.Anthropic) -> None:
    result = {"type": "tool_result", "tool_use_id": "t", "content": [_block(SQUARE), text_part("it")]}
    messages: Any = [
        {"role": "user", "content": "look"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "look", "input": {}}]},
        {"role": "user", "content": [result]},
    ]
    counted = claude.messages.count_tokens(model=MODEL, messages=messages)
    assert counted.input_tokens > 256
    assert claude.messages.create(model=MODEL, messages=messages, max_tokens=2).content


def test_errors_are_anthropics(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        claude.messages.create(model=MODEL, messages=blocks(image_part(b"hello")), max_tokens=2)
    body: Any = caught.value.body
    assert (body["type"], body["error"]["type"], body["error"]["code"]) == ("error", "invalid_request_error", "invalid_image")
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="absent", messages=blocks("x"), max_tokens=2)


# Tokens


def test_a_prompt_is_tokenized_with_its_images(served: Served, client: OpenAI) -> None:
    chat = client.chat.completions.create(model=MODEL, messages=user(SQUARE, "x"), max_tokens=1)
    assert chat.usage is not None
    said = served.post("/tokenize", {"messages": user(SQUARE, "x")}).json
    assert (said["count"], said["tokens"].count(4)) == (chat.usage.prompt_tokens, 1)
    text = served.post("/tokenize", {"prompt": "a b"}).json["tokens"]
    assert served.post("/detokenize", {"tokens": text}).json["prompt"].strip() == "a b"
