import asyncio

import pytest

from benchmarks import load
from tests.benchmarks.fake_server import FakeServer


def bodies(number: int) -> list[bytes]:
    return [load.chat_body("m", str(i)) for i in range(number)]


async def test_a_closed_loop_keeps_the_number_of_requests_in_flight() -> None:
    server = FakeServer()
    async with server.running() as url:
        timings = await load.run_closed_loop(url, bodies(20), 4)
        assert server.max_in_flight == 4
        assert [len(timing.token_times) for timing in timings] == [2] * 20
        assert all(t.started_at < t.token_times[0] < t.token_times[1] <= t.ended_at for t in timings)


async def test_requests_that_outlast_the_saturated_window_are_cancelled() -> None:
    server = FakeServer(hangs_from=17)  # the last three of twenty
    async with server.running() as url:
        async with asyncio.timeout(20):
            assert await load.saturated_rate(url, bodies(20), 4) > 0
        assert server.max_in_flight == 4
        assert server.completed == 17
        while server.in_flight:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("token_times", "ended_at", "share"),
    [
        ([11, 12, 13, 14, 15], 15, 1.0),
        ([9, 11, 12, 13, 14], 15, 0.5),
        ([6, 7, 8, 11, 12], 15, 0.25),
        ([17, 18, 19], 0, 0.75),
        ([17, 18, 21], 0, 0.625),
        ([15], 15, 1.0),
        ([], 0, 0.0),
    ],
    ids=["all", "all but the first", "half", "cancelled", "past the end", "only one", "none"],
)
def test_a_request_counts_with_its_share_in_the_window(token_times: list[float], ended_at: float, share: float) -> None:
    expected_tokens = 1 if token_times == [15] else 5
    assert load._share_in_window(load.RequestTiming(5, token_times, ended_at), expected_tokens, (10, 20)) == share


async def test_too_few_requests_for_saturation_are_rejected() -> None:
    with pytest.raises(ValueError, match="7 requests are too few: expected at least 8 for 4 in flight"):
        await load.saturated_rate("http://127.0.0.1:1", bodies(7), 4)


@pytest.mark.parametrize("run", [load.run_closed_loop, load.saturated_rate])
async def test_a_failed_request_raises_an_error(run: object) -> None:
    server = FakeServer(fails_at=5)
    async with server.running() as url:
        with pytest.raises(RuntimeError, match="503: no worker is available"):
            await run(url, bodies(12), 4)  # type: ignore[operator]


async def test_an_open_loop_sends_all_requests_in_order() -> None:
    server = FakeServer()
    async with server.running() as url:
        timings = await load.run_open_loop(url, bodies(12), 400.0)
    assert [len(timing.token_times) for timing in timings] == [2] * 12
    assert [timing.started_at for timing in timings] == sorted(timing.started_at for timing in timings)
