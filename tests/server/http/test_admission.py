"""The limits of concurrent requests, and of the memory of their bodies."""

from contextlib import ExitStack

import pytest

from common import errors
from server.http.admission import Admission
from server.metrics import Metrics


def value(metrics: Metrics, name: str) -> float | None:
    return metrics.registry.get_sample_value(name)


def in_flight(metrics: Metrics) -> float | None:
    return value(metrics, "dvd_requests_in_flight")


def test_permits_are_limited_and_counted() -> None:
    metrics = Metrics()
    admission = Admission(2, 100, metrics)
    with ExitStack() as permits:
        for _ in range(2):
            permits.enter_context(admission.permits("a"))
        assert in_flight(metrics) == 2
        with pytest.raises(errors.Overloaded, match=r"at capacity \(2 concurrent requests, ") as error_info:
            permits.enter_context(admission.permits("a"))
        assert error_info.value.retry_after == 1
        assert in_flight(metrics) == 2
        assert value(metrics, "dvd_requests_refused_total") is None
        assert metrics.registry.get_sample_value("dvd_requests_refused_total", {"resource": "requests"}) == 1
    assert in_flight(metrics) == 0


def test_a_permit_is_released_after_an_error() -> None:
    metrics = Metrics()
    admission = Admission(1, 100, metrics)
    with pytest.raises(ValueError, match="failed"), admission.permits("a"):
        raise ValueError("failed")
    assert in_flight(metrics) == 0
    with admission.permits("a"):
        assert in_flight(metrics) == 1


def test_requests_with_images_do_not_take_the_permits_of_text() -> None:
    metrics = Metrics()
    admission = Admission(2, 100, metrics)
    with ExitStack() as permits:
        for _ in range(2):
            permits.enter_context(admission.permits("a", has_images=True))
        with pytest.raises(errors.Overloaded, match=r"at capacity \(2 concurrent requests with images, "):
            permits.enter_context(admission.permits("a", has_images=True))
        for _ in range(2):
            admission.check_any_left()
            permits.enter_context(admission.permits("a"))
        with pytest.raises(errors.Overloaded, match=r"2 concurrent requests, "):
            permits.enter_context(admission.permits("a"))
        with pytest.raises(errors.Overloaded, match=r"2 concurrent requests, "):
            admission.check_any_left()
    assert in_flight(metrics) == 0


def test_a_request_takes_a_permit_for_each_sequence() -> None:
    metrics = Metrics()
    admission = Admission(10, 100, metrics, is_shared=False)
    with admission.permits("a", 7):
        assert in_flight(metrics) == 7
        with pytest.raises(errors.Overloaded), admission.permits("b", 4):
            pass
        with admission.permits("b", 3):
            assert in_flight(metrics) == 10
    with admission.permits("a", 1000):
        assert in_flight(metrics) == 10, "one that exceeds the limit is admitted alone"
    assert in_flight(metrics) == 0


def test_a_caller_cannot_take_the_last_permits() -> None:
    admission = Admission(16, 100, Metrics())
    with ExitStack() as permits:
        for _ in range(14):
            permits.enter_context(admission.permits("greedy"))
        with pytest.raises(errors.Overloaded):
            permits.enter_context(admission.permits("greedy"))
        permits.enter_context(admission.permits("other"))
        permits.enter_context(admission.permits("another"))
        with pytest.raises(errors.Overloaded):
            permits.enter_context(admission.permits("late"))
    with ExitStack() as permits:  # it is not held against the caller later
        for _ in range(14):
            permits.enter_context(admission.permits("greedy"))


def test_the_only_caller_of_a_server_may_take_all_permits() -> None:
    admission = Admission(16, 100, Metrics(), is_shared=False)
    with ExitStack() as permits:
        for _ in range(16):
            permits.enter_context(admission.permits("a"))


def test_bodies_share_a_memory_and_one_alone_is_always_admitted() -> None:
    metrics = Metrics()
    admission = Admission(5, 100, metrics)
    with admission.body_memory() as first, admission.body_memory() as second:
        first.add(500)
        assert value(metrics, "dvd_request_body_bytes") == 500
        with pytest.raises(errors.Overloaded, match="100 bytes of request bodies"):
            second.add(1)
        first.release()
        second.add(100)
        with pytest.raises(errors.Overloaded):
            first.add(1)
    assert value(metrics, "dvd_request_body_bytes") == 0
    with admission.body_memory() as third:
        third.add(100)


def test_a_body_alone_is_admitted_however_many_pieces_it_comes_in() -> None:
    """With `--workers`, the share of a process may be smaller than the largest body."""
    admission = Admission(2, 100, Metrics())
    with admission.body_memory() as only:
        for _ in range(5):
            only.add(60)
        with admission.body_memory() as other, pytest.raises(errors.Overloaded):
            other.add(1)
        assert only.size == 300
