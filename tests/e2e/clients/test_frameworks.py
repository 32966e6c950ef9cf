"""Frameworks and SDKs that use the server's APIs. Each runs in an environment of its own, once for all of its cases.

`make test-clients` creates the environment; without it these tests are not collected.
"""

from typing import Any

import pytest

from tests.e2e.clients.content import BROKEN, KEY, MODEL, SQUARE, Shape
from tests.e2e.clients.environment import HAS_NODE, report
from tests.e2e.clients.scripts.client_settings import Settings
from tests.e2e.serving import Served

pytestmark = pytest.mark.usefixtures("compact_tool_calls")

QUESTION = "what is shown?"
ANSWER_TOKENS = 8

_ERRORS = ("broken_image", "wrong_key")
_DATA_URLS = ("answer", "stream", "structured", "tool_call", *_ERRORS)
"""Clients that fetch an image by URL themselves, and reject http or the addresses of this machine."""
_ALL = ("answer_to_url", *_DATA_URLS)
_AGENT = ("answer", "answer_to_url", "stream", "structured_by_tool", *_ERRORS)
_NATIVE_AGENT = (*_AGENT, "structured")
_STRUCTURED = ("structured", "structured_stream", *_ERRORS)

CASES: dict[str, dict[str, tuple[str, ...]]] = {
    "with_langchain.py": {"chat": _ALL, "responses": _ALL, "messages": _ALL},
    "with_litellm.py": {"chat": _ALL, "messages": _DATA_URLS},
    "with_instructor.py": {"tools": _STRUCTURED, "schema": _STRUCTURED},
    "with_pydantic_ai.py": {"chat": _NATIVE_AGENT, "responses": _NATIVE_AGENT, "messages": _AGENT},
    **({"with_ai_sdk.mjs": {"compatible": _DATA_URLS, "chat": _ALL, "responses": _ALL, "messages": _ALL}} if HAS_NODE else {}),
}
"""The cases of each script, by the API or mode that the client is set to."""


EXCEPTIONS = {
    "with_langchain.py": {
        "broken_image": "langchain_core.ModelInvalidRequestError",
        "wrong_key": "langchain_core.ModelAuthenticationError",
    },
    "with_litellm.py": {"broken_image": "litellm.BadRequestError", "wrong_key": "litellm.AuthenticationError"},
    "with_instructor.py": dict.fromkeys(_ERRORS, "instructor.InstructorRetryException"),
    "with_pydantic_ai.py": dict.fromkeys(_ERRORS, "pydantic_ai.ModelHTTPError"),
    "with_ai_sdk.mjs": dict.fromkeys(_ERRORS, "AI_APICallError"),
}
"""The class of the exception that each library raises."""


def for_clients(*cases: str) -> pytest.MarkDecorator:
    """Runs a test for these cases of every client that has them, with the script and the case's name in its report."""
    chosen = [
        pytest.param(script, f"{api}.{case}", id=f"{script.partition('.')[0].removeprefix('with_')}-{api}-{case}")
        for script, apis in CASES.items()
        for api, own_cases in apis.items()
        for case in own_cases
        if case in cases
    ]
    return pytest.mark.parametrize(("script", "case"), chosen)


class Reports:
    """The results of scripts. Each script runs once, when its first result is needed."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._reports: dict[str, dict[str, Any]] = {}

    def result(self, script: str, case: str) -> Any:
        """Returns the result of a case. Fails the test if the script or the case failed."""
        if script not in self._reports:
            self._reports[script] = report(script, self._settings)
        result = self._reports[script][case]
        assert "traceback" not in result, result["traceback"]
        return result


@pytest.fixture(scope="session")
def reports(private: Served, images_url: str) -> Reports:
    settings = Settings(
        url=private.url,
        key=KEY,
        model=MODEL,
        question=QUESTION,
        answer_tokens=ANSWER_TOKENS,
        image=SQUARE["image_url"]["url"],
        image_url=f"{images_url}/square.png",
        broken_image=BROKEN["image_url"]["url"],
    )
    return Reports(settings)


@pytest.fixture(scope="session")
def expected(private: Served) -> dict[str, Any]:
    """The text and the usage of the same chat without a client library."""
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
        "usage": {"input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"]},
    }


@for_clients("answer")
def test_an_answer_and_its_usage(reports: Reports, script: str, case: str, expected: dict[str, Any]) -> None:
    result = reports.result(script, case)
    assert result["text"] == expected["text"]
    assert {name: result["usage"][name] for name in expected["usage"]} == expected["usage"]


@for_clients("answer_to_url")
def test_an_image_by_url_has_the_answer_of_its_bytes(
    reports: Reports, script: str, case: str, expected: dict[str, Any]
) -> None:
    assert reports.result(script, case)["text"] == expected["text"]


@for_clients("stream")
def test_the_pieces_of_a_stream_are_the_answer(reports: Reports, script: str, case: str, expected: dict[str, Any]) -> None:
    result = reports.result(script, case)
    assert "".join(result["pieces"]) == expected["text"]
    assert {name: result["usage"][name] for name in expected["usage"]} == expected["usage"]


@for_clients("structured", "structured_stream", "structured_by_tool")
def test_a_structured_answer_is_parsed(reports: Reports, script: str, case: str) -> None:
    Shape.model_validate(reports.result(script, case), strict=True)


@for_clients("tool_call")
def test_a_tool_call_is_parsed(reports: Reports, script: str, case: str) -> None:
    result = reports.result(script, case)
    assert result["name"] == "Shape"
    Shape.model_validate(result["arguments"], strict=True)


@for_clients("broken_image")
def test_bytes_that_are_no_image_are_a_bad_request(reports: Reports, script: str, case: str) -> None:
    error = reports.result(script, case)
    assert error["status"] == 400
    assert EXCEPTIONS[script]["broken_image"] in error["classes"]
    assert "The file (5 bytes) is not an image" in error["message"]


@for_clients("wrong_key")
def test_a_wrong_key_is_rejected(reports: Reports, script: str, case: str) -> None:
    error = reports.result(script, case)
    assert error["status"] == 401
    assert EXCEPTIONS[script]["wrong_key"] in error["classes"]
    assert "invalid API key" in error["message"]
