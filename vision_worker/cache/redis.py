"""A cache of embeddings in redis. The only file that knows redis.

The server bounds it: run it with `--maxmemory` and `--maxmemory-policy allkeys-lru`, and without persistence.
"""

from collections.abc import Sequence
from typing import cast

from redis.asyncio import Redis as Client
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from vision_worker.cache.embedding_cache import Buffer

_PREFIX = "dvd:1:"
"""Of every key; the number changes with what is kept under one."""

_TIMEOUT = 2.0


class Redis:
    tier = "redis"

    def __init__(self, url: str) -> None:
        self.evictions = 0  # redis counts its own
        # one try: a miss costs less than waiting for a cache that is away
        self._client = Client.from_url(
            url, socket_timeout=_TIMEOUT, socket_connect_timeout=_TIMEOUT, retry=Retry(NoBackoff(), 0)
        )  # type: ignore[no-untyped-call,unused-ignore]

    async def get(self, key: str) -> Buffer | None:
        return cast(Buffer | None, await self._client.get(_PREFIX + key))  # a str only where decoding was asked for

    async def put(self, key: str, value: Sequence[Buffer]) -> None:
        await self._client.set(_PREFIX + key, b"".join(value))

    async def close(self) -> None:
        await self._client.aclose()
