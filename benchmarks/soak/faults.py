"""The faults of the soak: processes are killed and stopped, redis fails, workers are ended in order."""

import asyncio
import random
import signal
import time
from collections.abc import Callable

from benchmarks.soak.fleet import Fleet, Member

PAUSE_SECONDS = 8.0
"""Time between the end of a fault and the next one, on average."""


async def kill(member: Member) -> None:
    """End a process without warning."""
    member.send(signal.SIGKILL)


async def terminate(member: Member) -> None:
    """End a process in order."""
    member.send(signal.SIGTERM)


async def freeze(member: Member) -> None:
    """Stop a process for a few seconds: its connections stay open."""
    member.send(signal.SIGSTOP)
    try:
        await asyncio.sleep(6.0)
    finally:
        member.send(signal.SIGCONT)


async def run_faults(fleet: Fleet, seed: int, seconds: float, record: Callable[[str, float], None]) -> None:
    """Cause random faults for a time. A worker is only struck while another one of its kind is up.

    Args:
        fleet: The processes.
        seed: Seed of the choice.
        seconds: Time after which no fault begins any more.
        record: Called with the name and the monotonic time of each fault.
    """
    rng, end = random.Random(seed), time.monotonic() + seconds
    choices = [
        *((action, member) for action in (kill, terminate, freeze) for member in fleet.vision),
        *((action, member) for action in (kill, terminate, freeze) for member in fleet.language),
        (kill, fleet.redis),
        (freeze, fleet.redis),
    ]
    while time.monotonic() < end:
        await asyncio.sleep(rng.uniform(0.5, 1.5) * PAUSE_SECONDS)
        action, member = rng.choice(choices)
        if time.monotonic() >= end or not await _has_substitute(fleet, member):
            continue
        record(f"{action.__name__} {member.name}", time.monotonic())
        await action(member)


async def _has_substitute(fleet: Fleet, member: Member) -> bool:
    up = await fleet.up()
    return all(any(other is not member and other in up for other in kind) for kind in (fleet.vision, fleet.language))
