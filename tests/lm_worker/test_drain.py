"""When a language worker that has been asked to stop may do so."""

import asyncio

import pytest

from lm_worker.drain import Drain


class Worker:
    """Requests in flight, and how often the drain was announced."""

    def __init__(self) -> None:
        self.in_flight = self.announced = 0

    def drain(self, grace_seconds: float) -> Drain:
        return Drain(grace_seconds, lambda: self.in_flight, self.announce)

    def announce(self) -> None:
        self.announced += 1


async def test_it_waits_for_requests_also_for_those_that_arrive_later() -> None:
    worker = Worker()
    drain = worker.drain(600)
    worker.in_flight = 1
    drain.start("SIGTERM")
    finished = asyncio.create_task(drain.finished())
    await asyncio.wait([finished], timeout=3)  # longer than gateways need to notice
    assert not finished.done()
    worker.in_flight = 2
    await asyncio.wait([finished], timeout=0.5)
    assert not finished.done()
    worker.in_flight = 0
    assert await asyncio.wait_for(finished, 30) == 0


async def test_an_idle_worker_serves_until_gateways_have_noticed() -> None:
    drain = Worker().drain(600)
    started = asyncio.get_running_loop().time()
    drain.start("SIGTERM")
    assert await asyncio.wait_for(drain.finished(), 30) == 0
    assert asyncio.get_running_loop().time() - started >= 2.5


@pytest.mark.parametrize(("grace", "in_flight"), [(0.3, 3), (0, 1)])
async def test_requests_that_outlast_the_grace_period_are_counted(grace: float, in_flight: int) -> None:
    """Without a grace period it stops at once."""
    worker = Worker()
    worker.in_flight = in_flight
    drain = worker.drain(grace)
    drain.start("SIGTERM")
    assert await asyncio.wait_for(drain.finished(), 30) == in_flight


async def test_it_is_announced_once_and_at_once() -> None:
    worker = Worker()
    drain = worker.drain(600)
    assert not drain.is_draining
    drain.start("SIGTERM")
    drain.start("SIGINT")
    assert (drain.is_draining, worker.announced) == (True, 1)


async def test_it_can_be_cut_short() -> None:
    worker = Worker()
    worker.in_flight = 1
    drain = worker.drain(600)
    drain.start("SIGTERM")
    finished = asyncio.create_task(drain.finished())
    await asyncio.wait([finished], timeout=0.3)
    drain.cut_short()
    assert await asyncio.wait_for(finished, 30) == 1


async def test_nothing_stops_before_it_starts() -> None:
    finished = asyncio.create_task(Worker().drain(0).finished())
    await asyncio.wait([finished], timeout=0.3)
    assert not finished.done()
    finished.cancel()
