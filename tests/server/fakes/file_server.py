"""An HTTP server of image and video files on a private address."""

import contextlib
import socket
from collections.abc import AsyncIterator

from aiohttp import web

from tests.server.fakes.handlers import Handler


@contextlib.asynccontextmanager
async def file_server(**handlers: Handler) -> AsyncIterator[str]:
    """Serves each handler at the path of its name, and yields the server's URL."""
    app = web.Application()
    for name, handler in handlers.items():
        app.router.add_get(f"/{name}", handler)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.05)
    await runner.setup()
    listening = socket.create_server(("127.0.0.1", 0))
    await web.SockSite(runner, listening).start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        await runner.cleanup()
