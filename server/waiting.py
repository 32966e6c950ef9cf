"""Waiting for several things at once, sharing what is waited for, and ceasing when nobody waits any more."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from wire import errors

T = TypeVar("T")


async def together(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order. The first failure is raised and the rest is cancelled."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


class Deadline:
    """When a request's time is up, on the running loop's clock."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.at = asyncio.get_running_loop().time() + seconds

    def left(self) -> float:
        """Seconds; never below zero."""
        return max(0.0, self.at - asyncio.get_running_loop().time())

    def error(self) -> errors.DeadlineExceeded:
        return errors.DeadlineExceeded(f"the request was not done in {self.seconds:g} seconds")

    @contextlib.asynccontextmanager
    async def holds(self) -> Any:
        """Raise `DeadlineExceeded` when time is up inside. Never around a `yield` of a generator."""
        try:
            async with asyncio.timeout_at(self.at) as limit:
                yield
        except TimeoutError:
            if limit.expired():
                raise self.error() from None
            raise


@dataclass
class _Flight(Generic[T]):
    task: asyncio.Task[T]
    passengers: int = 0


class Flights(Generic[T]):
    """Single flight: equal keys at one time are one piece of work. The last who leaves cancels it, nobody else does."""

    def __init__(self) -> None:
        self._flights: dict[Hashable, _Flight[T]] = {}

    def __len__(self) -> int:
        return len(self._flights)

    async def join(self, key: Hashable, start: Callable[[], Coroutine[Any, Any, T]], deadline: Deadline) -> tuple[T, bool]:
        """The result, and whether this caller's own `start` gave it."""
        while True:
            own = key not in self._flights
            flight = self._flights[key] if not own else self._depart(key, start())
            flight.passengers += 1
            try:
                return await asyncio.shield(flight.task), own
            except errors.DeadlineExceeded:
                # it flew with the first caller's deadline; who has more time than that tries again
                if own or deadline.left() <= 0:
                    raise
            finally:
                flight.passengers -= 1
                if flight.passengers == 0 and not flight.task.done():
                    self._land(key, flight)
                    flight.task.cancel()

    def _depart(self, key: Hashable, work: Coroutine[Any, Any, T]) -> _Flight[T]:
        flight = self._flights[key] = _Flight(asyncio.create_task(work))
        flight.task.add_done_callback(lambda _: self._land(key, flight))
        return flight

    def _land(self, key: Hashable, flight: _Flight[T]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        if flight.task.done() and not flight.task.cancelled():
            flight.task.exception()  # marks it as seen: everybody may have left


async def first_of(work: Coroutine[Any, Any, T], gone: Callable[[], Awaitable[None]]) -> T | None:
    """The result of `work`, or None where `gone` comes first; `work` is then cancelled and has ended."""
    doing, leaving = asyncio.create_task(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((doing, leaving), return_when=asyncio.FIRST_COMPLETED)
        return doing.result() if doing.done() else None
    finally:
        for task in (doing, leaving):
            task.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)
