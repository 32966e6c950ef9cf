"""A rolling restart: every process of the fleet is restarted, one after the other, in each way that an operator has."""

import asyncio
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence

from benchmarks.soak.fleet import ROOT, Fleet, Member

_BACK_TIMEOUT_SECONDS = 600.0
_SETTLE_SECONDS = 1.0
"""Time for gateways to notice that a worker that had ended answers again."""
_UNLISTED_SECONDS = 14.0
"""Three lookups, 3 s apart, and time for the requests that a worker still has."""

Way = Callable[[Fleet, Member], Awaitable[None]]
Step = tuple[Way, Member]


async def terminate(_fleet: Fleet, member: Member) -> None:
    """Send SIGTERM."""
    member.send(signal.SIGTERM)


async def drain(_fleet: Fleet, member: Member) -> None:
    """Run `dvd drain`. Raises `RuntimeError` if it fails."""
    command = [sys.executable, "-c", "from dvd.cli import main; main()", "drain", member.admin]
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=sys.stderr)
    if status := await process.wait():
        raise RuntimeError(f"dvd drain {member.name} ended with {status}")


async def unlist(fleet: Fleet, member: Member) -> None:
    """Remove a worker from its name, and kill it once it should have no more requests. Then it is listed again."""
    fleet.names.remove(member)
    await asyncio.sleep(_UNLISTED_SECONDS)
    member.send(signal.SIGKILL)
    fleet.names.add(member)


WAYS: dict[str, Way] = {way.__name__: way for way in (terminate, drain, unlist)}


def plan(fleet: Fleet, ways: Sequence[str]) -> list[Step]:
    """Return each member that can go away in each of these ways."""
    members = {"terminate": fleet.members, "drain": [*fleet.workers, *fleet.gateways], "unlist": fleet.workers}
    return [(WAYS[way], member) for way in ways for member in members[way]]


async def restart_all(
    fleet: Fleet, steps: Sequence[Step], pause_seconds: float, record: Callable[[str, float], None]
) -> list[str]:
    """Restart members one after the other; each only when all are up.

    Args:
        fleet: The processes.
        steps: How each member goes away.
        pause_seconds: Time between two steps.
        record: Called with the name and the monotonic time of each step.

    Returns:
        What was wrong, one line each: members that did not end in order.
    """
    problems = []
    for way, member in steps:
        await asyncio.sleep(pause_seconds)
        starts, name = member.starts, f"{way.__name__} {member.name}"
        record(name, time.monotonic())
        await way(fleet, member)
        await _until_back(fleet, member, starts)
        if way is not unlist and member.exit_statuses[-1]:
            problems.append(f"{name}: it ended with {member.exit_statuses[-1]}")
    return problems


async def _until_back(fleet: Fleet, member: Member, starts: int) -> None:
    """Wait until a member runs again and every gateway uses it. Raises `TimeoutError`."""
    async with asyncio.timeout(_BACK_TIMEOUT_SECONDS):
        while member.starts == starts or (member.address and not await asyncio.to_thread(member.is_listening)):
            await asyncio.sleep(0.2)
        await asyncio.sleep(_SETTLE_SECONDS)
        while not await fleet.all_up():
            await asyncio.sleep(0.2)
