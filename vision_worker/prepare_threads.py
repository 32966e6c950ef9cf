"""The threads that decode and tile images, and whose image is next: callers take turns there as they do on the device."""

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from common.fair_queue import FairQueue
from vision_worker.liveness import CpuClock, Progress

T = TypeVar("T")


class PrepareThreads:
    """A pool of threads: `with PrepareThreads(4) as threads: await threads.run(caller, function)`.

    On leaving, images that wait for a thread are dropped.

    Args:
        threads: number of threads.
    """

    def __init__(self, threads: int) -> None:
        self._clock = CpuClock()
        self._executor = ThreadPoolExecutor(threads, "prepare", initializer=self._clock.register)
        self._threads = self._free = threads
        self._queue: FairQueue[asyncio.Future[None]] = FairQueue()
        self._completed = 0

    def __enter__(self) -> "PrepareThreads":
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    @property
    def waiting(self) -> int:
        """Images that wait for a thread."""
        return len(self._queue)

    @property
    def progress(self) -> Progress:
        """Progress of the threads, which count as busy while an image waits for one of them."""
        return Progress(self._free == 0 and self.waiting > 0, self._completed, self._clock.seconds())

    @property
    def is_idle(self) -> bool:
        """Whether no thread runs a function."""
        return self._free == self._threads

    async def run(self, caller: str, function: Callable[[], T], check: Callable[[], None] = lambda: None) -> T:
        """Run `function` in a thread, once it is the caller's turn, and return its result.

        If this task is cancelled while it waits, `function` does not run.

        Args:
            caller: opaque id of the caller.
            function: what to run.
            check: called before, in this task; what it raises is raised instead.
        """
        await self._wait_for_turn(caller)
        try:
            check()
            future = self._executor.submit(function)
        except BaseException:
            self._release()
            raise
        loop = asyncio.get_running_loop()
        # not when this task ends: a cancelled task does not stop its thread
        future.add_done_callback(lambda future: self._release_from_thread(loop, future))
        return await asyncio.wrap_future(future)

    async def _wait_for_turn(self, caller: str) -> None:
        """Take a thread, or wait until one is free and it is the caller's turn."""
        if self._free:
            self._free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._queue.add(turn, caller)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # the thread became free while the task was being cancelled
                self._release()
            raise
        finally:
            self._queue.remove(turn)

    def _release_from_thread(self, loop: asyncio.AbstractEventLoop, _future: "Future[T]") -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
            loop.call_soon_threadsafe(self._complete)

    def _complete(self) -> None:
        self._completed += 1
        self._release()

    def _release(self) -> None:
        """Pass a thread on to the next image, or keep it free."""
        while self._queue:
            turn = self._queue.take()
            if not turn.done():  # done: its task is being cancelled
                turn.set_result(None)
                return
        self._free += 1
        if self.is_idle:
            self._queue.forget()
