"""Single flight: who shares, who pays, and who may leave."""

import asyncio

import pytest

from common import errors
from common.tasks import SingleFlight, gather_or_cancel


class Work:
    """Something slow that knows how often it was begun and ended."""

    def __init__(self) -> None:
        self.begun = self.cancelled = 0
        self.free = asyncio.Event()

    async def __call__(self) -> int:
        self.begun += 1
        number = self.begun
        try:
            await self.free.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return number


async def _started(flights: SingleFlight[int], work: Work, count: int, key: str = "k") -> list["asyncio.Task[int]"]:
    tasks = [asyncio.create_task(flights.run(key, work)) for _ in range(count)]
    for _ in range(3):
        await asyncio.sleep(0)
    return tasks


async def test_many_share_one() -> None:
    flights, work = SingleFlight[int](), Work()
    tasks = await _started(flights, work, 50)
    assert flights.in_flight("k")
    work.free.set()
    assert await asyncio.gather(*tasks) == [1] * 50
    assert not flights.in_flight("k")
    assert await flights.run("k", work) == 2, "a flight is no cache"


async def test_other_keys_fly_alone() -> None:
    flights, work = SingleFlight[int](), Work()
    tasks = await _started(flights, work, 1, "a") + await _started(flights, work, 1, "b")
    work.free.set()
    assert sorted(await asyncio.gather(*tasks)) == [1, 2]


@pytest.mark.parametrize("who", [0, 1])
async def test_who_leaves_does_not_end_it_for_the_others(who: int) -> None:
    flights, work = SingleFlight[int](), Work()
    tasks = await _started(flights, work, 2)
    tasks[who].cancel()
    await asyncio.wait([tasks[who]])
    work.free.set()
    assert await tasks[1 - who] == 1
    assert work.cancelled == 0


async def test_the_last_one_to_leave_ends_it() -> None:
    flights, work = SingleFlight[int](), Work()
    tasks = await _started(flights, work, 3)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert not flights.in_flight("k"), "nobody joins what is being cancelled"
    work.free.set()
    assert await flights.run("k", work) == 2
    assert work.cancelled == 1


async def test_an_error_is_everybodys_and_not_kept() -> None:
    flights = SingleFlight[int]()

    async def fail() -> int:
        await asyncio.sleep(0)
        raise errors.InvalidImage("no image")

    results = await asyncio.gather(*(flights.run("k", fail) for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [errors.InvalidImage] * 3
    work = Work()
    work.free.set()
    assert await flights.run("k", work) == 1


async def test_together_is_in_order_and_the_first_error_ends_the_rest() -> None:
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


async def test_a_flight_that_has_just_ended_is_not_joined() -> None:
    flights: SingleFlight[int] = SingleFlight()
    joined: list[bool] = []

    async def first() -> int:
        # runs when this has ended, and before anybody was told so
        asyncio.get_running_loop().call_soon(lambda: joined.append(flights.in_flight("key")))
        return 1

    assert await flights.run("key", first) == 1
    assert joined == [False]
