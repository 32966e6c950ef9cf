"""What a load balancer does: it follows the readiness of the gateways, and takes those that are ready in turns."""

import asyncio
import itertools
from typing import Self

from benchmarks.soak.fleet import Fleet, Member

_INTERVAL_SECONDS = 0.5


class Balancer:
    """The gateways that are ready, as of the last look: `async with Balancer(fleet) as balancer`."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._ready: list[Member] = fleet.gateways
        self._turn = itertools.count()

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._follow())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    def choose_url(self) -> str:
        """Return the URL of the next gateway that is ready; of any if none is."""
        gateways = self._ready or self._fleet.gateways
        return f"http://{gateways[next(self._turn) % len(gateways)].address}"

    async def _follow(self) -> None:
        while True:
            self._ready = [gateway for gateway in self._fleet.gateways if await self._fleet.is_ready(gateway)]
            await asyncio.sleep(_INTERVAL_SECONDS)
