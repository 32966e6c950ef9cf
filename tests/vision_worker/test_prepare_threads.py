"""The threads that decode: whose image is next, and what is not run."""

import asyncio
import functools
import threading
from collections.abc import Callable

import pytest

from common import errors
from common.decoder_processes import Call
from vision_worker.prepare_threads import PrepareThreads


class Work:
    """Functions that record their name and wait while `open` is clear."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.open = threading.Event()

    def named(self, name: str) -> Callable[[Call], str]:
        return functools.partial(self._run, name)

    def _run(self, name: str, _: Call) -> str:
        self.started.append(name)
        assert self.open.wait(60)
        return name


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


async def test_the_backlog_of_one_caller_does_not_delay_another() -> None:
    work = Work()
    with PrepareThreads(1) as threads:
        calls = [asyncio.create_task(threads.run("A", work.named(f"a{i}"))) for i in range(10)]
        await until(lambda: threads.waiting == 9)
        calls += [asyncio.create_task(threads.run("B", work.named(f"b{i}"))) for i in range(2)]
        await until(lambda: threads.waiting == 11)
        work.open.set()
        assert await asyncio.gather(*calls) == [f"a{i}" for i in range(10)] + ["b0", "b1"]
        assert {"b0", "b1"} <= set(work.started[:6])
        assert [name for name in work.started if name[0] == "a"] == [f"a{i}" for i in range(10)]
        await until(lambda: threads.is_idle)


async def test_all_threads_are_used_and_none_is_lost_by_errors_and_cancellations() -> None:
    work = Work()

    def fail(_: Call) -> None:
        raise errors.InvalidImage("not an image")

    with PrepareThreads(3) as threads:
        running = [asyncio.create_task(threads.run("A", work.named(f"a{i}"))) for i in range(5)]
        await until(lambda: len(work.started) == 3 and threads.waiting == 2)
        running[0].cancel()  # its thread goes on
        running[3].cancel()  # it waits
        await until(lambda: threads.waiting == 1)
        assert len(work.started) == 3, "the thread of a cancelled task is not free"
        work.open.set()
        results = await asyncio.gather(*running, return_exceptions=True)
        assert [isinstance(result, asyncio.CancelledError) for result in results] == [True, False, False, True, False]
        with pytest.raises(errors.InvalidImage):
            await threads.run("A", fail)
        await until(lambda: threads.is_idle)
        assert "a3" not in work.started
        assert await asyncio.gather(*(threads.run("A", work.named(f"z{i}")) for i in range(9))) == [f"z{i}" for i in range(9)]


async def test_a_task_that_is_cancelled_when_its_turn_comes_passes_the_thread_on() -> None:
    work = Work()
    with PrepareThreads(1) as threads:
        calls = [asyncio.create_task(threads.run("A", work.named(name))) for name in "abc"]
        await until(lambda: threads.waiting == 2)
        # the release and the cancellation in the same turn of the event loop, in both orders
        threads._release()
        calls[1].cancel()
        work.open.set()
        await asyncio.gather(*calls, return_exceptions=True)
        assert work.started == ["a", "c"]


async def test_a_check_that_fails_frees_the_thread() -> None:
    work = Work()
    work.open.set()

    def check() -> None:
        raise errors.DeadlineExceeded("too late")

    with PrepareThreads(1) as threads:
        for _ in range(3):
            with pytest.raises(errors.DeadlineExceeded):
                await threads.run("A", work.named("a"), check)
        assert await threads.run("A", work.named("b")) == "b"
        assert work.started == ["b"]


async def test_an_image_that_is_slow_gives_up_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there are threads; more than that keep theirs."""
    monkeypatch.setattr("vision_worker.prepare_threads._SLOW_CHECK_SECONDS", 0.01)
    slow = {"s0", "s1", "s2", "s3", "s4"}
    work, calls = Work(), dict[Call, str]()
    monkeypatch.setattr(Call, "cpu_seconds", lambda call: 2.0 if calls.get(call) in slow else 0.0)

    def run(name: str, call: Call) -> str:
        calls[call] = name
        return work.named(name)(call)

    with PrepareThreads(2) as threads:
        tasks = [asyncio.create_task(threads.run("A", functools.partial(run, f"s{i}"))) for i in range(5)]
        await until(lambda: len(work.started) == 4)
        assert not threads.is_idle
        for _ in range(20):
            await asyncio.sleep(0.01)
        assert threads.waiting == 1
        work.open.set()
        assert set(await asyncio.gather(*tasks)) == slow
        await until(lambda: threads.is_idle)
        assert await threads.run("A", functools.partial(run, "z")) == "z"
        await until(lambda: threads.is_idle)


async def test_a_task_that_is_cancelled_abandons_its_call() -> None:
    work, calls = Work(), list[Call]()

    def run(call: Call) -> str:
        calls.append(call)
        return work.named("a")(call)

    with PrepareThreads(1) as threads:
        task = asyncio.create_task(threads.run("A", run))
        await until(lambda: bool(work.started))
        task.cancel()
        await until(lambda: calls[0].is_abandoned)
        work.open.set()
        await until(lambda: threads.is_idle)


async def test_threads_are_busy_while_an_image_waits() -> None:
    work = Work()
    with PrepareThreads(1) as threads:
        first = asyncio.create_task(threads.run("A", work.named("a")))
        await until(lambda: work.started == ["a"])
        assert not threads.progress.busy
        second = asyncio.create_task(threads.run("A", work.named("b")))
        await until(lambda: threads.waiting == 1)
        assert threads.progress.busy
        work.open.set()
        await asyncio.gather(first, second)
        await until(lambda: threads.progress.completed == 2)
        assert threads.progress.cpu_seconds > 0
