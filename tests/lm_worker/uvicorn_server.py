"""A real HTTP server inside a test."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import uvicorn


@contextlib.asynccontextmanager
async def running(config: uvicorn.Config) -> AsyncIterator[int]:
    """Serve inside the block. Yields the port, which may have been chosen by the system."""
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await serving
