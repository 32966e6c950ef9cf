"""The gateway's only retry policy: a failed attempt may be repeated on another worker, within a budget."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from common import errors
from server.metrics import Metrics

T = TypeVar("T")

MAX_ATTEMPTS = 3
_MAX_JITTER_SECONDS = 0.05
"""Retries of many requests that fail at once are spread over this time."""
_RESERVE = 10.0
"""Retries that are always left while there is little traffic."""
_MAX_BALANCE = 100.0


class RetryBudget:
    """Bounds retries to a share of the requests, so that a fleet in trouble does not get several times its load.

    Args:
        share: Retries for each request.
        metrics: Counts the retries, and those that the budget refuses.
    """

    def __init__(self, share: float, metrics: Metrics) -> None:
        self._share, self._metrics = share, metrics
        self._balance = _RESERVE

    def deposit(self) -> None:
        """Record a request."""
        self._balance = min(self._balance + self._share, _MAX_BALANCE)

    def withdraw(self) -> bool:
        """Return whether one more retry is within the budget, and count it."""
        allowed = self._share > 0 and self._balance >= 1
        self._balance -= allowed
        self._metrics.retries.labels("done" if allowed else "over_budget").inc()
        return allowed


async def with_retry(
    attempt: Callable[[bool], Awaitable[T]],
    may_retry: Callable[[errors.DvdError], bool],
    budget: RetryBudget,
) -> T:
    """Run `attempt` until it succeeds, at most `MAX_ATTEMPTS` times.

    Args:
        attempt: Called with whether this is the last attempt.
        may_retry: Whether another attempt makes sense after this error. A caller's mistake and a passed deadline never are.
        budget: Must allow each attempt but the first.

    Raises:
        DvdError: The error of the last attempt.
    """
    budget.deposit()
    for _ in range(MAX_ATTEMPTS - 1):
        try:
            return await attempt(False)
        except (errors.Unavailable, errors.InternalError) as error:
            if not may_retry(error) or not budget.withdraw():
                raise
        await asyncio.sleep(random.uniform(0, _MAX_JITTER_SECONDS))
    return await attempt(True)
