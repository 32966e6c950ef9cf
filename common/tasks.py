"""Tasks of an event loop: several at once, and single flight (what is asked for while it is under way is waited for)."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


async def gather_or_cancel(*coroutines: Coroutine[Any, Any, T]) -> list[T]:
    """All results in order; the first error, or the caller's leaving, ends the others."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except ExceptionGroup as group_error:
        raise group_error.exceptions[0] from None
    return [task.result() for task in tasks]


@dataclass(eq=False)
class _Flight(Generic[T]):
    task: "asyncio.Task[T]"
    waiters: int = 0


class SingleFlight(Generic[T]):
    """One task a key. It ends early only when everybody who waits for it has left."""

    def __init__(self) -> None:
        self._flights: dict[str, _Flight[T]] = {}

    def in_flight(self, key: str) -> bool:
        flight = self._flights.get(key)
        return flight is not None and not flight.task.done()  # one that has ended stays listed until the loop comes round

    async def run(self, key: str, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The result of `make()`, shared with everybody who asks for `key` meanwhile; so are its errors."""
        if not self.in_flight(key):
            self._flights[key] = _Flight(asyncio.create_task(make()))
            self._flights[key].task.add_done_callback(lambda task: self._landed(key, task))
        flight = self._flights[key]
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiters -= 1
            if not flight.waiters and not flight.task.done():
                # gone from the list at once: the next who asks must not join a task that is being cancelled
                self._landed(key, flight.task)
                flight.task.cancel()

    def _landed(self, key: str, task: "asyncio.Task[T]") -> None:
        flight = self._flights.get(key)
        if flight is not None and flight.task is task:
            del self._flights[key]
