"""The seam to a cache of embeddings, chosen by URL. Its values are validated like any foreign bytes.

`memory://` belongs to this process; `redis://` (`vision_worker/cache/redis.py`) is shared by all vision workers and outlives
them. A cache never fails a request: any cache error counts as a miss.
"""

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Protocol
from urllib.parse import parse_qs, urlsplit

from google.protobuf.message import DecodeError

from common import embedding, errors
from common.embedding import Header
from protos import vision_pb2 as pb

log = logging.getLogger(__name__)

Buffer = bytes | bytearray | memoryview

MEMORY_BYTES = 512 << 20
"""What `memory://` holds where its URL does not say."""

_REST = 1.0
"""Seconds for which a cache that failed is left alone: each try may cost its whole timeout."""


class Cache(Protocol):
    """Bytes by key. `get` and `put` may raise anything but may not hang; None is a miss. `tier` is its name in metrics."""

    tier: str
    evictions: int

    async def get(self, key: str) -> Buffer | None: ...

    async def put(self, key: str, value: Sequence[Buffer]) -> None:
        """Keep the parts, one after another, or not: a cache may forget at any time."""

    async def close(self) -> None: ...


class Memory:
    """Bounded by bytes; the least recently used go first."""

    tier = "memory"

    def __init__(self, budget: int) -> None:
        self.evictions = 0
        self._budget, self._used = budget, 0
        self._values: OrderedDict[str, bytes] = OrderedDict()

    async def get(self, key: str) -> Buffer | None:
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    async def put(self, key: str, value: Sequence[Buffer]) -> None:
        whole = b"".join(value)
        self._used += len(whole) - len(self._values.pop(key, b""))
        self._values[key] = whole
        while self._used > self._budget:
            _, gone = self._values.popitem(last=False)
            self._used -= len(gone)
            self.evictions += 1

    async def close(self) -> None:
        self._values.clear()
        self._used = 0


def open_cache(url: str) -> Cache | None:
    """The cache of a URL; None for `none`. Raises `ValueError` naming what is wrong with it."""
    if url == "none":
        return None
    said = urlsplit(url)
    if said.scheme == "memory":
        return Memory(_budget(url, said.query))
    if said.scheme in ("redis", "rediss", "unix"):
        from vision_worker.cache.redis import Redis  # only here: who has no such cache need not have the client

        return Redis(url)
    raise ValueError(f"{url!r} is no cache: none, memory://, memory://?bytes=N or redis://HOST:PORT/DATABASE")


def _budget(url: str, query: str) -> int:
    fields = parse_qs(query, keep_blank_values=True)
    words = fields.pop("bytes", [str(MEMORY_BYTES)])
    if fields or len(words) != 1 or not words[0].isdecimal() or not int(words[0]):
        raise ValueError(f"{url!r}: memory:// takes bytes=N only, such as memory://?bytes={MEMORY_BYTES}")
    return int(words[0])


class EmbeddingCache:
    """EmbeddingCache in a cache: header, values, and what the router did. `counts`: hits, misses, errors."""

    def __init__(self, cache: Cache | None) -> None:
        self._cache = cache
        self._silent_until = 0.0
        self._writing: set[asyncio.Task[None]] = set()
        self.counts: Counter[str] = Counter()

    @property
    def tier(self) -> str | None:
        """What kind of cache it is: `memory`, `redis`; None where there is none."""
        return self._cache.tier if self._cache else None

    @property
    def evictions(self) -> int:
        return self._cache.evictions if self._cache else 0

    async def get(self, expected: Header) -> tuple[pb.EncodedImage, memoryview] | None:
        """The embedding that `expected` names, of any number of rows. None: not here, or not usable."""
        if self._cache is None:
            return None
        found = None
        if time.monotonic() >= self._silent_until:
            try:
                value = await self._cache.get(expected.key)
                if value is not None:
                    found = await asyncio.to_thread(_checked, memoryview(value), expected)
            except Exception as error:
                self._failed(error)
        self.counts["misses" if found is None else "hits"] += 1
        return found

    def put(self, header: Header, image: pb.EncodedImage, values: Buffer) -> None:
        """Keep it, some time soon: nobody waits."""
        if self._cache is not None and len(self._writing) < _WRITES and time.monotonic() >= self._silent_until:
            task = asyncio.create_task(self._put(self._cache, header.key, [header.pack(), values, image.SerializeToString()]))
            self._writing.add(task)
            task.add_done_callback(self._writing.discard)

    async def _put(self, cache: Cache, key: str, value: Sequence[Buffer]) -> None:
        try:
            await cache.put(key, value)
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self.counts["errors"] += 1
        if not isinstance(error, errors.InvalidRequest):
            self._silent_until = time.monotonic() + _REST
        log.warning("the cache of embeddings failed: %s: %s", type(error).__name__, error)

    async def close(self) -> None:
        """What is being written is written first."""
        await asyncio.gather(*self._writing)
        if self._cache is not None:
            await self._cache.close()


_WRITES = 16
"""EmbeddingCache on their way into the cache; one more is not kept, so that a slow cache does not fill the memory."""


def _checked(value: memoryview, expected: Header) -> tuple[pb.EncodedImage, memoryview]:
    """Raises `InvalidRequest` where it is not what was asked for, to the last byte."""
    said = embedding.parse_header(value)
    for name in ("key", "fingerprint", "dtype", "width"):
        if getattr(said, name) != getattr(expected, name):
            raise errors.InvalidRequest(f"an embedding of another {name}: {getattr(said, name)!r}")
    end = embedding.HEADER_SIZE + said.length
    if not said.rows or len(value) < end:
        raise errors.InvalidRequest(f"an embedding of {len(value)} bytes, its header says {end}")
    values = value[embedding.HEADER_SIZE : end]
    embedding.check_finite(values, said.dtype)
    try:
        image = pb.EncodedImage.FromString(bytes(value[end:]))
    except DecodeError:
        raise errors.InvalidRequest("an embedding whose description is broken") from None
    if image.key != said.key or image.tokens != said.rows or not image.compressed:
        raise errors.InvalidRequest(f"an embedding of {said.rows} rows, described as {image.tokens} of {image.key!r}")
    return image, values
