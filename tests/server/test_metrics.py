"""What the gateway counts of a streamed answer."""

import pytest

from server.metrics import Metrics, StreamTimer
from server.request_stats import RequestStats

ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
TOKEN = b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'
LAST = b'data: {"choices":[{"index":0,"delta":{"content":""},"finish_reason":"stop"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n'
DONE = b"data: [DONE]\n\n"


def heard(*pieces: bytes) -> tuple[float, float]:
    """First tokens and gaps that were counted."""
    metrics = Metrics()
    listener = StreamTimer(metrics, RequestStats("a"))
    for piece in pieces:
        listener.record(piece)
    counted = (metrics.registry.get_sample_value(f"dvd_{name}_seconds_count") for name in NAMES)
    first, between = (value or 0 for value in counted)
    return first, between


NAMES = ("time_to_first_token", "inter_token")


@pytest.mark.parametrize(
    "said",
    [
        b'{"delta": {"content": "a"}}', b'{"delta":{"reasoning":"a"}}', b'{"delta":{"reasoning_content":"a"}}',
        b'{"choices":[{"index":0,"text":" a","logprobs":null}]}', b'{"delta":{"tool_calls":[{"index":0}]}}',
        b'{"delta":{"content":"\\""}}', b'{"delta":{"content":"\xc3\xa9"},"logprobs":{"content":[{"token":"x"}]}}',
    ],
)  # fmt: skip
def test_events_with_content(said: bytes) -> None:
    assert heard(b"data: " + said + b"\n\n") == (1, 0)


@pytest.mark.parametrize("said", [ROLE, LAST, USAGE, DONE, b": ping\n\n", b"", b'data: {"delta":{"tool_calls":[]}}\n\n'])
def test_events_without(said: bytes) -> None:
    assert heard(said) == (0, 0)


def test_a_word_in_the_answer_is_no_field_of_an_event() -> None:
    assert heard(rb'data: {"delta":{"role":"x"},"note":"\"content\":\"a\""}' + b"\n\n") == (0, 0)


def test_gaps_are_between_events_however_they_come() -> None:
    assert heard(ROLE, TOKEN, TOKEN, TOKEN, LAST, USAGE, DONE) == (1, 2)
    assert heard(ROLE + TOKEN + TOKEN, TOKEN + LAST + DONE) == (1, 2)


def test_a_gap_is_as_long_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, times = Metrics(), iter([100.0, 103.0, 103.5])
    listener = StreamTimer(metrics, RequestStats("a", arrived=98.0))
    monkeypatch.setattr("server.metrics.time.monotonic", lambda: next(times))
    listener.record(TOKEN)
    listener.record(TOKEN + TOKEN)
    sums = [metrics.registry.get_sample_value(f"dvd_{name}_seconds_sum") for name in NAMES]
    assert sums == [2.0, 3.5]


def test_only_good_answers_of_the_model_are_timed_whole() -> None:
    metrics = Metrics()
    for route, status, error in (
        ("/v1/chat/completions", 200, None), ("/v1/chat/completions", 400, "invalid_request"),
        ("/v1/chat/completions", 200, "client_gone"), ("/metrics", 200, None),
    ):  # fmt: skip
        stats = RequestStats("a", error_code=error, generates_text=route != "/metrics")
        metrics.record_request(stats, route, status)
    value = metrics.registry.get_sample_value
    assert value("dvd_request_seconds_count", {"route": "/v1/chat/completions"}) == 1
    assert value("dvd_request_seconds_count", {"route": "/metrics"}) is None
    assert value("dvd_errors_total", {"code": "client_gone"}) == 1
