"""Waiting for a condition that another process or task brings about."""

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

TIMEOUT_SECONDS = 60.0
"""After this time a test gives up waiting. Only a failing test reaches it."""


async def wait_until(condition: Callable[[], Any], description: str, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
    """Polls until `condition()` is true.

    Args:
        condition: A function or a coroutine function.
        description: What is waited for; the message of the failure names it.
        timeout_seconds: Time until the wait fails.

    Raises:
        AssertionError: The condition did not become true in time.
    """
    try:
        async with asyncio.timeout(timeout_seconds):
            while not await _evaluate(condition):  # the other side sets no event of ours
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"timed out after {timeout_seconds:g} s: {description}") from None


async def _evaluate(condition: Callable[[], Any]) -> Any:
    result = condition()
    return await result if inspect.isawaitable(result) else result
