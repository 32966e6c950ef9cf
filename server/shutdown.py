"""How far this process is on its way to its end: what the server decides, and what requests must know of it."""

import contextlib
from collections.abc import Callable, Iterator

from common import errors


class Shutdown:
    """State of one process: serving, draining, or past its grace. It is used in the event loop only."""

    def __init__(self) -> None:
        self.is_draining = False
        self._grace_has_ended = False
        self._callbacks: set[Callable[[], None]] = set()

    def start_draining(self) -> None:
        """Let running requests end. From now on this process is not ready."""
        self.is_draining = True

    def end_grace(self) -> None:
        """End what is still running with an error."""
        self.is_draining = self._grace_has_ended = True
        for callback in list(self._callbacks):
            callback()

    @contextlib.contextmanager
    def at_end_of_grace(self, callback: Callable[[], None]) -> Iterator[None]:
        """Call `callback` if the grace ends during the block, or at once if it has ended."""
        if self._grace_has_ended:
            callback()
        self._callbacks.add(callback)
        try:
            yield
        finally:
            self._callbacks.remove(callback)


def shutting_down() -> errors.Unavailable:
    """Return the error of a request or stream that the end of the process cuts off."""
    return errors.Unavailable("The gateway is shutting down; retry.", retry_after=1)
