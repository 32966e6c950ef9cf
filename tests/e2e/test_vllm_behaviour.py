"""What the gateway relies on in the pinned vLLM: the error of a prompt that is too long, and how streams begin.

Each property is asserted of vLLM itself, at its own port, and of the gateway. A failure after an upgrade of vLLM names what
has changed: the gateway's classification of errors and its retry before the first event depend on it.
"""

import json
from typing import Any

import pytest

from tests.e2e.conftest import Golden
from tests.e2e.serving import Answer, Served, image_part, request, text_part

MODEL = "checkpoint"
CONTEXT = 8192
MANY_CHARACTERS = "word " * 200_000
MANY_TOKENS = "x " * 10_000
LARGE_IMAGES = [image_part(name) for name in ("strip_100x1900.png", "vga_640x480.png", "hd_1920x1080.jpg", "rgba_700x500.png")]


def chat(content: Any) -> dict[str, Any]:
    """Returns a request with one user message, as chat completions and Messages take it."""
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 4}


def body_of(path: str, text: str) -> dict[str, Any]:
    """Returns a request to this path with this text."""
    if path == "/v1/completions":
        return {"model": MODEL, "prompt": text, "max_tokens": 4}
    if path == "/v1/responses":
        return {"model": MODEL, "input": text, "max_output_tokens": 4}
    return chat(text)


PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")


def post_to_vllm(golden: Golden, path: str, body: Any) -> Answer:
    """Sends a request to vLLM itself."""
    return request(f"{golden.vllm_url}{path}", json.dumps(body).encode())


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("text", "parameter"), [(MANY_CHARACTERS, "input_text"), (MANY_TOKENS, "input_tokens")], ids=["characters", "tokens"]
)
def test_a_prompt_that_is_too_long_is_recognised(
    golden: Golden, served: Served, path: str, text: str, parameter: str, stream: bool
) -> None:
    body = {**body_of(path, text), "stream": stream}
    raw = post_to_vllm(golden, path, body)
    assert raw.status == 400, "vLLM answers a stream's error before the first event"
    assert f"maximum context length is {CONTEXT}" in raw.error["message"]
    assert f"parameter={parameter}" in raw.error["message"]
    if path != "/v1/messages":
        assert (raw.error["param"], raw.error["code"]) == (parameter, 400)
    answer = served.post(path, body)
    assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded"), answer.text


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_images_that_make_a_prompt_too_long_are_recognised(served: Served, stream: bool) -> None:
    answer = served.post("/v1/chat/completions", {**chat(LARGE_IMAGES), "stream": stream})
    assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded"), answer.text
    assert "Input length" in answer.error["message"]
    assert f"exceeds model's maximum context length ({CONTEXT})" in answer.error["message"]


def test_a_prompt_of_any_length_is_tokenized(golden: Golden, served: Served) -> None:
    body = {"model": MODEL, "prompt": MANY_TOKENS}
    for answer in (post_to_vllm(golden, "/tokenize", body), served.post("/tokenize", body)):
        assert answer.status == 200, answer.text
        assert answer.json["count"] > answer.json["max_model_len"] == CONTEXT


def events_of(answer: Answer) -> list[Any]:
    """Returns the data of all server-sent events, parsed; `[DONE]` and comments are left out."""
    assert answer.status == 200, answer.text
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


@pytest.mark.parametrize("path", PATHS)
def test_the_first_events_of_a_stream(golden: Golden, served: Served, path: str) -> None:
    body = {**body_of(path, "go on"), "stream": True}
    for answer in (post_to_vllm(golden, path, body), served.post(path, body)):
        first, second, *_ = events_of(answer)
        if path == "/v1/chat/completions":
            assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}, "the role comes on its own"
            assert "role" not in second["choices"][0]["delta"]
            assert "content" in second["choices"][0]["delta"]
        elif path == "/v1/completions":
            assert "text" in first["choices"][0], "there is no event before the first token"
        elif path == "/v1/responses":
            assert [first["type"], second["type"]] == ["response.created", "response.in_progress"]
        else:
            assert [first["type"], second["type"]] == ["message_start", "content_block_start"]


def test_an_embedding_that_does_not_come_is_an_error_after_the_role(golden: Golden) -> None:
    part = {"type": "image_embeds", "image_embeds": {"image_num_tokens": [256]}, "uuid": "0" * 64}
    stream = post_to_vllm(golden, "/v1/chat/completions", {**chat([part, text_part("x")]), "stream": True})
    role, error = events_of(stream)
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert error["error"]["code"] == 500
    assert stream.text.endswith("data: [DONE]\n\n")


def embedding_part(count: Any, uuid: Any) -> dict[str, Any]:
    """Returns an image as the gateway sends it to vLLM."""
    return {"type": "image_embeds", "image_embeds": {"image_num_tokens": [count]}, "uuid": uuid}


BAD_IMAGES = [
    *(embedding_part(count, "0" * 64) for count in (10**9, CONTEXT + 1, -1, 0, 1.5, 2**70, None)),
    *(embedding_part(256, uuid) for uuid in (None, "", "../x", "schl\u00fcssel", "k" * 1000, 5)),
    {"type": "image_url", "image_url": {"url": f"dvd:{'0' * 64}/99999999"}},
    {"type": "image_url", "image_url": {"url": f"dvd:{'0' * 64}/0"}},
    {"type": "image_url", "image_url": {"url": f"dvd:../x/{CONTEXT}"}},
]


@pytest.mark.parametrize("part", BAD_IMAGES, ids=lambda part: json.dumps(part)[-60:])
def test_an_image_with_an_impossible_size_or_key_is_refused_at_once(golden: Golden, part: dict[str, Any]) -> None:
    """Without its check, vLLM builds a list of the declared length, or waits 10 s for the embedding."""
    answer = post_to_vllm(golden, "/v1/chat/completions", chat([part, text_part("x")]))
    assert answer.status == 400, answer.text
    assert post_to_vllm(golden, "/v1/chat/completions", chat("x")).status == 200
