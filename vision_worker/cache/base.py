"""The interface to a cache of embeddings, and how a URL selects one.

`memory://` (memory.py) belongs to this process. `redis://` (redis.py) is shared by all vision workers and outlives them.
"""

from collections.abc import Sequence
from typing import Protocol
from urllib.parse import parse_qs, urlsplit

from common.secrets import redact_url
from common.security import TlsFiles
from vision_worker.cache.memory import MemoryCache

Buffer = bytes | bytearray | memoryview

DEFAULT_MEMORY_BYTES = 512 << 20
"""Budget of `memory://` where its URL gives none."""


class CorruptCacheEntry(Exception):
    """A cache returned bytes that are not the requested embedding. The cache itself works."""


class CacheRefused(Exception):
    """A cache answered with an error, such as "out of memory" or "read-only". It is reachable: other operations may work."""


class Cache(Protocol):
    """Bytes by key.

    Any method may raise any exception, which counts as a miss or as a value that was not stored. No method may block for
    ever. A cache may drop a value at any time.
    """

    tier: str
    """Label of this kind of cache in metrics."""

    evictions: int
    """Values evicted so far; 0 where the cache counts them elsewhere."""

    async def get(self, key: str) -> Buffer | None:
        """The value stored under `key`, or None."""

    async def put(self, key: str, value: Sequence[Buffer]) -> None:
        """Store the concatenated parts of `value` under `key`."""

    async def close(self) -> None:
        """Release connections and memory."""


def open_cache(url: str, tls: TlsFiles | None = None) -> Cache | None:
    """Open the cache that a URL names; None for `none`.

    Args:
        url: The URL.
        tls: Certificate and authorities for `rediss://`; None: those of the system.

    Raises:
        ValueError: The URL is wrong; the message says how.
    """
    if url == "none":
        return None
    parts = urlsplit(url)
    if parts.scheme == "memory":
        return MemoryCache(_memory_budget(url, parts.query))
    if parts.scheme in ("redis", "rediss", "unix"):
        from vision_worker.cache.redis import RedisCache  # imported here so that only its users need the redis package

        return RedisCache(url, tls)
    raise ValueError(
        f"{redact_url(url)!r} is not a cache URL: use none, memory://, memory://?bytes=N or redis://HOST:PORT/DATABASE"
    )


def _memory_budget(url: str, query: str) -> int:
    fields = parse_qs(query, keep_blank_values=True)
    values = fields.pop("bytes", [str(DEFAULT_MEMORY_BYTES)])
    if fields or len(values) != 1 or not values[0].isdecimal() or not int(values[0]):
        raise ValueError(f"{url!r}: memory:// takes bytes=N only, such as memory://?bytes={DEFAULT_MEMORY_BYTES}")
    return int(values[0])
