"""A cache of embeddings in this process (`memory://`)."""

import asyncio
from collections import OrderedDict
from collections.abc import Sequence


class MemoryCache:
    """Bounded by `budget` bytes of values; the least recently used values are evicted first."""

    tier = "memory"

    def __init__(self, budget: int) -> None:
        self.evictions = 0
        self._budget, self._used = budget, 0
        self._values: OrderedDict[str, bytes] = OrderedDict()

    async def get(self, key: str) -> bytes | None:
        """See `Cache.get`."""
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    async def put(self, key: str, value: Sequence[bytes | bytearray | memoryview]) -> None:
        """See `Cache.put`. A value above the budget is evicted at once, and everything else with it."""
        joined = await asyncio.to_thread(b"".join, value)  # megabytes: other calls go on meanwhile
        self._used += len(joined) - len(self._values.pop(key, b""))
        self._values[key] = joined
        while self._used > self._budget:
            _, evicted = self._values.popitem(last=False)
            self._used -= len(evicted)
            self.evictions += 1

    async def close(self) -> None:
        """Drop all values."""
        self._values.clear()
        self._used = 0
