"""Responses and their callers: streams that own resources, and work that ends when its caller disconnects."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from server.shutdown import Shutdown

T = TypeVar("T")

STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Headers of a stream: no cache may hold it, and nginx passes each event on at once."""


class StreamWithResources(StreamingResponse):
    """A streamed response that releases `resources` after its last byte, also if no byte was sent.

    Args:
        content: The bytes of the stream.
        stop: Makes `content` end soon, with an error; called if the process must end first.
        **options: Options of `StreamingResponse`.
    """

    resources: AsyncExitStack

    def __init__(self, content: AsyncIterator[bytes], stop: Callable[[], None] = lambda: None, **options: Any) -> None:
        super().__init__(content, **options)
        self._stop = stop

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        shutdown: Shutdown = scope["state"]["shutdown"]
        async with self.resources:
            with shutdown.at_end_of_grace(self._stop):
                await super().__call__(scope, receive, send)


async def cancel_on_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`; cancel it if the caller disconnects first, since nothing else watches the connection.

    Raises:
        ClientDisconnect: The caller disconnected.
    """
    working, watching = asyncio.create_task(work), asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
