"""What every cache does, and that none can hurt a request."""

import asyncio
import struct
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio

from common.embedding import HEADER_SIZE, Header
from protos import vision_pb2 as pb
from tests.redis_server import Server, redis_server
from vision_worker.cache.embedding_cache import Buffer, Cache, EmbeddingCache, Memory, open_cache

HEADER = Header("key", "f" * 64, "float32", 3, 2)
VALUES = struct.pack("<6f", *range(6))
IMAGE = pb.EncodedImage(key="key", tokens=3, columns=1, rows=1, compressed=[True], scores=[0.5])
ASKED = Header("key", "f" * 64, "float32", 0, 2)
WHOLE = HEADER.pack() + VALUES + IMAGE.SerializeToString()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with redis_server(tmp_path_factory.mktemp("redis")) as made:
        yield made


@pytest.fixture(params=["memory", "redis"])
async def cache(request: pytest.FixtureRequest, server: Server) -> AsyncIterator[Cache]:
    made = open_cache("memory://" if request.param == "memory" else server.url)
    assert made is not None
    yield made
    await made.close()
    client = redis.asyncio.Redis.from_url(server.url)
    await client.flushall()
    await client.aclose()


# The contract


async def test_what_was_put_is_got(cache: Cache) -> None:
    assert await cache.get("a") is None
    await cache.put("a", [b"one", memoryview(b"two"), bytearray(3)])
    await cache.put("b", [b"\xff" * (3 << 20)])
    assert bytes(await cache.get("a") or b"") == b"onetwo\0\0\0"
    assert len(await cache.get("b") or b"") == 3 << 20
    await cache.put("a", [b"new"])
    assert bytes(await cache.get("a") or b"") == b"new"


async def test_embeddings_come_back_whole(cache: Cache) -> None:
    kept = EmbeddingCache(cache)
    assert await kept.get(ASKED) is None
    kept.put(HEADER, IMAGE, VALUES)
    await until_written(kept)
    found = await kept.get(ASKED)
    assert found is not None
    assert found[0] == IMAGE
    assert bytes(found[1]) == VALUES
    assert kept.counts == {"misses": 1, "hits": 1}


async def until_written(kept: EmbeddingCache) -> None:
    async with asyncio.timeout(5):
        while kept._writing:
            await asyncio.sleep(0.001)


BROKEN = {
    "empty": b"",
    "a word": b"no embedding",
    "half a header": WHOLE[: HEADER_SIZE // 2],
    "another magic": b"XXXX" + WHOLE[4:],
    "cut short": WHOLE[: HEADER_SIZE + 20],
    "no note": WHOLE[: HEADER_SIZE + 24],
    "a broken note": WHOLE[:-3],
    "a note of another": HEADER.pack() + VALUES + pb.EncodedImage(key="k2", tokens=3, compressed=[True]).SerializeToString(),
    "a note of more rows": HEADER.pack() + VALUES + pb.EncodedImage(key="key", tokens=4, compressed=[True]).SerializeToString(),
    "another key": Header("other", "f" * 64, "float32", 3, 2).pack() + WHOLE[HEADER_SIZE:],
    "another checkpoint": Header("key", "e" * 64, "float32", 3, 2).pack() + WHOLE[HEADER_SIZE:],
    "another dtype": Header("key", "f" * 64, "bfloat16", 6, 2).pack() + WHOLE[HEADER_SIZE:],
    "another width": Header("key", "f" * 64, "float32", 2, 3).pack() + WHOLE[HEADER_SIZE:],
    "no rows": Header("key", "f" * 64, "float32", 0, 2).pack() + WHOLE[HEADER_SIZE:],
    "infinite": HEADER.pack() + struct.pack("<6f", 0, 1, float("inf"), 3, 4, 5) + IMAGE.SerializeToString(),
    "not a number": HEADER.pack() + struct.pack("<6f", 0, 1, 2, 3, 4, float("nan")) + IMAGE.SerializeToString(),
}  # fmt: skip


@pytest.mark.parametrize("value", BROKEN.values(), ids=BROKEN)
async def test_what_is_not_the_embedding_is_a_miss(cache: Cache, value: bytes) -> None:
    kept = EmbeddingCache(cache)
    await cache.put("key", [value])
    assert await kept.get(ASKED) is None
    assert kept.counts == {"misses": 1, "errors": 1}
    kept.put(HEADER, IMAGE, VALUES)  # and is written over
    await until_written(kept)
    assert await kept.get(ASKED) is not None


# Memory


async def test_memory_forgets_what_was_not_used_for_longest() -> None:
    cache = Memory(100)
    for key in "abc":
        await cache.put(key, [bytes(30)])
    await cache.get("a")
    await cache.put("d", [bytes(30)])
    assert [key for key in "abcd" if await cache.get(key) is not None] == ["a", "c", "d"]
    assert cache.evictions == 1
    await cache.put("e", [bytes(101)])
    assert [key for key in "acde" if await cache.get(key) is not None] == []
    await cache.put("a", [bytes(90)])
    await cache.put("a", [bytes(95)])
    assert len(await cache.get("a") or b"") == 95, "a value that is written over counts once"


# Redis


async def test_two_share_one_redis_and_it_outlives_them(server: Server) -> None:
    first, second = (EmbeddingCache(open_cache(server.url)) for _ in range(2))
    first.put(HEADER, IMAGE, VALUES)
    await first.close()
    assert await second.get(ASKED) is not None
    await second.close()


async def test_a_redis_that_is_away_costs_a_miss(tmp_path: Path) -> None:
    kept = EmbeddingCache(open_cache(f"unix://{tmp_path}/nobody"))
    for _ in range(3):
        assert await kept.get(ASKED) is None
    kept.put(HEADER, IMAGE, VALUES)
    assert kept.counts["misses"] == 3
    assert kept.counts["errors"] == 1, "after one failure it is left alone for a while"
    await kept.close()


async def test_a_redis_that_ends_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vision_worker.cache.embedding_cache._REST", 0.0)
    with redis_server(tmp_path) as first:
        kept = EmbeddingCache(open_cache(first.url))
        kept.put(HEADER, IMAGE, VALUES)
        await until_written(kept)
        assert await kept.get(ASKED) is not None
    assert await kept.get(ASKED) is None
    with redis_server(tmp_path):
        kept.put(HEADER, IMAGE, VALUES)
        await until_written(kept)
        assert await kept.get(ASKED) is not None
    await kept.close()


async def test_a_full_redis_is_an_error_that_nobody_sees(tmp_path: Path) -> None:
    with redis_server(tmp_path, "--maxmemory", "1mb", "--maxmemory-policy", "noeviction") as small:
        kept = EmbeddingCache(open_cache(small.url))
        header = Header("key", "f" * 64, "float32", 500_000, 2)
        kept.put(header, IMAGE, bytes(header.length))
        await until_written(kept)
        kept.put(header, IMAGE, bytes(header.length))
        await until_written(kept)
        assert kept.counts["errors"] >= 1
        await kept.close()


# A cache that misbehaves in any other way


class Odd:
    """Raises `error`, or takes for ever to write."""

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
async def test_whatever_it_raises_is_a_miss(error: Exception) -> None:
    kept = EmbeddingCache(Odd(error))
    assert await kept.get(ASKED) is None
    assert kept.counts == {"misses": 1, "errors": 1}
    await kept.close()


async def test_a_slow_cache_does_not_fill_the_memory() -> None:
    odd = Odd(None)
    kept = EmbeddingCache(odd)
    for _ in range(100):
        kept.put(HEADER, IMAGE, VALUES)
        await asyncio.sleep(0)
    assert odd.puts == 16
    for task in kept._writing:
        task.cancel()


async def test_none_is_no_cache() -> None:
    kept = EmbeddingCache(open_cache("none"))
    kept.put(HEADER, IMAGE, VALUES)
    assert await kept.get(ASKED) is None
    assert kept.counts == {}
    await kept.close()


@pytest.mark.parametrize(
    "url", ["", "memory", "http://a", "memory://?bytes=0", "memory://?bytes=x", "memory://?bytes=-1", "memory://?size=3"]
)
def test_other_urls_are_refused_by_name(url: str) -> None:
    with pytest.raises(ValueError, match="memory://") as raised:
        open_cache(url)
    assert repr(url) in str(raised.value)


def test_the_budget_of_memory_is_in_its_url() -> None:
    made: Any = open_cache("memory://?bytes=77")
    assert made._budget == 77
