"""Discovery of workers by DNS: `dns:NAME:PORT` stands for one worker at each address of the name.

Names are resolved periodically by the event loop's resolver, so that workers may come and go while the gateway runs.
"""

import asyncio
import logging
import re
import socket
from collections.abc import Awaitable, Callable, Collection

log = logging.getLogger(__name__)

RESOLVE_INTERVAL_SECONDS = 3.0

Resolve = Callable[[str, int], Awaitable[Collection[str]]]
"""Resolves a name and a port to addresses, `HOST:PORT` each. Raises `OSError` (such as `socket.gaierror`) on failure."""

OnResolved = Callable[[Collection[str]], Awaitable[object]]
"""Called with the addresses of a name."""

_NAME = re.compile(r"dns:(.+):(\d+)")
_NO_ADDRESS_ERRORS = frozenset({socket.EAI_NONAME, socket.EAI_NODATA})
"""Resolver errors that mean an empty list of addresses: no such name, or no address for it."""


def parse_name(address: str) -> tuple[str, int] | None:
    """Return name and port of `dns:NAME:PORT`; None for a static address."""
    match = _NAME.fullmatch(address)
    return (match[1], int(match[2])) if match else None


async def resolve(name: str, port: int) -> list[str]:
    """Resolve a name by the system's resolver (hosts file, DNS), IPv6 in brackets. Raises `socket.gaierror`."""
    loop = asyncio.get_running_loop()
    # ADDRCONFIG: no IPv6 addresses on a machine without IPv6, which could not reach them
    infos = await loop.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    return sorted({_join_host_port(family, place[0], port) for family, _, _, _, place in infos})


def _join_host_port(family: int, host: str | int, port: int) -> str:
    return f"[{host}]:{port}" if family == socket.AF_INET6 else f"{host}:{port}"


async def watch(address: str, resolve: Resolve, on_resolved: OnResolved) -> None:
    """Resolve `dns:NAME:PORT` every `RESOLVE_INTERVAL_SECONDS` until cancelled, and pass the addresses on.

    A resolver error changes nothing and is logged once until the name resolves again. There is one lookup at a time, without a
    timeout: a lookup cannot be cancelled, and a second one would only queue behind it.
    """
    name = parse_name(address)
    assert name is not None
    failing = False
    while True:
        try:
            addresses: Collection[str] | None = await resolve(*name)
        except (OSError, UnicodeError) as error:
            addresses = () if isinstance(error, OSError) and error.errno in _NO_ADDRESS_ERRORS else None
            if not failing:
                log.warning("%s does not resolve: %s; next attempt every %.0f s", address, error, RESOLVE_INTERVAL_SECONDS)
            failing = True
        else:
            if failing:
                log.info("%s resolves again", address)
            failing = False
        if addresses is not None:
            try:
                await on_resolved(addresses)
            except Exception:
                log.exception("updating the workers of %s failed", address)
        await asyncio.sleep(RESOLVE_INTERVAL_SECONDS)
