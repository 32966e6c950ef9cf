"""A cache of embeddings in redis, shared by all vision workers. The only file that imports the redis client.

The redis server bounds it: run it with `--maxmemory` and `--maxmemory-policy allkeys-lru`, and without persistence.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ResponseError

from common.security import TlsFiles
from vision_worker.cache.base import Buffer, CacheRefused

_KEY_PREFIX = "dvd:1:"
"""Prefix of every key. Increase the number when the format of the values changes."""

_TIMEOUT_SECONDS = 2.0


class RedisCache:
    """Values under `dvd:1:KEY` of a redis database. `evictions` stays 0: the redis server counts its own."""

    tier = "redis"

    def __init__(self, url: str, tls: TlsFiles | None = None) -> None:
        self.evictions = 0
        # no retries: a miss costs less than waiting for a redis that is down
        self._client = Redis.from_url(
            url,
            **_tls_options(url, tls),
            socket_timeout=_TIMEOUT_SECONDS,
            socket_connect_timeout=_TIMEOUT_SECONDS,
            retry=Retry(NoBackoff(), 0),
        )  # type: ignore[no-untyped-call,unused-ignore]

    async def get(self, key: str) -> Buffer | None:
        """See `Cache.get`."""
        with _translate_refusal():
            return cast(Buffer | None, await self._client.get(_KEY_PREFIX + key))  # str only with `decode_responses`

    async def put(self, key: str, value: Sequence[Buffer]) -> None:
        """See `Cache.put`."""
        with _translate_refusal():
            await self._client.set(_KEY_PREFIX + key, b"".join(value))

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()


def _tls_options(url: str, tls: TlsFiles | None) -> dict[str, Any]:
    if tls is None or not url.startswith("rediss://"):
        return {}
    return {"ssl_ca_certs": str(tls.ca), "ssl_certfile": str(tls.cert), "ssl_keyfile": str(tls.key)}


@contextlib.contextmanager
def _translate_refusal() -> Iterator[None]:
    try:
        yield
    except ResponseError as error:
        raise CacheRefused(f"{type(error).__name__}: {error}") from error
