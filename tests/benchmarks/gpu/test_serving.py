import pytest

from benchmarks.gpu.kit import Skipped
from benchmarks.gpu.serving import summarize
from benchmarks.load import RequestTiming


def timing(started_at: float, *tokens: float) -> RequestTiming:
    return RequestTiming(started_at, list(tokens), tokens[-1])


def test_requests_count_by_what_came_in_the_span() -> None:
    before_and_inside = timing(8.0, 9.0, 9.5, 10.5)  # one of two tokens after the first
    inside = timing(10.0, 11.0, 11.1, 11.2)
    after = timing(19.0, 20.5, 20.6, 20.7)
    assert summarize([before_and_inside, inside, after], 10.0, 20.0) == {
        "requests/s": round((0.25 + 1.0) / 10, 2), "median TTFT, ms": 1000.0, "median ITL, ms": 100.0, "p99 ITL, ms": 1000.0,
    }  # fmt: skip


def test_a_span_without_tokens_is_skipped() -> None:
    with pytest.raises(Skipped, match="no token"):
        summarize([timing(0.0, 1.0, 2.0)], 10.0, 20.0)
