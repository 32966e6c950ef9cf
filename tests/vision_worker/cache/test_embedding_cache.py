"""Embeddings in any cache: they return unchanged, corrupt entries are misses, and no cache error fails a request."""

import asyncio
import math
import struct
from collections.abc import Sequence
from dataclasses import replace

import pytest

from common.embedding import HEADER_SIZE, Header
from protos import vision_pb2 as pb
from tests.vision_worker.cache.embeddings import EXPECTED, HEADER, IMAGE, VALUES, writes_done
from vision_worker.cache.base import Buffer, Cache, CorruptCacheEntry, open_cache
from vision_worker.cache.embedding_cache import EmbeddingCache, _parse_entry

ENTRY = HEADER.pack() + VALUES + IMAGE.SerializeToString()


async def test_an_embedding_is_returned_unchanged(cache: Cache) -> None:
    embeddings = EmbeddingCache(cache)
    assert await embeddings.get(EXPECTED) is None
    embeddings.put(HEADER, IMAGE, VALUES)
    await writes_done(embeddings)
    entry = await embeddings.get(EXPECTED)
    assert entry is not None
    assert entry[0] == IMAGE
    assert bytes(entry[1]) == VALUES
    assert embeddings.counts == {"misses": 1, "hits": 1}


NARROW_VALUES = struct.pack("<3f", 0.5, 0.0, 2.0) + bytes(range(6))


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
async def test_a_narrow_embedding_is_returned_unchanged_and_only_as_itself(cache: Cache, dtype: str) -> None:
    embeddings = EmbeddingCache(cache)
    embeddings.put(replace(HEADER, dtype=dtype), IMAGE, NARROW_VALUES)
    await writes_done(embeddings)
    entry = await embeddings.get(replace(EXPECTED, dtype=dtype))
    assert entry is not None
    assert bytes(entry[1]) == NARROW_VALUES
    assert await embeddings.get(EXPECTED) is None
    assert await embeddings.get(replace(EXPECTED, dtype={"int8": "fp8", "fp8": "int8"}[dtype])) is None


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("int8", struct.pack("<3f", 0.5, math.nan, 2.0) + bytes(6)),
        ("fp8", struct.pack("<3f", 0.5, -1.0, 2.0) + bytes(6)),
        ("fp8", struct.pack("<3f", 0.5, 1.0, 2.0) + b"\0\0\0\0\0\x7f"),
    ],
)
def test_a_narrow_entry_that_is_not_finite_is_corrupt(dtype: str, values: bytes) -> None:
    entry = replace(HEADER, dtype=dtype).pack() + values + IMAGE.SerializeToString()
    with pytest.raises(CorruptCacheEntry):
        _parse_entry(memoryview(entry), replace(EXPECTED, dtype=dtype))


CORRUPT = {
    "empty": b"",
    "text": b"no embedding",
    "half a header": ENTRY[: HEADER_SIZE // 2],
    "another magic": b"XXXX" + ENTRY[4:],
    "key not ascii": ENTRY[:88] + b"\xff" + ENTRY[89:],
    "cut short": ENTRY[: HEADER_SIZE + 20],
    "no description": ENTRY[: HEADER_SIZE + 24],
    "a broken description": ENTRY[:-3],
    "another key in the description": HEADER.pack()
    + VALUES
    + pb.EncodedImage(key="k2", tokens=3, compressed=[True]).SerializeToString(),
    "more rows in the description": HEADER.pack()
    + VALUES
    + pb.EncodedImage(key="key", tokens=4, compressed=[True]).SerializeToString(),
    "another key": Header("other", "f" * 64, "float32", 3, 2).pack() + ENTRY[HEADER_SIZE:],
    "another checkpoint": Header("key", "e" * 64, "float32", 3, 2).pack() + ENTRY[HEADER_SIZE:],
    "another dtype": Header("key", "f" * 64, "bfloat16", 6, 2).pack() + ENTRY[HEADER_SIZE:],
    "another width": Header("key", "f" * 64, "float32", 2, 3).pack() + ENTRY[HEADER_SIZE:],
    "no rows": Header("key", "f" * 64, "float32", 0, 2).pack() + ENTRY[HEADER_SIZE:],
    "infinite": HEADER.pack() + struct.pack("<6f", 0, 1, float("inf"), 3, 4, 5) + IMAGE.SerializeToString(),
    "not a number": HEADER.pack() + struct.pack("<6f", 0, 1, 2, 3, 4, float("nan")) + IMAGE.SerializeToString(),
}


@pytest.mark.parametrize("value", CORRUPT.values(), ids=CORRUPT)
async def test_a_corrupt_entry_is_a_miss_and_is_replaced(cache: Cache, value: bytes) -> None:
    embeddings = EmbeddingCache(cache)
    await cache.put("key", [value])
    assert await embeddings.get(EXPECTED) is None
    assert embeddings.counts == {"misses": 1, "errors": 1}
    embeddings.put(HEADER, IMAGE, VALUES)
    await writes_done(embeddings)
    assert await embeddings.get(EXPECTED) is not None, "a corrupt entry does not pause the cache"


@pytest.mark.parametrize("value", CORRUPT.values(), ids=CORRUPT)
def test_a_corrupt_entry_has_an_error_of_its_own(value: bytes) -> None:
    with pytest.raises(CorruptCacheEntry):
        _parse_entry(memoryview(value), EXPECTED)


class FaultyCache:
    """Raises `error`; without one, writes take for ever."""

    tier = "faulty"
    evictions = 0

    def __init__(self, error: Exception | None) -> None:
        self.error, self.puts = error, 0

    async def get(self, key: str) -> Buffer | None:
        if self.error:
            raise self.error
        return None

    async def put(self, key: str, value: Sequence[Buffer]) -> None:
        self.puts += 1
        if self.error:
            raise self.error
        await asyncio.Event().wait()

    async def close(self) -> None:
        return None


@pytest.mark.parametrize("error", [OSError("gone"), ValueError("odd"), TimeoutError(), ConnectionResetError()])
async def test_any_cache_error_is_a_miss_and_pauses_the_cache(error: Exception) -> None:
    cache = FaultyCache(error)
    async with EmbeddingCache(cache) as embeddings:
        assert await embeddings.get(EXPECTED) is None
        assert embeddings.counts == {"misses": 1, "errors": 1}
        embeddings.put(HEADER, IMAGE, VALUES)
        assert await embeddings.get(EXPECTED) is None
    assert (cache.puts, embeddings.counts["errors"]) == (0, 1)


async def test_a_slow_cache_does_not_fill_the_memory() -> None:
    cache = FaultyCache(None)
    embeddings = EmbeddingCache(cache)
    for _ in range(100):
        embeddings.put(HEADER, IMAGE, VALUES)
        await asyncio.sleep(0)
    assert cache.puts == 16
    for task in embeddings._writes:
        task.cancel()


async def test_without_a_cache_nothing_is_stored_or_counted() -> None:
    async with EmbeddingCache(open_cache("none")) as embeddings:
        embeddings.put(HEADER, IMAGE, VALUES)
        assert await embeddings.get(EXPECTED) is None
    assert embeddings.counts == {}
    assert embeddings.tier is None
