"""Workers found by name: `dns:NAME:PORT` stands for one worker at each address the name has.

The name is asked for again and again, in the event loop's resolver, so that workers may come and go while the gateway runs.
"""

import asyncio
import logging
import re
import socket
from collections.abc import Awaitable, Callable, Collection

log = logging.getLogger(__name__)

RESOLVE_EVERY = 3.0
"""Seconds between two questions for one name."""

Resolve = Callable[[str, int], Awaitable[Collection[str]]]
"""A name and a port to addresses, `HOST:PORT` each. Raises `OSError` (as `socket.gaierror`) where it cannot say."""

Tell = Callable[[Collection[str]], Awaitable[object]]

_NAME = re.compile(r"dns:(.+):(\d+)")
_NOBODY = frozenset({socket.EAI_NONAME, socket.EAI_NODATA})
"""The resolver's answers that are no failure: there is no such name, or it has no address."""


def named(address: str) -> tuple[str, int] | None:
    """Name and port of `dns:NAME:PORT`; None for an address that is one already."""
    found = _NAME.fullmatch(address)
    return (found[1], int(found[2])) if found else None


async def resolve(name: str, port: int) -> list[str]:
    """Every address of a name, IPv6 in brackets, from the system's resolver: hosts file, DNS. Raises `socket.gaierror`."""
    loop = asyncio.get_running_loop()
    # ADDRCONFIG: no IPv6 addresses on a machine that has no IPv6, where nobody could ever answer at them
    found = await loop.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    return sorted({_joined(family, place[0], port) for family, _, _, _, place in found})


def _joined(family: int, host: str | int, port: int) -> str:
    return f"[{host}]:{port}" if family == socket.AF_INET6 else f"{host}:{port}"


async def watch(address: str, resolve: Resolve, tell: Tell) -> None:
    """Tell what `dns:NAME:PORT` stands for, every `RESOLVE_EVERY` seconds, until cancelled.

    A resolver that fails is passed over and complained of once, until it answers again: what was told last stays true. One
    question at a time, without a limit of its own: a lookup cannot be called back, and a second one would only queue behind.
    """
    place = named(address)
    assert place is not None
    complained = False
    while True:
        try:
            found: Collection[str] | None = await resolve(*place)
        except (OSError, UnicodeError) as error:
            found = () if isinstance(error, OSError) and error.errno in _NOBODY else None
            if not complained:
                log.warning("%s does not resolve: %s; asking again every %.0f s", address, error, RESOLVE_EVERY)
            complained = True
        else:
            if complained:
                log.info("%s resolves again", address)
            complained = False
        if found is not None:
            try:
                await tell(found)
            except Exception:
                log.exception("what %s stands for could not be taken over", address)
        await asyncio.sleep(RESOLVE_EVERY)
