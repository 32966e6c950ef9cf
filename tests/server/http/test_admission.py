"""The limit of concurrent requests."""

from contextlib import ExitStack

import pytest

from common import errors
from server.http.admission import Admission
from server.metrics import Metrics


def in_flight(metrics: Metrics) -> float | None:
    return metrics.registry.get_sample_value("dvd_requests_in_flight")


def test_permits_are_limited_and_counted() -> None:
    metrics = Metrics()
    admission = Admission(2, metrics)
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
    admission = Admission(1, metrics)
    with pytest.raises(ValueError, match="failed"), admission.permit():
        raise ValueError("failed")
    assert in_flight(metrics) == 0
    with admission.permit():
        assert in_flight(metrics) == 1
