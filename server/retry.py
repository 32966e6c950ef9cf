"""The gateway's only retry policy: a failed attempt may be repeated once, on another worker where there is one."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from common import errors

T = TypeVar("T")

MAX_ATTEMPTS = 2


async def with_retry(
    attempt: Callable[[bool], Awaitable[T]],
    may_retry: Callable[[errors.DvdError], bool],
) -> T:
    """Run `attempt` until it succeeds, at most `MAX_ATTEMPTS` times.

    Args:
        attempt: Called with whether this is the last attempt.
        may_retry: Whether another attempt makes sense after this error. A caller's mistake and a passed deadline never are.

    Raises:
        DvdError: The error of the last attempt.
    """
    for _ in range(MAX_ATTEMPTS - 1):
        try:
            return await attempt(False)
        except (errors.Unavailable, errors.InternalError) as error:
            if not may_retry(error):
                raise
    return await attempt(True)
