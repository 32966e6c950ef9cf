"""OpenAI's official client: exceptions and retries."""

import threading
import time
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.e2e.clients.content import BROKEN, KEY, MODEL, SQUARE, user
from tests.e2e.serving import Served


def test_errors_raise_the_clients_exceptions(client: OpenAI) -> None:
    create = client.chat.completions.create
    cases: list[tuple[dict[str, Any], type[openai.APIStatusError], str, str | None]] = [
        ({"messages": user(BROKEN)}, openai.BadRequestError, "invalid_image", "messages[0].content[0]"),
        ({"messages": user("word " * 20_000)}, openai.BadRequestError, "context_length_exceeded", None),
        ({"messages": user(*[SQUARE] * 33)}, openai.BadRequestError, "too_many_images", "messages"),
        ({"messages": user("x"), "temperature": -1}, openai.BadRequestError, "invalid_request", "temperature"),
        ({"messages": user("x"), "model": "absent"}, openai.NotFoundError, "model_not_found", "model"),
        (
            {"messages": user("x", {**SQUARE, "image_url": {**SQUARE["image_url"], "detail": "max"}})},
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
    with (
        OpenAI(base_url=f"{limited.url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        stranger.models.list()
    assert caught.value.code == "invalid_api_key"


def test_the_client_retries_after_429(limited: Served) -> None:
    client = OpenAI(base_url=f"{limited.url}/v1", api_key=KEY, max_retries=0)
    long: Any = {"max_tokens": 7000, "extra_body": {"ignore_eos": True}}
    stream = client.chat.completions.create(model=MODEL, messages=user("go on"), stream=True, **long)
    try:
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model=MODEL, messages=user("x"), max_tokens=1)
        assert caught.value.code == "overloaded"
        assert int(caught.value.response.headers["retry-after"]) >= 1
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
    client.close()
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
    with client, pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model=MODEL, messages=user("x"), **long)
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
    assert timed_out() == before + 1
