"""Slow calls are sent twice, within a budget, and the first reply counts."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from server.hedging import Hedging
from server.metrics import Metrics


def hedges(metrics: Metrics) -> float | None:
    return metrics.registry.get_sample_value("dvd_encodes_hedged_total")


def reply(value: str) -> Callable[[], Awaitable[str]]:
    async def call() -> str:
        return value

    return call


async def unused() -> str:
    raise AssertionError("no second call is due")


class Hanging:
    """A call that ends only when it is cancelled."""

    def __init__(self) -> None:
        self.cancelled = False

    async def __call__(self) -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return ""


async def warm(hedging: Hedging) -> None:
    for _ in range(40):
        assert await hedging.run(reply("fast"), unused) == "fast"


async def test_a_slow_call_is_sent_again_and_the_first_one_is_cancelled() -> None:
    metrics, slow = Metrics(), Hanging()
    hedging = Hedging(0.5, metrics)
    await warm(hedging)
    assert await hedging.run(slow, reply("second")) == "second"
    assert slow.cancelled
    assert hedges(metrics) == 1


async def test_a_second_call_that_fails_does_no_harm() -> None:
    hedging, answer = Hedging(0.5, Metrics()), asyncio.Event()

    async def first() -> str:
        await answer.wait()
        return "first"

    async def second() -> str:
        answer.set()
        raise ConnectionError

    await warm(hedging)
    assert await hedging.run(first, second) == "first"


async def test_the_error_of_the_first_call_is_raised() -> None:
    async def first() -> str:
        raise ConnectionError("refused")

    hedging = Hedging(0.5, Metrics())
    await warm(hedging)
    with pytest.raises(ConnectionError, match="refused"):
        await hedging.run(first, unused)


@pytest.mark.parametrize("share", [0.0, 0.01])
async def test_second_calls_are_bounded_to_a_share(share: float) -> None:
    metrics, slow = Metrics(), Hanging()
    hedging = Hedging(share, metrics)
    await warm(hedging)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await hedging.run(slow, unused)
    assert slow.cancelled
    assert hedges(metrics) == 0
