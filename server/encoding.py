"""The Encode calls of a request that has been forwarded already: vLLM prefills what is ready while the rest is encoded."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Encoding(Generic[T]):
    """Work that goes on beside a block of code. Start it with `supervise`, which does not leave it behind."""

    def __init__(self, work: Coroutine[Any, Any, T]) -> None:
        self._task = asyncio.create_task(work)

    @asynccontextmanager
    async def supervise(self) -> AsyncIterator[None]:
        """End the block with the error of the work as soon as that fails; cancel the work when the block ends first."""
        block = asyncio.timeout(None)
        is_open = True

        def end_block(task: "asyncio.Task[T]") -> None:
            if is_open and not task.cancelled() and task.exception() is not None:
                block.reschedule(0)

        self._task.add_done_callback(end_block)
        try:
            async with block:
                yield
        except TimeoutError:
            error = self._task.exception() if block.expired() else None
            if error is None:
                raise
            raise error from None
        finally:
            is_open = False
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def result(self) -> T:
        """Return the result of the work. Must be called in the block of `supervise`, which raises the error of the work."""
        await asyncio.wait({self._task})
        if self._task.cancelled() or self._task.exception() is not None:
            await asyncio.Event().wait()
        return self._task.result()
