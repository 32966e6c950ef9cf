"""Metrics: the times of a streamed response, and which requests are recorded."""

import pytest

from server.metrics import Metrics, StreamTimer
from server.request_stats import RequestStats

ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
TOKEN = b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'
FINISH = b'data: {"choices":[{"index":0,"delta":{"content":""},"finish_reason":"stop"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n'
DONE = b"data: [DONE]\n\n"


def count_observations(*pieces: bytes) -> tuple[float, float]:
    """Return the numbers of observed first tokens and of observed gaps between tokens."""
    metrics = Metrics()
    timer = StreamTimer(metrics, RequestStats("a"))
    for piece in pieces:
        timer.record(piece)
    counts = (metrics.registry.get_sample_value(f"dvd_{name}_seconds_count") for name in TIMES)
    first_tokens, gaps = (value or 0 for value in counts)
    return first_tokens, gaps


TIMES = ("time_to_first_token", "inter_token")


@pytest.mark.parametrize(
    "event",
    [
        b'{"delta": {"content": "a"}}', b'{"delta":{"reasoning":"a"}}', b'{"delta":{"reasoning_content":"a"}}',
        b'{"choices":[{"index":0,"text":" a","logprobs":null}]}', b'{"delta":{"tool_calls":[{"index":0}]}}',
        b'{"delta":{"content":"\\""}}', b'{"delta":{"content":"\xc3\xa9"},"logprobs":{"content":[{"token":"x"}]}}',
    ],
)  # fmt: skip
def test_events_with_content_are_timed(event: bytes) -> None:
    assert count_observations(b"data: " + event + b"\n\n") == (1, 0)


@pytest.mark.parametrize("event", [ROLE, FINISH, USAGE, DONE, b": ping\n\n", b"", b'data: {"delta":{"tool_calls":[]}}\n\n'])
def test_events_without_content_are_not_timed(event: bytes) -> None:
    assert count_observations(event) == (0, 0)


def test_field_names_inside_strings_are_not_content() -> None:
    assert count_observations(rb'data: {"delta":{"role":"x"},"note":"\"content\":\"a\""}' + b"\n\n") == (0, 0)


def test_gaps_are_measured_between_events_that_arrive_separately() -> None:
    assert count_observations(ROLE, TOKEN, TOKEN, TOKEN, FINISH, USAGE, DONE) == (1, 2)
    assert count_observations(ROLE + TOKEN + TOKEN, TOKEN + FINISH + DONE) == (1, 2)


def test_observed_times_are_the_differences_of_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, times = Metrics(), iter([100.0, 103.0, 103.5])
    timer = StreamTimer(metrics, RequestStats("a", arrived=98.0))
    monkeypatch.setattr("server.metrics.time.monotonic", lambda: next(times))
    timer.record(TOKEN)
    timer.record(TOKEN + TOKEN)
    sums = [metrics.registry.get_sample_value(f"dvd_{name}_seconds_sum") for name in TIMES]
    assert sums == [2.0, 3.5]


def test_only_successful_generating_requests_have_a_duration() -> None:
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
