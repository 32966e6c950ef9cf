"""The limits of concurrent requests, and of the memory of their bodies."""

from contextlib import ExitStack

import pytest

from common import errors
from server.http.admission import Admission
from server.metrics import Metrics


def in_flight(metrics: Metrics) -> float | None:
    return metrics.registry.get_sample_value("dvd_requests_in_flight")


def test_permits_are_limited_and_counted() -> None:
    metrics = Metrics()
    admission = Admission(2, 100, metrics)
    with ExitStack() as permits:
        for _ in range(2):
            permits.enter_context(admission.permit())
        assert in_flight(metrics) == 2
        with pytest.raises(errors.Overloaded, match=r"at capacity \(2 concurrent requests\)") as error_info:
            permits.enter_context(admission.permit())
        assert error_info.value.retry_after == 1
        assert in_flight(metrics) == 2
    assert in_flight(metrics) == 0


def test_a_permit_is_released_after_an_error() -> None:
    metrics = Metrics()
    admission = Admission(1, 100, metrics)
    with pytest.raises(ValueError, match="failed"), admission.permit():
        raise ValueError("failed")
    assert in_flight(metrics) == 0
    with admission.permit():
        assert in_flight(metrics) == 1


def test_requests_with_images_do_not_take_the_permits_of_text() -> None:
    metrics = Metrics()
    admission = Admission(2, 100, metrics)
    with ExitStack() as permits:
        for _ in range(2):
            permits.enter_context(admission.permit()).set_has_images()
        text = permits.enter_context(admission.permit())
        with pytest.raises(errors.Overloaded, match=r"at capacity \(2 concurrent requests with images\)"):
            text.set_has_images()
        assert in_flight(metrics) == 3, "the request that was refused holds its permit until it ends"
        permits.enter_context(admission.permit())
        with pytest.raises(errors.Overloaded, match=r"2 concurrent requests\)"):
            permits.enter_context(admission.permit())
    assert in_flight(metrics) == 0
    with ExitStack() as permits:
        for _ in range(2):
            permits.enter_context(admission.permit()).set_has_images()


def test_bodies_share_a_memory_and_one_alone_is_always_admitted() -> None:
    admission = Admission(5, 100, Metrics())
    with admission.permit() as first, admission.permit() as second:
        first.add_bytes(500)
        with pytest.raises(errors.Overloaded, match="100 bytes of request bodies"):
            second.add_bytes(1)
        first.release_bytes()
        second.add_bytes(100)
        with pytest.raises(errors.Overloaded):
            first.add_bytes(1)
    with admission.permit() as third:
        third.add_bytes(100)
