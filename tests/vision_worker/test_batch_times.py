"""Estimates from measured batches."""

import pytest

from vision_worker import batch_times
from vision_worker.batch_times import BatchTimes


def test_the_estimate_follows_full_batches() -> None:
    times = BatchTimes(4)
    assert times.seconds_per_tile is None
    times.record(4, 2.0)
    assert times.seconds_per_tile == 0.5
    for _ in range(30):
        times.record(4, 4.0)
    assert times.seconds_per_tile == pytest.approx(1.0, rel=0.01)


def test_a_small_batch_only_lowers_the_estimate() -> None:
    times = BatchTimes(4)
    times.record(1, 9.0)
    assert times.seconds_per_tile is None, "a full batch may take as long"
    times.record(4, 2.0)
    times.record(1, 9.0)
    assert times.seconds_per_tile == 0.5
    times.record(1, 0.1)
    assert times.seconds_per_tile == 0.1


def test_an_old_estimate_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    times = BatchTimes(1)
    times.record(1, 100.0)
    monkeypatch.setattr(batch_times, "_VALID_SECONDS", 0.0)
    assert times.seconds_per_tile is None
    monkeypatch.undo()
    times = BatchTimes(1)
    times.record(1, 1.0)
    assert times.seconds_per_tile == 1.0


def test_the_longest_batch_of_late_is_remembered_and_fades() -> None:
    times = BatchTimes(4)
    times.record(4, 10.0)
    times.record(1, 1.0)
    assert times.seconds_per_batch == 9.0
    for _ in range(50):
        times.record(1, 1.0)
    assert times.seconds_per_batch == 1.0
