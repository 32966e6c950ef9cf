"""Single flight and gather_or_cancel."""

import asyncio

import pytest

from common import errors
from common.tasks import SingleFlight, gather_or_cancel


class Work:
    """A slow coroutine function that counts its starts and cancellations."""

    def __init__(self) -> None:
        self.started = self.cancelled = 0
        self.may_end = asyncio.Event()

    async def __call__(self) -> int:
        self.started += 1
        number = self.started
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return number


async def start_callers(single_flight: SingleFlight[int], work: Work, count: int, key: str = "k") -> list["asyncio.Task[int]"]:
    tasks = [asyncio.create_task(single_flight.run(key, work)) for _ in range(count)]
    for _ in range(3):
        await asyncio.sleep(0)
    return tasks


async def test_concurrent_callers_share_one_task() -> None:
    single_flight, work = SingleFlight[int](), Work()
    tasks = await start_callers(single_flight, work, 50)
    assert single_flight.in_flight("k")
    work.may_end.set()
    assert await asyncio.gather(*tasks) == [1] * 50
    assert not single_flight.in_flight("k")
    assert await single_flight.run("k", work) == 2, "results are not cached"


async def test_a_forgotten_task_goes_on_for_its_callers_and_gets_no_new_ones() -> None:
    single_flight, work = SingleFlight[int](), Work()
    first = await start_callers(single_flight, work, 2)
    single_flight.forget("k")
    single_flight.forget("unknown")
    assert not single_flight.in_flight("k")
    second = await start_callers(single_flight, work, 2)
    first[0].cancel()
    work.may_end.set()
    assert await asyncio.gather(first[1], *second) == [1, 2, 2]
    assert not single_flight.in_flight("k")


async def test_keys_are_independent() -> None:
    single_flight, work = SingleFlight[int](), Work()
    tasks = await start_callers(single_flight, work, 1, "a") + await start_callers(single_flight, work, 1, "b")
    work.may_end.set()
    assert sorted(await asyncio.gather(*tasks)) == [1, 2]


@pytest.mark.parametrize("leaver", [0, 1])
async def test_a_cancelled_caller_does_not_cancel_the_others(leaver: int) -> None:
    single_flight, work = SingleFlight[int](), Work()
    tasks = await start_callers(single_flight, work, 2)
    tasks[leaver].cancel()
    await asyncio.wait([tasks[leaver]])
    work.may_end.set()
    assert await tasks[1 - leaver] == 1
    assert work.cancelled == 0


async def test_the_last_cancelled_caller_cancels_the_task() -> None:
    single_flight, work = SingleFlight[int](), Work()
    tasks = await start_callers(single_flight, work, 3)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert not single_flight.in_flight("k"), "no caller may join a task that is being cancelled"
    work.may_end.set()
    assert await single_flight.run("k", work) == 2
    assert work.cancelled == 1


async def test_an_error_is_shared_and_not_cached() -> None:
    single_flight = SingleFlight[int]()

    async def fail() -> int:
        await asyncio.sleep(0)
        raise errors.InvalidImage("no image")

    results = await asyncio.gather(*(single_flight.run("k", fail) for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [errors.InvalidImage] * 3
    work = Work()
    work.may_end.set()
    assert await single_flight.run("k", work) == 1


async def test_gather_returns_in_order_and_cancels_the_rest_on_an_error() -> None:
    async def after(seconds: float, value: int) -> int:
        await asyncio.sleep(seconds)
        return value

    assert await gather_or_cancel(after(0.01, 1), after(0, 2)) == [1, 2]
    slow, ended = Work(), asyncio.Event()

    async def watched() -> int:
        try:
            return await slow()
        finally:
            ended.set()

    async def failing() -> int:
        raise errors.InvalidRequest("no")

    with pytest.raises(errors.InvalidRequest, match="no"):
        await gather_or_cancel(watched(), failing())
    assert ended.is_set()
    assert await gather_or_cancel() == []


async def test_a_task_that_has_just_ended_is_not_in_flight() -> None:
    single_flight: SingleFlight[int] = SingleFlight()
    in_flight: list[bool] = []

    async def first() -> int:
        # runs after this coroutine has ended and before the callbacks of its task
        asyncio.get_running_loop().call_soon(lambda: in_flight.append(single_flight.in_flight("key")))
        return 1

    assert await single_flight.run("key", first) == 1
    assert in_flight == [False]
