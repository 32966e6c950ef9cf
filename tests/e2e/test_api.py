"""Requests of an OpenAI client to real processes, and the errors of invalid requests."""

import base64
import json
import re
import socket
import time
from typing import Any

import pytest

from server.media.video import sample_frames
from tests.e2e.conftest import Golden
from tests.e2e.serving import IMAGES, Served, image_part, request, text_part
from tests.videos import encode_video

SQUARE = image_part("square.png")
PALETTE = image_part("palette_512x512.png")


def vllm_metric(golden: Golden, pattern: str) -> float:
    """Returns the sum of vLLM's metrics whose lines match a pattern."""
    lines = request(f"{golden.vllm_url}/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(pattern, line))


def test_models_version_health_and_metrics(served: Served) -> None:
    assert [model["id"] for model in served.get("/v1/models").json["data"]] == ["checkpoint"]
    assert served.get("/version").json["engine"] == "0.32.0"
    assert served.get("/health/live").status == 200
    assert served.get("/health/ready").json == {"status": "ready", "reasons": []}
    assert "dvd_requests_total" in served.get("/metrics").text


def test_usage_counts_image_tokens_and_cached_ones(served: Served) -> None:
    question = "how many tokens has a square, counted twice?"
    first = served.chat(SQUARE, question).json["usage"]
    again = served.chat(SQUARE, question).json["usage"]
    text = served.chat(question).json["usage"]
    assert first["prompt_tokens"] > text["prompt_tokens"] + 256
    assert again["prompt_tokens_details"]["cached_tokens"] >= 256, "the engine uses the key for its prefix cache"


def test_a_repeated_image_is_not_encoded_again(served: Served) -> None:
    served.chat(SQUARE, "once")
    before = served.metric("dvd_encodes_total")
    answer = served.chat(SQUARE, "twice")
    assert answer.headers["x-dvd-images"].endswith("reused=1; shared=0; encoded=0")
    assert served.metric("dvd_encodes_total") == before


def test_images_are_served_in_any_turn_and_place(served: Served) -> None:
    def ask(*first: Any) -> list[int]:
        messages = [
            {"role": "user", "content": [text_part("a "), *first, text_part(" b")]},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": [SQUARE, text_part("and "), PALETTE, text_part("?")]},
        ]
        answer = served.post(
            "/v1/chat/completions", {"messages": messages, "max_tokens": 8, "temperature": 0, "return_token_ids": True}
        )
        assert answer.status == 200, answer.text
        ids = answer.json["prompt_token_ids"]
        return [ids.count(4), *answer.json["choices"][0]["token_ids"]]

    context = len({3, 4})  # <img>, </img>
    assert context == 2
    one, other = ask(SQUARE), ask(PALETTE)
    assert one[0] == other[0] == 3, "three images, each closed by its own </img>"
    assert one != other


def tokens_of(answer: dict[str, Any]) -> list[str]:
    return [token["token"] for token in answer["choices"][0]["logprobs"]["content"]]


def log_probabilities_of(answer: dict[str, Any]) -> list[float]:
    return [token["logprob"] for token in answer["choices"][0]["logprobs"]["content"]]


def test_a_video_has_the_answer_of_its_frames(served: Served) -> None:
    clip = encode_video("mp4", "mpeg4", 40, size=(640, 480))
    url = f"data:video/mp4;base64,{base64.b64encode(clip).decode()}"
    video = {"type": "video_url", "video_url": {"url": url, "num_frames": 3}}
    parameters: dict[str, Any] = {"logprobs": True, "max_tokens": 8}
    answer = served.chat(video, "What happens?", **parameters)
    assert answer.status == 200, answer.text
    assert answer.headers["x-dvd-images"].startswith("images=3; ")
    parts: list[Any] = []
    for number, frame in enumerate(sample_frames(clip, 3, 1 << 20), start=1):
        link = f"data:image/png;base64,{base64.b64encode(frame).decode()}"
        parts += [f"Frame{number}: ", {"type": "image_url", "image_url": {"url": link, "detail": "low"}}]
    again = served.chat(*parts, "What happens?", **parameters)
    assert tokens_of(again.json) == tokens_of(answer.json)
    # the second prompt finds a part of its KV cache: another order of additions, so the last bits may differ
    assert log_probabilities_of(again.json) == pytest.approx(log_probabilities_of(answer.json), abs=1e-5)
    assert again.json["usage"]["prompt_tokens"] == answer.json["usage"]["prompt_tokens"]
    assert "reused=3" in again.headers["x-dvd-images"], "the frames have the keys that the video's frames had"


def test_choices_seed_stop_and_log_probabilities(served: Served) -> None:
    answer = served.chat(SQUARE, "x", n=3, temperature=1, seed=7, logprobs=True, top_logprobs=2).json
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert len(answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 2
    again = served.chat(SQUARE, "x", n=3, temperature=1, seed=7).json
    assert [c["message"]["content"] for c in again["choices"]] == [c["message"]["content"] for c in answer["choices"]]
    greedy = served.chat(SQUARE, "x", ignore_eos=True).json["choices"][0]["message"]["content"]
    stop = next(character for character in greedy[1:] if character.isascii() and character.isprintable())
    stopped = served.chat(SQUARE, "x", ignore_eos=True, stop=[stop]).json["choices"][0]
    assert stopped["finish_reason"] == "stop"
    assert stop not in stopped["message"]["content"]


def test_a_seed_gives_the_same_answer_if_the_prompt_is_prefilled_in_parts(served: Served) -> None:
    """The token of each part but the last is discarded, and must not change the random numbers after it."""
    parameters: dict[str, Any] = {"temperature": 1, "seed": 7, "max_tokens": 8, "ignore_eos": True, "return_token_ids": True}
    for parts in ((SQUARE, image_part("seed_800x1300.png"), "Images in parts?"), ("A prompt that is long. " * 450,)):
        answers = [served.chat(*parts, vir="off", **parameters) for _ in range(2)]  # the second one is prefilled at once
        assert [answer.status for answer in answers] == [200, 200], answers[0].text
        first, second = (answer.json["choices"][0]["token_ids"] for answer in answers)
        assert first == second
        assert len(set(first)) > 1


def test_structured_output_and_tools_are_forwarded(golden: Golden, served: Served) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
    response_format = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    choice = served.chat(SQUARE, "x", response_format=response_format, max_tokens=200).json["choices"][0]
    assert choice["message"]["content"] in ('{"a":true}', '{"a":false}'), "without white space, even from random weights"
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    rejected = golden["vit300m-qwen2"].chat(SQUARE, "x", tools=[tool], tool_choice="auto")
    assert rejected.status == 400
    assert "auto" in rejected.error["message"], "vLLM's message: it was started without a tool parser"


@pytest.mark.parametrize("schema", [{"$ref": "#"}, {"type": "string", "pattern": "((a{1,100}){1,100}){1,100}"}])
def test_vllm_compiles_no_schema_of_a_tool_that_the_model_is_free_to_call(golden: Golden, schema: dict[str, Any]) -> None:
    """The gateway relies on it: such schemas have larger bounds (`server/apis/constraint_budgets.py`)."""
    function = {"name": "look", "parameters": schema}
    free: list[dict[str, Any]] = [{}, {"tool_choice": "auto"}, {"tool_choice": "none"}, {"parallel_tool_calls": False}]
    forced: list[Any] = ["required", {"type": "function", "function": {"name": "look"}}]
    for fields in free:
        for strict in ({}, {"strict": False}):
            tool = {"type": "function", "function": {**function, **strict}}
            body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4, "tools": [tool], **fields}
            answer = request(f"{golden.vllm_url}/v1/chat/completions", json.dumps(body).encode())
            assert answer.status == 200, answer.text
            assert golden.flash.chat("x", tools=[tool], max_tokens=4, **fields).status == 200
    for choice in forced:
        tools = [{"type": "function", "function": function}]
        assert golden.flash.chat("x", tools=tools, max_tokens=4, tool_choice=choice).status == 400


def test_streams_end_with_usage_when_requested(served: Served) -> None:
    text = served.chat(SQUARE, "x", stream=True, stream_options={"include_usage": True}).text
    events = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["usage"]["completion_tokens"] > 0


def test_a_disconnect_ends_the_engines_request(golden: Golden, served: Served) -> None:
    before = vllm_metric(golden, "vllm:generation_tokens_total")
    body = json.dumps({
        "messages": [{"role": "user", "content": [SQUARE, text_part("go on")]}],
        "max_tokens": 7000, "ignore_eos": True, "stream": True,
    }).encode()  # fmt: skip
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        assert client.recv(1000).startswith(b"HTTP/1.1 200")
    deadline = time.monotonic() + 60
    while vllm_metric(golden, "vllm:num_requests_running"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert vllm_metric(golden, "vllm:generation_tokens_total") - before < 6000, (
        "vLLM continued after the client had disconnected"
    )
    assert served.metric("dvd_requests_in_flight") == 0


LARGE = [image_part(name) for name in ("strip_100x1900.png", "vga_640x480.png", "hd_1920x1080.jpg", "rgba_700x500.png")]
INVALID_REQUESTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "not an image": ({"content": [image_part(b"hello")]}, 400, "invalid_image"),
    "no bytes": ({"content": [image_part(b"")]}, 400, "invalid_image"),
    "truncated": ({"content": [image_part(b"\x89PNG\r\n\x1a\n")]}, 400, "invalid_image"),
    "too many": ({"content": [SQUARE] * 33}, 400, "too_many_images"),
    "too long": ({"content": "word " * 20_000}, 400, "context_length_exceeded"),
    "too many tokens": ({"content": LARGE}, 400, "context_length_exceeded"),
    "private": ({"content": [{"type": "image_url", "image_url": {"url": "https://127.0.0.1/a.png"}}]}, 400, "invalid_request"),
    "file": ({"content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}, 400, "invalid_request"),
    "embeds": ({"content": [{"type": "image_embeds", "image_embeds": {"image_num_tokens": [1]}}]}, 400, "invalid_request"),
}  # fmt: skip


@pytest.mark.parametrize(("message", "status", "code"), INVALID_REQUESTS.values(), ids=INVALID_REQUESTS)
def test_an_invalid_request_has_its_code_and_the_next_is_served(
    served: Served, message: dict[str, Any], status: int, code: str
) -> None:
    answer = served.post("/v1/chat/completions", {"messages": [{"role": "user", **message}], "max_tokens": 4})
    assert (answer.status, answer.error["code"]) == (status, code), answer.text
    assert answer.error["type"] == "invalid_request_error"
    assert served.chat(SQUARE, "x").status == 200


def test_an_image_that_cannot_be_decoded_completely_is_invalid(served: Served) -> None:
    data = (IMAGES / "vga_640x480.png").read_bytes()
    answer = served.chat(image_part(data[: len(data) // 2]), "x")
    assert (answer.status, answer.error["code"]) == (400, "invalid_image")


def test_the_error_for_an_unknown_model_names_it_and_the_known_ones(served: Served) -> None:
    answer = served.chat(SQUARE, "x", model="gpt-4o")
    assert (answer.status, answer.error["code"]) == (404, "model_not_found")
    assert "'gpt-4o'" in answer.error["message"]
    assert "checkpoint" in answer.error["message"]
