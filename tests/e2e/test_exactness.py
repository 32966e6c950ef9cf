"""Answers through HTTP to image files equal those of the official implementation, token by token."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.conftest import Golden
from tests.e2e.serving import GOLDEN, SYSTEM, Served, image_part, text_part

NAMES = ("flash-qwen3", "vit300m-qwen2", "vit6b-llama")
CASES = {name: json.loads((GOLDEN / name / "cases.json").read_text()) for name in NAMES}


def messages(name: str, case: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns a conversation as the official code builds it: the system message, and images before the question."""
    template = json.loads((GOLDEN / name / "checkpoint/config.json").read_text())["template"]
    parts = []
    for number, image in enumerate(case["images"], 1):
        parts += [text_part(f"Image-{number}: ")] if len(case["images"]) > 1 else []
        parts.append(image_part(image))
    return [
        {"role": "system", "content": SYSTEM[template]},
        {"role": "user", "content": [*parts, text_part(case["question"])]},
    ]


def ask(served: Served, name: str, case: dict[str, Any]) -> tuple[int, list[int]]:
    """Returns the number of prompt tokens and the greedy token ids of one case."""
    body = {"messages": messages(name, case), "max_tokens": 16, "temperature": 0}
    answer = served.post("/v1/chat/completions", {**body, "ignore_eos": True, "return_token_ids": True})
    assert answer.status == 200, answer.text
    return answer.json["usage"]["prompt_tokens"], answer.json["choices"][0]["token_ids"]


@pytest.mark.parametrize(
    ("name", "number"), [pytest.param(name, i, id=f"{name}-{i}") for name in NAMES for i in range(len(CASES[name]))]
)
def test_an_answer_equals_the_official_one(golden: Golden, name: str, number: int) -> None:
    case = CASES[name][number]
    assert ask(golden[name], name, case) == (case["num_prompt_tokens"], case["greedy_token_ids"])


@pytest.mark.parametrize("name", NAMES)
def test_concurrent_answers_are_the_same(golden: Golden, name: str) -> None:
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda case: ask(golden[name], name, case), CASES[name]))
    assert answers == [(case["num_prompt_tokens"], case["greedy_token_ids"]) for case in CASES[name]]


@pytest.mark.parametrize("number", [2, 4, 11])
def test_a_streamed_answer_is_the_same(golden: Golden, number: int) -> None:
    case = CASES["flash-qwen3"][number]
    body = {"messages": messages("flash-qwen3", case), "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    answer = golden.flash.post("/v1/chat/completions", {**body, "stream": True, "return_token_ids": True})
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    chunks = [json.loads(event) for event in events]
    ids = [token for chunk in chunks for choice in chunk["choices"] for token in choice.get("token_ids") or []]
    assert ids == case["greedy_token_ids"]


@pytest.mark.parametrize("number", [2, 4])
def test_the_response_header_reports_the_routers_decision(golden: Golden, number: int) -> None:
    case = CASES["flash-qwen3"][number]
    answer = golden.flash.chat(*[image_part(image) for image in case["images"]], case["question"])
    report = dict(part.split("=") for part in answer.headers["x-dvd-images"].replace(" ", "").split(";"))
    assert int(report["tiles"]) == sum(case["num_tiles"])
    assert int(report["compressed"]) == sum(map(sum, case["compressed"]))
    assert int(report["tokens"]) == sum(case["visual_tokens"])
