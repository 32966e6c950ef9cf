"""The threads that decode and tile images, and whose image is next: callers take turns there as they do on the device."""

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from common.decoder_processes import ABANDON_SECONDS, Call
from common.fair_queue import FairQueue
from vision_worker.liveness import CpuClock, Progress

T = TypeVar("T")

SLOW_CPU_SECONDS = 1.0
"""CPU time after which an image is slow, and the next one gets its turn: its file is hostile, or has many megapixels."""

_SLOW_CHECK_SECONDS = 0.25


@dataclass(eq=False)
class _Running:
    """An image that has a thread: the call to its decoder, and the timer that finds out whether it is slow."""

    call: Call
    is_slow: bool = False
    timer: asyncio.TimerHandle | None = None


class PrepareThreads:
    """A pool of threads: `with PrepareThreads(4) as threads: await threads.run(caller, function)`.

    An image that is slow gives up its turn, so that others need not wait: as many may be slow as have turns.
    On leaving, images that wait for a thread are dropped.

    Args:
        threads: number of threads.
        cpu_seconds: returns the CPU time of the processes that decode for them.
        on_thread_start: called first in each thread.
    """

    def __init__(
        self,
        threads: int,
        cpu_seconds: Callable[[], float] = lambda: 0.0,
        on_thread_start: Callable[[], None] = lambda: None,
    ) -> None:
        self._clock, self._cpu_seconds = CpuClock(), cpu_seconds
        self._executor = ThreadPoolExecutor(2 * threads, "prepare", self._clock.register, (on_thread_start,))
        self._threads = self._free = threads
        self._slow = 0
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
        return Progress(self._free == 0 and self.waiting > 0, self._completed, self._clock.seconds() + self._cpu_seconds())

    @property
    def is_idle(self) -> bool:
        """Whether no thread runs a function."""
        return self._free == self._threads and not self._slow

    async def run(
        self, caller: str, function: Callable[[Call], T], check: Callable[[], None] = lambda: None, request: str = ""
    ) -> T:
        """Run `function` in a thread, once it is the caller's turn, and return its result.

        If this task is cancelled while it waits, `function` does not run. If it is cancelled later, the call to the decoder is
        abandoned.

        Args:
            caller: opaque id of the caller.
            function: what to run, with the `Call` for its decoder.
            check: called before, in this task; what it raises is raised instead.
            request: id of the request, all images of which have one turn together; empty: it has this image only.
        """
        await self._wait_for_turn(caller, request)
        running = _Running(Call())
        try:
            check()
            future = self._executor.submit(function, running.call)
        except BaseException:
            self._release()
            raise
        loop = asyncio.get_running_loop()
        self._watch(running, loop)
        # not when this task ends: a cancelled task does not stop its thread
        future.add_done_callback(lambda _: self._release_from_thread(loop, running))
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            loop.call_later(ABANDON_SECONDS, running.call.abandon)
            raise

    async def _wait_for_turn(self, caller: str, request: str) -> None:
        """Take a thread, or wait until one is free and it is the caller's turn."""
        if self._free:
            self._free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._queue.add(turn, caller, group=request or None)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # the thread became free while the task was being cancelled
                self._release()
            raise
        finally:
            self._queue.remove(turn)

    def _watch(self, running: _Running, loop: asyncio.AbstractEventLoop) -> None:
        """Look again and again whether an image is slow, until it is, or has ended."""
        running.timer = loop.call_later(_SLOW_CHECK_SECONDS, self._check_speed, running, loop)

    def _check_speed(self, running: _Running, loop: asyncio.AbstractEventLoop) -> None:
        if self._slow == self._threads or running.call.cpu_seconds() < SLOW_CPU_SECONDS:
            self._watch(running, loop)
            return
        running.is_slow = True
        self._slow += 1
        self._release()

    def _release_from_thread(self, loop: asyncio.AbstractEventLoop, running: _Running) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
            loop.call_soon_threadsafe(self._complete, running)

    def _complete(self, running: _Running) -> None:
        self._completed += 1
        if running.timer is not None:
            running.timer.cancel()
        if running.is_slow:
            self._slow -= 1
        else:
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
