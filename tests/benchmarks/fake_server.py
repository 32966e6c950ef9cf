"""A chat server whose answers are short and may fail or hang."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count

from aiohttp import web


class FakeServer:
    """Answers each request with two tokens. Requests from number `hangs_from` on never end; number `fails_at` gets 503."""

    def __init__(self, fails_at: int = -1, hangs_from: int = 10**6) -> None:
        self.fails_at, self.hangs_from = fails_at, hangs_from
        self.in_flight = self.max_in_flight = self.completed = 0
        self._numbers = count()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        number = next(self._numbers)
        if number == self.fails_at:
            return web.Response(status=503, text="no worker is available")
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            response = web.StreamResponse()
            await response.prepare(request)
            for _ in range(2):
                await asyncio.sleep(0.002)
                await response.write(b'data: {"choices": [{"delta": {"content": "x"}}]}\n\n')
            if number >= self.hangs_from:
                await asyncio.sleep(3600)
            self.completed += 1
            return response
        finally:
            self.in_flight -= 1

    async def models(self, _request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake-model"}]})

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self.answer)
        app.router.add_get("/v1/models", self.models)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            host, port = runner.addresses[0][:2]
            yield f"http://{host}:{port}"
        finally:
            await runner.cleanup()
