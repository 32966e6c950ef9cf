"""The estimate of a worker's speed."""

import pytest

from server.workers.throughput import Throughput


def test_nothing_is_known_before_the_worker_was_saturated() -> None:
    throughput = Throughput()
    for second in range(100):
        throughput.update(second, 50, is_saturated=False)
    assert throughput.per_second is None


def test_only_saturated_time_counts() -> None:
    throughput = Throughput()
    for tenth in range(100):
        throughput.update(tenth / 10, 2, is_saturated=True)
    throughput.update(10.0, 2, is_saturated=False)
    assert throughput.per_second == pytest.approx(20, rel=0.05)
    throughput.update(500.0, 1, is_saturated=False)
    assert throughput.per_second == pytest.approx(20, rel=0.05), "an idle worker is not a slow one"


def test_a_few_units_are_no_estimate() -> None:
    throughput = Throughput()
    throughput.update(0.0, 0, is_saturated=True)
    throughput.update(30.0, 2, is_saturated=True)
    assert throughput.per_second is None


def test_the_estimate_follows_a_change() -> None:
    throughput = Throughput()
    for second in range(60):
        throughput.update(second, 100, is_saturated=True)
    for second in range(60, 200):
        throughput.update(second, 10, is_saturated=True)
    assert throughput.per_second == pytest.approx(10, rel=0.05)
