"""The retry policy: at most two attempts, and only after errors that another attempt may avoid."""

import pytest

from common import errors
from server.retry import MAX_ATTEMPTS, with_retry


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
    assert await with_retry(attempts, lambda _: True) == "done"
    assert attempts.were_last == [False]


async def test_an_unavailable_worker_is_retried_once() -> None:
    attempts = Attempts(errors.WorkerUnavailable("gone"))
    assert await with_retry(attempts, lambda _: True) == "done"
    assert attempts.were_last == [False, True]


async def test_a_worker_that_fails_is_retried_once() -> None:
    attempts = Attempts(errors.InternalError("a bug"))
    assert await with_retry(attempts, lambda _: True) == "done"
    assert attempts.were_last == [False, True]


async def test_the_error_of_the_last_attempt_is_raised() -> None:
    attempts = Attempts(*(errors.WorkerUnavailable(f"attempt {number}") for number in range(1, MAX_ATTEMPTS + 1)))
    with pytest.raises(errors.WorkerUnavailable, match=f"attempt {MAX_ATTEMPTS}"):
        await with_retry(attempts, lambda _: True)
    assert len(attempts.were_last) == MAX_ATTEMPTS


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
        await with_retry(attempts, lambda _: True)
    assert attempts.were_last == [False]


async def test_may_retry_can_rule_out_a_retry() -> None:
    attempts = Attempts(errors.SinkFull("no room"))
    with pytest.raises(errors.SinkFull):
        await with_retry(attempts, lambda error: isinstance(error, errors.WorkerUnavailable))
    assert attempts.were_last == [False]
