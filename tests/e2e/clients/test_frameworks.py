"""Frameworks and SDKs that use the server's APIs. Each runs in an environment of its own, once for all of its cases.

`make test-clients` creates the environment; without it these tests are not collected.
"""

from typing import Any

import pytest

from tests.e2e.clients.content import BROKEN, KEY, MODEL, SQUARE, Shape
from tests.e2e.clients.environment import HAS_NODE, Settings, report
from tests.e2e.serving import Served

QUESTION = "what is shown?"
ANSWER_TOKENS = 8

_ANSWERS = ("answer", "answer_to_url", "stream")
_ERRORS = ("broken_image", "wrong_key")
_ALL = (*_ANSWERS, "structured", "tool_call", *_ERRORS)
_AGENT = (*_ANSWERS, "structured", "structured_by_tool", *_ERRORS)
_STRUCTURED = ("structured", "structured_stream", *_ERRORS)

CASES: dict[str, dict[str, tuple[str, ...]]] = {
    "with_langchain.py": {"chat": _ALL, "responses": _ALL, "messages": _ALL},
    "with_litellm.py": {"chat": _ALL, "messages": _ALL},
    "with_instructor.py": {"tools": _STRUCTURED, "schema": _STRUCTURED},
    "with_pydantic_ai.py": {"chat": _AGENT, "responses": _AGENT, "messages": _AGENT},
    **({"with_ai_sdk.mjs": {"compatible": _ALL, "chat": _ALL, "responses": _ALL, "messages": _ALL}} if HAS_NODE else {}),
}
"""The cases of each script, by the API or mode that the client is set to."""


def for_clients(*cases: str) -> pytest.MarkDecorator:
    """Runs a test with the results of these cases, of every client that has them."""
    chosen = [
        (script, f"{api}.{case}")
        for script, apis in CASES.items()
        for api, own_cases in apis.items()
        for case in own_cases
        if case in cases
    ]
    names = [f"{script.partition('.')[0].removeprefix('with_')}-{name}" for script, name in chosen]
    return pytest.mark.parametrize("result", chosen, ids=names, indirect=True)


@pytest.fixture(scope="session")
def settings(private: Served, images_url: str) -> Settings:
    return Settings(
        url=private.url,
        key=KEY,
        model=MODEL,
        question=QUESTION,
        answer_tokens=ANSWER_TOKENS,
        image=SQUARE["image_url"]["url"],
        image_url=f"{images_url}/square.png",
        broken_image=BROKEN["image_url"]["url"],
    )


@pytest.fixture(scope="session")
def reports() -> dict[str, dict[str, Any]]:
    """The results of each script that has run."""
    return {}


@pytest.fixture
def result(request: pytest.FixtureRequest, reports: dict[str, dict[str, Any]], settings: Settings) -> Any:
    """The result of one case of one client; its script runs with the first of its cases."""
    script, case = request.param
    if script not in reports:
        reports[script] = report(script, settings)
    result = reports[script][case]
    assert "traceback" not in result, result["traceback"]
    return result


@pytest.fixture(scope="session")
def expected(private: Served) -> dict[str, Any]:
    """The choice and the usage of the same chat without a client library."""
    answer = private.post(
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": [SQUARE, {"type": "text", "text": QUESTION}]}],
            "max_tokens": ANSWER_TOKENS,
            "temperature": 0,
        },
        Authorization=f"Bearer {KEY}",
    ).json
    usage = answer["usage"]
    return {
        "text": answer["choices"][0]["message"]["content"],
        "input_tokens": usage["prompt_tokens"],
        "output_tokens": usage["completion_tokens"],
    }


@for_clients("answer")
def test_an_answer_and_its_usage(result: Any, expected: dict[str, Any]) -> None:
    assert result["text"] == expected["text"]
    assert {name: result["usage"][name] for name in ("input_tokens", "output_tokens")} == {
        name: expected[name] for name in ("input_tokens", "output_tokens")
    }


@for_clients("answer_to_url")
def test_an_image_by_url_has_the_answer_of_its_bytes(result: Any, expected: dict[str, Any]) -> None:
    assert result["text"] == expected["text"]


@for_clients("stream")
def test_the_pieces_of_a_stream_are_the_answer(result: Any, expected: dict[str, Any]) -> None:
    assert len(result["pieces"]) > 1
    assert "".join(result["pieces"]) == expected["text"]
    assert result["usage"]["output_tokens"] == expected["output_tokens"]


@for_clients("structured", "structured_stream", "structured_by_tool")
def test_a_structured_answer_is_parsed(result: Any) -> None:
    Shape.model_validate(result, strict=True)


@for_clients("tool_call")
def test_a_tool_call_is_parsed(result: Any) -> None:
    assert result["name"] == "Shape"
    Shape.model_validate(result["arguments"], strict=True)


@for_clients("broken_image")
def test_an_image_that_is_not_one_is_a_bad_request(result: Any) -> None:
    print(result)
    assert result["status"] == 400


@for_clients("wrong_key")
def test_a_wrong_key_is_rejected(result: Any) -> None:
    print(result)
    assert result["status"] == 401
