import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count

import pytest
from aiohttp import web

from benchmarks import load


class Server:
    """Answers each request with two tokens; from the `hangs_from`th on it never ends, the `fails_at`th it refuses."""

    def __init__(self, fails_at: int = -1, hangs_from: int = 10**6) -> None:
        self.fails_at, self.hangs_from = fails_at, hangs_from
        self.at_once = self.most = self.ended = 0
        self._numbers = count()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        number = next(self._numbers)
        if number == self.fails_at:
            return web.Response(status=503, text="no worker is there")
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            said = web.StreamResponse()
            await said.prepare(request)
            for _ in range(2):
                await asyncio.sleep(0.002)
                await said.write(b'data: {"choices": [{"delta": {"content": "x"}}]}\n\n')
            if number >= self.hangs_from:
                await asyncio.sleep(3600)
            self.ended += 1
            return said
        finally:
            self.at_once -= 1

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self.answer)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            host, port = runner.addresses[0][:2]
            yield f"http://{host}:{port}"
        finally:
            await runner.cleanup()


def bodies(number: int) -> list[bytes]:
    return [load.chat("m", str(i)) for i in range(number)]


async def test_as_many_are_in_flight_as_are_asked_for() -> None:
    server = Server()
    async with server.running() as url:
        done = await load.closed(url, bodies(20), 4)
        assert server.most == 4
        assert [len(felt.tokens) for felt in done] == [2] * 20
        assert all(felt.began < felt.tokens[0] < felt.tokens[1] <= felt.ended for felt in done)


async def test_what_still_runs_when_none_waits_is_broken_off() -> None:
    server = Server(hangs_from=17)  # the last three of twenty
    async with server.running() as url:
        async with asyncio.timeout(20):
            assert await load.saturated(url, bodies(20), 4) > 0
        assert server.most == 4
        assert server.ended == 17
        while server.at_once:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("tokens", "ended", "share"),
    [
        ([11, 12, 13, 14, 15], 15, 1.0),
        ([9, 11, 12, 13, 14], 15, 0.5),
        ([6, 7, 8, 11, 12], 15, 0.25),
        ([17, 18, 19], 0, 0.75),
        ([17, 18, 21], 0, 0.625),
        ([15], 15, 1.0),
        ([], 0, 0.0),
    ],
    ids=["all", "all but the first", "half", "broken off", "past the end", "only one", "none"],
)
def test_of_a_request_what_falls_into_the_time_counts(tokens: list[float], ended: float, share: float) -> None:
    asked = 1 if tokens == [15] else 5
    assert load._within(load.Felt(5, tokens, ended), asked, (10, 20)) == share


async def test_too_few_to_saturate_anything_are_refused() -> None:
    with pytest.raises(ValueError, match="7 requests, 4 of them at once"):
        await load.saturated("http://127.0.0.1:1", bodies(7), 4)


@pytest.mark.parametrize("many", [load.closed, load.saturated])
async def test_a_request_that_fails_is_no_throughput(many: object) -> None:
    server = Server(fails_at=5)
    async with server.running() as url:
        with pytest.raises(RuntimeError, match="503: no worker is there"):
            await many(url, bodies(12), 4)  # type: ignore[operator]


async def test_a_load_is_offered_whatever_the_server_does() -> None:
    server = Server()
    async with server.running() as url:
        done = await load.offered(url, bodies(12), 400.0)
    assert [len(felt.tokens) for felt in done] == [2] * 12
    assert [felt.began for felt in done] == sorted(felt.began for felt in done)
