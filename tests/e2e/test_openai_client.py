"""OpenAI's and Anthropic's official clients with real processes. Weights are random, so only formats are asserted."""

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
def limited(golden: Golden) -> Iterator[Served]:
    """Another gateway for the same workers, with an API key and a limit of one concurrent request."""
    port = free_port()
    flags = (*golden.workers, f"--port={port}", "--max-in-flight=1")
    gateway = start("gateway", *flags, url=f"http://127.0.0.1:{port}", environment={"DVD_API_KEY": KEY})
    try:
        wait_ready(gateway)
        yield gateway
    finally:
        stop(gateway)


def user(*parts: Any) -> list[Any]:
    """Returns one user message with these content parts; a string is a text."""
    return [{"role": "user", "content": [text_part(part) if isinstance(part, str) else part for part in parts]}]


def with_options(part: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Returns an image part with these options."""
    return {**part, "image_url": {**part["image_url"], **options}}


def report(headers: Any) -> dict[str, int]:
    """Returns the parsed X-DvD-Images header."""
    pairs = (pair.split("=") for pair in headers["x-dvd-images"].split("; "))
    return {name: int(value) for name, value in pairs}


def details(usage: Any) -> dict[str, Any]:
    """Returns `prompt_tokens_details`; older clients lack some of its fields."""
    fields: dict[str, Any] = usage.prompt_tokens_details.to_dict()
    return fields


# Chat completions


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


def test_image_options(client: OpenAI) -> None:
    def tokens(*parts: Any, **fields: Any) -> dict[str, int]:
        create = client.chat.completions.with_raw_response.create
        answer = create(model=MODEL, messages=user(*parts, "x"), max_tokens=1, extra_body=fields)
        images = report(answer.headers)
        assert details(answer.parse().usage)["image_tokens"] == images["tokens"]
        return images

    off = {"mode": "off"}
    assert tokens(with_options(WIDE, detail="low"), vir=off)["tokens"] == 256
    assert tokens(with_options(WIDE, detail="high"), vir=off)["tokens"] == 7 * 256
    assert tokens(with_options(WIDE, max_dynamic_patch=2), vir=off)["tokens"] == 3 * 256
    assert tokens(with_options(WIDE, vir={"mode": "all"}))["tokens"] == 7 * 64
    again = tokens(with_options(WIDE, detail="auto"), vir=off)
    assert (again["tokens"], again["reused"]) == (7 * 256, 1)


def test_token_counts_equal_those_of_a_chat(served: Served, client: OpenAI) -> None:
    messages = user(WIDE, SQUARE, "how many tokens?")
    counts = served.post("/v1/images/tokens", {"messages": messages, "route": True}, Authorization="Bearer none").json
    answer = client.chat.completions.with_raw_response.create(model=MODEL, messages=messages, max_tokens=1)
    images = report(answer.headers)
    total = counts["total"]
    assert (total["tiles"], total["routed"]["tokens"]) == (images["tiles"], images["tokens"])
    assert total["routed"]["compressed"] == images["compressed"]
    assert total["tokens"]["auto"][0] <= images["tokens"] <= total["tokens"]["auto"][1]
    assert images["encoded"] == 0, "the routed images are not encoded again"


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


def test_models_and_texts(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    result = client.completions.create(model=MODEL, prompt="a", max_tokens=2)
    assert result.object == "text_completion"


# Errors and retries


def test_errors_raise_the_clients_exceptions(client: OpenAI) -> None:
    create = client.chat.completions.create
    cases: list[tuple[dict[str, Any], type[openai.APIStatusError], str, str | None]] = [
        ({"messages": user(image_part(b"hello"))}, openai.BadRequestError, "invalid_image", None),
        ({"messages": user("word " * 20_000)}, openai.BadRequestError, "context_length_exceeded", None),
        ({"messages": user(*[SQUARE] * 33)}, openai.BadRequestError, "too_many_images", "messages"),
        ({"messages": user("x"), "temperature": -1}, openai.BadRequestError, "invalid_request", "temperature"),
        ({"messages": user("x"), "model": "absent"}, openai.NotFoundError, "model_not_found", "model"),
        (
            {"messages": user("x", with_options(SQUARE, detail="max"))},
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
        assert caught.value.code == code, "a streamed request has the error's status too"


def test_a_wrong_key_is_rejected(limited: Served) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        OpenAI(base_url=f"{limited.url}/v1", api_key="wrong", max_retries=0).models.list()
    assert caught.value.code == "invalid_api_key"


def test_the_client_retries_after_429(limited: Served) -> None:
    client = OpenAI(base_url=f"{limited.url}/v1", api_key=KEY, max_retries=0)
    long: Any = {"max_tokens": 7000, "extra_body": {"ignore_eos": True}}
    stream = client.chat.completions.create(model=MODEL, messages=user("go on"), stream=True, **long)
    try:
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model=MODEL, messages=user("x"), max_tokens=1)
        assert (caught.value.code, caught.value.response.headers["retry-after"]) == ("overloaded", "1")
        answers: list[Any] = []
        patient = client.with_options(max_retries=60).chat.completions.with_raw_response
        waiting = threading.Thread(
            target=lambda: answers.append(patient.create(model=MODEL, messages=user("x"), max_tokens=1)), daemon=True
        )
        waiting.start()
        deadline = time.monotonic() + 120
        while rejected(limited) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        stream.close()
    waiting.join(120)
    assert answers[0].retries_taken >= 1
    assert answers[0].parse().choices


def rejected(served: Served) -> int:
    """Returns the number of requests that were rejected with 429."""
    lines = served.get("/metrics").text.splitlines()
    return sum(int(float(line.rsplit(" ", 1)[1])) for line in lines if 'code="429"' in line and "requests_total" in line)


def test_the_client_does_not_retry_after_a_deadline(served: Served) -> None:
    def timed_out() -> float:
        lines = served.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if 'code="504"' in line and "requests_total" in line)

    before = timed_out()
    client = OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=3)
    long: Any = {"max_tokens": 7000, "extra_body": {"ignore_eos": True}, "extra_headers": {"X-Request-Timeout": "0.2"}}
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model=MODEL, messages=user("x"), **long)
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
    assert timed_out() == before + 1


# Responses API


def response_input(*parts: Any) -> Any:
    """Returns the input of a Responses request with one user message."""
    return [{"role": "user", "content": [_input(part) for part in parts]}]


def _input(part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "input_text", "text": part}
    return {"type": "input_image", "detail": "auto", "image_url": part["image_url"]["url"]}


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
        ({"input": response_input(image_part(b"hello"))}, None),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "1"}]}]}, "input[0].content[0]"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(**{"model": MODEL, "input": "x", "max_output_tokens": 2, **fields})
        assert caught.value.param == param


# Anthropic's Messages


@pytest.fixture(scope="session")
def claude(served: Served) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0)


def blocks(*parts: Any) -> Any:
    """Returns one user message with these content blocks; a string is a text."""
    return [{"role": "user", "content": [_block(part) for part in parts]}]


def _block(part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return text_part(part)
    data = part["image_url"]["url"].partition(",")[2]
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}


def test_a_message_has_the_answer_of_a_chat(client: OpenAI, claude: anthropic.Anthropic) -> None:
    chat = client.chat.completions.create(model=MODEL, messages=user(SQUARE, "x", WIDE), max_tokens=8, temperature=0)
    body: Any = {"model": MODEL, "messages": blocks(SQUARE, "x", WIDE), "max_tokens": 8, "extra_body": {"temperature": 0}}
    result = claude.messages.create(**body)
    assert (result.type, result.role) == ("message", "assistant")
    assert [block.text for block in result.content if block.type == "text"] == [chat.choices[0].message.content]
    assert chat.usage is not None
    assert result.usage.input_tokens + (result.usage.cache_read_input_tokens or 0) == chat.usage.prompt_tokens
    counted = claude.messages.count_tokens(model=MODEL, messages=blocks(SQUARE, "x", WIDE))
    assert counted.input_tokens == chat.usage.prompt_tokens
    with claude.messages.stream(**body) as stream:
        assert "".join(stream.text_stream) == chat.choices[0].message.content


def test_an_image_in_a_tool_result(claude: anthropic.Anthropic) -> None:
    result = {"type": "tool_result", "tool_use_id": "t", "content": [_block(SQUARE), text_part("it")]}
    messages: Any = [
        {"role": "user", "content": "look"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "look", "input": {}}]},
        {"role": "user", "content": [result]},
    ]
    counted = claude.messages.count_tokens(model=MODEL, messages=messages)
    assert counted.input_tokens > 256
    assert claude.messages.create(model=MODEL, messages=messages, max_tokens=2).content


def test_errors_have_anthropics_format(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        claude.messages.create(model=MODEL, messages=blocks(image_part(b"hello")), max_tokens=2)
    body: Any = caught.value.body
    assert (body["type"], body["error"]["type"], body["error"]["code"]) == ("error", "invalid_request_error", "invalid_image")
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="absent", messages=blocks("x"), max_tokens=2)


# Tokenization


def test_a_prompt_is_tokenized_with_its_images(served: Served, client: OpenAI) -> None:
    chat = client.chat.completions.create(model=MODEL, messages=user(SQUARE, "x"), max_tokens=1)
    assert chat.usage is not None
    result = served.post("/tokenize", {"messages": user(SQUARE, "x")}).json
    assert (result["count"], result["tokens"].count(4)) == (chat.usage.prompt_tokens, 1)
    text = served.post("/tokenize", {"prompt": "a b"}).json["tokens"]
    assert served.post("/detokenize", {"tokens": text}).json["prompt"].strip() == "a b"
