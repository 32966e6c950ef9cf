"""Detects threads that hang: a worker whose device makes no progress must not count as ready.

Being slow is not hanging. The sign of a hang is that a thread has work and uses no CPU time: however many processes compete
for the CPU, a thread that computes gets some of it, and one that waits for a GPU polls. A time limit for a batch covers waits
that use CPU time for ever. docs/decisions/0030-turns-of-callers.md has the reasons.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

log = logging.getLogger("dvd.vision")

CHECK_SECONDS = 0.5
IDLE_CPU_SECONDS = 3.0
"""Time without CPU time after which work on the device counts as stalled."""

PREPARE_IDLE_CPU_SECONDS = 10.0
"""The same for the threads that decode: longer, because one call cannot block the device there."""

SELF_TEST_SECONDS = 5.0
"""Idle time before a self-test of the device, at least: see `_SELF_TEST_SHARE`."""

_SELF_TEST_SHARE = 0.01
"""Maximum share of an idle device's time that self-tests take: a request that arrives meanwhile waits for their tile."""

_MIN_CPU_SECONDS = 0.001
"""CPU time below this is none: a thread that waits may still wake up now and then."""


class CpuClock:
    """CPU time of some threads. `register` runs in each of them, for example as the initializer of their pool."""

    def __init__(self) -> None:
        self._clocks: list[int] = []

    def register(self, on_thread_start: Callable[[], None] = lambda: None) -> None:
        """Add the calling thread, and call `on_thread_start` in it."""
        self._clocks.append(time.pthread_getcpuclockid(threading.get_ident()))
        on_thread_start()

    def seconds(self) -> float:
        """Return the CPU time of the threads so far, in seconds. Threads that have ended count no longer."""
        total = 0.0
        for clock in self._clocks:
            with contextlib.suppress(OSError):
                total += time.clock_gettime(clock)
        return total


@dataclass(frozen=True)
class Progress:
    """What some threads have done so far.

    Attributes:
        busy: whether they have work.
        completed: pieces of work that they have completed.
        cpu_seconds: CPU time that they have used.
    """

    busy: bool
    completed: int
    cpu_seconds: float


class Watch:
    """Decides whether some threads make progress, from samples at short intervals.

    Args:
        what: the work, for the reason: "a batch on cpu".
        sample: returns the progress so far.
        idle_cpu_seconds: a piece of work is stalled after this time without CPU time.
        time_limit: returns the seconds that a piece of work may take in all.
    """

    def __init__(
        self, what: str, sample: Callable[[], Progress], idle_cpu_seconds: float, time_limit: Callable[[], float]
    ) -> None:
        self._what, self._sample = what, sample
        self._idle_cpu_seconds, self._time_limit = idle_cpu_seconds, time_limit
        self._mark = Progress(False, 0, 0.0)
        self._working = self._without_cpu = 0.0
        self.idle_seconds = 0.0
        """Time without work, up to the last check."""

    def check(self, elapsed: float) -> str:
        """Take a sample, `elapsed` seconds after the last one. Returns: why there is no progress; empty if there is."""
        now, mark = self._sample(), self._mark
        self.idle_seconds = 0.0 if now.busy or mark.busy or now.completed != mark.completed else self.idle_seconds + elapsed
        if not (now.busy and mark.busy and now.completed == mark.completed):
            self._working = self._without_cpu = 0.0
            self._mark = now
            return ""
        self._working += elapsed
        self._without_cpu += elapsed
        if now.cpu_seconds - mark.cpu_seconds >= _MIN_CPU_SECONDS:
            self._without_cpu = 0.0
            self._mark = now
        return self._reason()

    def _reason(self) -> str:
        if self._without_cpu >= self._idle_cpu_seconds:
            return f"{self._what} has used no CPU time for more than {self._idle_cpu_seconds:g} s"
        if self._working >= (limit := self._time_limit()):
            return f"{self._what} has taken longer than {limit:.0f} s (--progress-timeout)"
        return ""


class Liveness:
    """Watches the threads of a worker: `async with Liveness([device_watch, prepare_watch], self_test) as liveness`.

    Args:
        device: watch of the device's thread.
        others: further watches.
        self_test: gives an idle device a piece of work, and returns once it is done.

    Attributes:
        stalled: why the worker makes no progress; empty while it does.
    """

    def __init__(self, device: Watch, others: list[Watch], self_test: Callable[[], Awaitable[None]]) -> None:
        self._device, self._watches, self._self_test = device, [device, *others], self_test
        self._self_test_task: asyncio.Task[None] | None = None
        self._self_test_interval = SELF_TEST_SECONDS
        self._stalls, self._stalled_since = 0, 0.0
        self.stalled = ""

    async def __aenter__(self) -> "Liveness":
        self._loop_task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in (self._loop_task, self._self_test_task):
            if task is not None:
                task.cancel()

    async def _run(self) -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            now = time.monotonic()
            # capped: while this process was suspended, no thread could make progress
            self._check(min(now - last, 2 * CHECK_SECONDS))
            last = now

    def _check(self, elapsed: float) -> None:
        reasons = [watch.check(elapsed) for watch in self._watches]
        self._report(next(filter(None, reasons), ""))
        if self._device.idle_seconds >= self._self_test_interval and (not self._self_test_task or self._self_test_task.done()):
            self._self_test_task = asyncio.create_task(self._test())

    def _report(self, reason: str) -> None:
        if reason and not self.stalled:
            self._stalled_since = time.monotonic()
            self._stalls += 1
            log.error("stalled: %s", reason)
        elif self.stalled and not reason:
            log.warning("progress again, after %.1f s", time.monotonic() - self._stalled_since)
        self.stalled = reason

    async def _test(self) -> None:
        started, stalls = time.monotonic(), self._stalls
        await self._self_test()
        # a test that hung took longer than the device computed
        seconds = time.monotonic() - started if stalls == self._stalls else 0.0
        self._self_test_interval = max(SELF_TEST_SECONDS, seconds / _SELF_TEST_SHARE)
