"""The retry policy: a few attempts within a budget, and only after errors that another attempt may avoid."""

import pytest

from common import errors
from server import retry
from server.metrics import Metrics
from server.retry import MAX_ATTEMPTS, RetryBudget, with_retry


def budget(share: float = 0.2) -> RetryBudget:
    return RetryBudget(share, Metrics())


class Attempts:
    """Fails with these errors in turn, then succeeds. Records whether each attempt was the last one."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.were_last: list[bool] = []

    async def __call__(self, is_last: bool) -> str:
        self.were_last.append(is_last)
        if self.failures:
            raise self.failures.pop(0)
        return "done"


async def test_a_successful_attempt_is_the_only_one() -> None:
    attempts = Attempts()
    assert await with_retry(attempts, lambda _: True, budget()) == "done"
    assert attempts.were_last == [False]


async def test_an_unavailable_worker_is_retried_once() -> None:
    attempts = Attempts(errors.WorkerUnavailable("gone"))
    assert await with_retry(attempts, lambda _: True, budget()) == "done"
    assert attempts.were_last == [False, False]


async def test_a_worker_that_fails_is_retried_once() -> None:
    attempts = Attempts(errors.InternalError("a bug"))
    assert await with_retry(attempts, lambda _: True, budget()) == "done"
    assert attempts.were_last == [False, False]


async def test_the_error_of_the_last_attempt_is_raised() -> None:
    attempts = Attempts(*(errors.WorkerUnavailable(f"attempt {number}") for number in range(1, MAX_ATTEMPTS + 1)))
    with pytest.raises(errors.WorkerUnavailable, match=f"attempt {MAX_ATTEMPTS}"):
        await with_retry(attempts, lambda _: True, budget())
    assert attempts.were_last == [False] * (MAX_ATTEMPTS - 1) + [True]


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidImage("bad"),
        errors.DeadlineExceeded("late"),
        errors.Overloaded("full"),
        ValueError(),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_errors_that_another_attempt_would_repeat_are_not_retried(error: Exception) -> None:
    attempts = Attempts(error)
    with pytest.raises(type(error)):
        await with_retry(attempts, lambda _: True, budget())
    assert attempts.were_last == [False]


async def test_may_retry_can_rule_out_a_retry() -> None:
    attempts = Attempts(errors.SinkFull("no room"))
    with pytest.raises(errors.SinkFull):
        await with_retry(attempts, lambda error: isinstance(error, errors.WorkerUnavailable), budget())
    assert attempts.were_last == [False]


@pytest.fixture
def _no_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_MAX_JITTER_SECONDS", 0.0)


@pytest.mark.usefixtures("_no_jitter")
async def test_retries_are_bounded_to_a_share_of_the_requests() -> None:
    """A fleet in trouble must not get several times its load."""
    metrics = Metrics()
    shared = RetryBudget(0.2, metrics)
    retries = 0
    for _ in range(200):
        attempts = Attempts(errors.WorkerUnavailable("gone"))
        try:
            await with_retry(attempts, lambda _: True, shared)
            retries += 1
        except errors.WorkerUnavailable:
            assert attempts.were_last == [False]
    assert 40 <= retries <= 55, "a fifth, and a reserve of ten"
    assert metrics.registry.get_sample_value("dvd_retries_total", {"outcome": "done"}) == retries
    assert metrics.registry.get_sample_value("dvd_retries_total", {"outcome": "over_budget"}) == 200 - retries


async def test_a_share_of_zero_allows_no_retry() -> None:
    with pytest.raises(errors.WorkerUnavailable):
        await with_retry(Attempts(errors.WorkerUnavailable("gone")), lambda _: True, budget(0))
