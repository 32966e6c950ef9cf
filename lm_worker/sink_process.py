"""Starts and ends the sink's process, in the language worker."""

import asyncio
import contextlib
import os
import signal
import sys
from types import TracebackType
from typing import Self

from common.security import TOKEN_VARIABLE
from lm_worker.sink import DRAIN_LINE, SinkOptions

_STOP_SECONDS = 15.0
"""Time that the sink has to end: it finishes its deliveries."""


class SinkProcess:
    """Async context manager: the sink runs inside the block.

    If the sink ends unexpectedly, this process gets SIGTERM: without a sink no image request can be served.
    """

    def __init__(self, options: SinkOptions, token: str | None = None) -> None:
        self._arguments = options.arguments()
        self._environment = {**os.environ, **({TOKEN_VARIABLE: token} if token else {})}

    @property
    def pid(self) -> int:
        """Process id of the sink."""
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """Exit status of the sink; None while it runs, negative if a signal ended it."""
        return self._process.returncode

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, *self._arguments, stdin=asyncio.subprocess.PIPE, env=self._environment
        )
        self._watching = asyncio.create_task(self._stop_this_process_with_the_sink())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._watching
        assert self._process.stdin is not None
        self._process.stdin.close()  # the sink ends when its standard input is closed
        try:
            await asyncio.wait_for(self._process.wait(), _STOP_SECONDS)
        except TimeoutError:  # it hangs or is stopped
            self._process.kill()
            await self._process.wait()

    def drain(self) -> None:
        """Let the sink report from now on that the language worker is draining. Does nothing if the sink has ended."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, RuntimeError):  # uvloop raises RuntimeError once the pipe is closed
            self._process.stdin.write(DRAIN_LINE)

    async def _stop_this_process_with_the_sink(self) -> None:
        status = await self._process.wait()
        print(f"dvd language: the sink ended with exit status {status}; stopping", file=sys.stderr)
        os.kill(os.getpid(), signal.SIGTERM)
