"""Embeddings in a cache: their format, their validation when they are read, and the handling of failures.

A value is the embedding's header, its payload and a serialized `EncodedImage`, which holds the tile grid and the routes. A
cached value is validated like any bytes from outside. No cache error ever fails a request: it counts as a miss.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Sequence

from google.protobuf.message import DecodeError

from common import embedding, errors
from common.embedding import Header
from protos import vision_pb2 as pb
from vision_worker.cache.base import Buffer, Cache, CacheRefused, CorruptCacheEntry

log = logging.getLogger(__name__)

_PAUSE_SECONDS = 1.0
"""Time for which a failed cache is bypassed, because every attempt may take its whole timeout.

A cache that refuses writes is not written to for this time, so that embeddings are not copied in vain; it is still read."""

_MAX_CONCURRENT_WRITES = 16
"""Maximum number of pending writes. Further embeddings are not stored, so that a slow cache does not fill the memory."""


class EmbeddingCache:
    """Reads and writes embeddings: `async with EmbeddingCache(open_cache(url)) as cache`.

    Leaving the context completes pending writes and closes the cache. Without a cache (None) every read is a miss that is
    not counted.

    Attributes:
        counts: numbers of "hits", "misses" and "errors" so far.
    """

    def __init__(self, cache: Cache | None) -> None:
        self._cache = cache
        self._reads_paused_until = self._writes_paused_until = 0.0
        self._writes: set[asyncio.Task[None]] = set()
        self.counts: Counter[str] = Counter()

    async def __aenter__(self) -> "EmbeddingCache":
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*self._writes)
        if self._cache is not None:
            await self._cache.close()

    @property
    def tier(self) -> str | None:
        """The kind of cache, "memory" or "redis"; None without one."""
        return self._cache.tier if self._cache else None

    @property
    def evictions(self) -> int:
        """Values that the cache evicted so far."""
        return self._cache.evictions if self._cache else 0

    async def get(self, expected: Header) -> tuple[pb.EncodedImage, memoryview] | None:
        """Look up the embedding with the key, fingerprint, dtype and width of `expected`, whose `rows` are ignored.

        Returns: the image's description and the embedding's values, or None where it is missing or not usable.
        """
        if self._cache is None:
            return None
        result = None
        if time.monotonic() >= self._reads_paused_until:
            try:
                value = await self._cache.get(expected.key)
                if value is not None:
                    result = await asyncio.to_thread(_parse_entry, memoryview(value), expected)
            except Exception as error:
                self._record_read_error(error)
        self.counts["misses" if result is None else "hits"] += 1
        return result

    def put(self, header: Header, image: pb.EncodedImage, values: Buffer) -> None:
        """Store an embedding in the background. It is dropped while the cache is failing or slow."""
        if self._cache is None or len(self._writes) >= _MAX_CONCURRENT_WRITES or time.monotonic() < self._writes_paused_until:
            return
        task = asyncio.create_task(self._write(self._cache, header.key, [header.pack(), values, image.SerializeToString()]))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def _write(self, cache: Cache, key: str, value: Sequence[Buffer]) -> None:
        try:
            await cache.put(key, value)
        except Exception as error:
            self._record_write_error(error)

    def _record_read_error(self, error: Exception) -> None:
        """Count an error of a read. A corrupt entry pauses nothing: the cache works."""
        if not isinstance(error, CorruptCacheEntry):
            self._reads_paused_until = self._writes_paused_until = time.monotonic() + _PAUSE_SECONDS
        self._count_error(error)

    def _record_write_error(self, error: Exception) -> None:
        """Count an error of a write. A full or read-only cache can still be read."""
        self._writes_paused_until = time.monotonic() + _PAUSE_SECONDS
        if not isinstance(error, CacheRefused):
            self._reads_paused_until = self._writes_paused_until
        self._count_error(error)

    def _count_error(self, error: Exception) -> None:
        self.counts["errors"] += 1
        log.warning("embedding cache error: %s: %s", type(error).__name__, error)


def _parse_entry(entry: memoryview, expected: Header) -> tuple[pb.EncodedImage, memoryview]:
    """Split a cache entry into description and values. Raises: CorruptCacheEntry where it is not what `expected` names."""
    try:
        header = embedding.parse_header(entry)
        end = embedding.HEADER_SIZE + header.length
        values = entry[embedding.HEADER_SIZE : end]
        _check_header(header, expected, len(entry))
        embedding.check_values(header, values)
        image = pb.EncodedImage.FromString(bytes(entry[end:]))
    except (errors.InvalidRequest, UnicodeDecodeError, DecodeError) as error:
        raise CorruptCacheEntry(str(error)) from None
    if image.key != header.key or image.tokens != header.rows or not image.compressed:
        raise CorruptCacheEntry(f"embedding of {header.rows} rows described as {image.tokens} rows of {image.key!r}")
    return image, values


def _check_header(header: Header, expected: Header, entry_bytes: int) -> None:
    for name in ("key", "fingerprint", "dtype", "width"):
        if getattr(header, name) != getattr(expected, name):
            raise CorruptCacheEntry(f"embedding has {name} {getattr(header, name)!r}, expected {getattr(expected, name)!r}")
    end = embedding.HEADER_SIZE + header.length
    if not header.rows or entry_bytes < end:
        raise CorruptCacheEntry(f"embedding has {entry_bytes} bytes and {header.rows} rows, its header requires {end} bytes")
