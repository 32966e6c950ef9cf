"""Helpers for asyncio tasks: run several at once, and share one between concurrent callers (single flight)."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


async def gather_or_cancel(*coroutines: Coroutine[Any, Any, T]) -> list[T]:
    """Run coroutines concurrently and return their results in order.

    The first error cancels the others and is raised directly, not in an exception group. Cancelling the caller cancels all.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except ExceptionGroup as group_error:
        raise group_error.exceptions[0] from None
    return [task.result() for task in tasks]


@dataclass(eq=False)
class _SharedTask(Generic[T]):
    task: "asyncio.Task[T]"
    waiters: int = 0


class SingleFlight(Generic[T]):
    """Runs at most one task per key at a time. Concurrent callers with the same key share its result or its error.

    Cancelling a caller cancels the task only if no other caller waits for it.
    """

    def __init__(self) -> None:
        self._tasks: dict[str, _SharedTask[T]] = {}

    def in_flight(self, key: str) -> bool:
        """Return whether a task with this key is running."""
        shared = self._tasks.get(key)
        # a task that has ended stays registered until the event loop runs its callback
        return shared is not None and not shared.task.done()

    async def run(self, key: str, start: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return the result of the running task with this key, or else of a new task of `start()`."""
        if not self.in_flight(key):
            self._tasks[key] = _SharedTask(asyncio.create_task(start()))
            self._tasks[key].task.add_done_callback(lambda task: self._remove(key, task))
        shared = self._tasks[key]
        shared.waiters += 1
        try:
            return await asyncio.shield(shared.task)
        finally:
            shared.waiters -= 1
            if not shared.waiters and not shared.task.done():
                # removed at once: the next caller must not join a task that is being cancelled
                self._remove(key, shared.task)
                shared.task.cancel()

    def forget(self, key: str) -> None:
        """Let the next caller with this key start a task of its own. The running one goes on for those that wait for it."""
        self._tasks.pop(key, None)

    def _remove(self, key: str, task: "asyncio.Task[T]") -> None:
        """Remove the task unless a newer one has its key."""
        shared = self._tasks.get(key)
        if shared is not None and shared.task is task:
            del self._tasks[key]
