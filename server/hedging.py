"""Hedging: a call that takes longer than nearly all others is also sent to a second worker, and the first reply counts."""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeVar

from server.metrics import Metrics

T = TypeVar("T")

_REMEMBERED = 200
"""Durations of calls that are remembered."""
_LEAST_REMEMBERED = 20
_QUANTILE = 0.95
_MAX_BALANCE = 10.0


class Hedging:
    """Sends slow calls twice, within a budget.

    Args:
        share: Second calls for each call; 0: none.
        metrics: Counts the second calls.
    """

    def __init__(self, share: float, metrics: Metrics) -> None:
        self._share, self._metrics = share, metrics
        self._balance = 0.0
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)

    async def run(self, first: Callable[[], Awaitable[T]], second: Callable[[], Awaitable[T]]) -> T:
        """Return the reply of `first`, or of `second` if it starts after the usual time and is faster.

        Raises:
            Exception: What `first` raised; a failed second call does no harm.
        """
        self._balance = min(self._balance + self._share, _MAX_BALANCE)
        started = time.monotonic()
        delay = self._delay()
        reply = await (first() if delay is None else self._race(first, second, delay))
        self._seconds.append(time.monotonic() - started)
        return reply

    def _delay(self) -> float | None:
        """Return the seconds after which a call is sent again; None if it is not."""
        if not self._share or len(self._seconds) < _LEAST_REMEMBERED:
            return None
        return sorted(self._seconds)[int(_QUANTILE * len(self._seconds))]

    async def _race(self, first: Callable[[], Awaitable[T]], second: Callable[[], Awaitable[T]], delay: float) -> T:
        tasks = [asyncio.ensure_future(first())]
        try:
            await asyncio.wait(tasks, timeout=delay)
            if not tasks[0].done() and self._balance >= 1:
                self._balance -= 1
                self._metrics.hedges.inc()
                tasks.append(asyncio.ensure_future(second()))
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if tasks[1].done() and not tasks[1].cancelled() and tasks[1].exception() is None and not tasks[0].done():
                    return tasks[1].result()
            return await tasks[0]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
