"""How a started language worker stops: it is announced at once, and over when its requests have ended."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from common.probing import NOTICE_SECONDS

log = logging.getLogger("dvd.language")

_POLL_SECONDS = 0.1


class Drain:
    """The end of a language worker.

    `start` begins it, from a signal handler or from an HTTP endpoint. The worker still serves all requests, those that arrive
    later included, until `finished` returns.
    """

    def __init__(self, grace_seconds: float, in_flight: Callable[[], int], announce: Callable[[], None]) -> None:
        """Create a drain that has not started.

        Args:
            grace_seconds: Time that requests have to end.
            in_flight: Returns the number of requests that have not ended.
            announce: Tells gateways to send no more requests; called once.
        """
        self._grace, self._in_flight, self._announce = grace_seconds, in_flight, announce
        self._started, self._cut_short = asyncio.Event(), asyncio.Event()

    @property
    def is_draining(self) -> bool:
        """Whether `start` has been called."""
        return self._started.is_set()

    def start(self, reason: str) -> None:
        """Begin to stop, and return at once. Does nothing the second time.

        Args:
            reason: The cause, for the log, such as the name of a signal.
        """
        if self._started.is_set():
            return
        log.info("%s: stopping after %d requests in flight, within %g s", reason, self._in_flight(), self._grace)
        self._started.set()
        self._announce()

    def cut_short(self) -> None:
        """Let `finished` return at once."""
        self._started.set()
        self._cut_short.set()

    async def finished(self) -> int:
        """Wait until the worker may stop. Returns the number of requests that have not ended."""
        await self._started.wait()
        end = time.monotonic() + self._grace
        notice = time.monotonic() + min(NOTICE_SECONDS, self._grace)
        while not self._cut_short.is_set() and (now := time.monotonic()) < end and (now < notice or self._in_flight()):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._cut_short.wait(), _POLL_SECONDS)
        return self._in_flight()
