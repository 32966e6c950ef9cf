"""The sink's process, as its language worker starts and ends it."""

import asyncio
import contextlib
import os
import signal
import sys
from types import TracebackType
from typing import Self

from lm_worker.sink import SinkOptions


class SinkProcess:
    """Async context manager: the sink runs inside the block.

    If the sink ends by itself, this process gets SIGTERM: without a sink no image request can be served.
    """

    def __init__(self, options: SinkOptions) -> None:
        self._arguments = options.arguments()
        self._process: asyncio.subprocess.Process | None = None
        self._watching: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(sys.executable, *self._arguments, stdin=asyncio.subprocess.PIPE)
        self._watching = asyncio.create_task(_stop_with(self._process))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._watching is not None
        self._watching.cancel()
        self._process.stdin.close()  # which ends it
        with contextlib.suppress(asyncio.CancelledError):
            await self._watching
        await self._process.wait()


async def _stop_with(process: asyncio.subprocess.Process) -> None:
    code = await process.wait()
    print(f"dvd language: the sink ended with exit status {code}; stopping", file=sys.stderr)
    os.kill(os.getpid(), signal.SIGTERM)
