"""`redis://`: shared by workers; a redis that is down or full never fails a request."""

from pathlib import Path

import pytest
from redis.asyncio import Redis

from common.embedding import Header
from tests.redis_server import Server, redis_server
from tests.vision_worker.cache.embeddings import EXPECTED, HEADER, IMAGE, VALUES, writes_done
from vision_worker.cache.base import open_cache
from vision_worker.cache.embedding_cache import EmbeddingCache


async def test_two_workers_share_one_redis_which_outlives_them(server: Server) -> None:
    async with EmbeddingCache(open_cache(server.url)) as first:
        first.put(HEADER, IMAGE, VALUES)
    async with EmbeddingCache(open_cache(server.url)) as second:
        assert await second.get(EXPECTED) is not None


async def test_a_redis_that_is_down_costs_a_miss(tmp_path: Path) -> None:
    async with EmbeddingCache(open_cache(f"unix://{tmp_path}/no-such-socket")) as embeddings:
        for _ in range(3):
            assert await embeddings.get(EXPECTED) is None
        embeddings.put(HEADER, IMAGE, VALUES)
        assert embeddings.counts["misses"] == 3
        assert embeddings.counts["errors"] == 1, "after one failure it is not used for a while"


async def test_a_redis_that_restarts_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vision_worker.cache.embedding_cache._PAUSE_SECONDS", 0.0)
    with redis_server(tmp_path) as first:
        embeddings = EmbeddingCache(open_cache(first.url))
        embeddings.put(HEADER, IMAGE, VALUES)
        await writes_done(embeddings)
        assert await embeddings.get(EXPECTED) is not None
    assert await embeddings.get(EXPECTED) is None
    with redis_server(tmp_path):
        async with embeddings:
            embeddings.put(HEADER, IMAGE, VALUES)
            await writes_done(embeddings)
            assert await embeddings.get(EXPECTED) is not None


async def test_a_full_redis_is_only_counted(tmp_path: Path) -> None:
    with redis_server(tmp_path, "--maxmemory", "1mb", "--maxmemory-policy", "noeviction") as small:
        async with EmbeddingCache(open_cache(small.url)) as embeddings:
            header = Header("key", "f" * 64, "float32", 500_000, 2)
            for _ in range(2):
                embeddings.put(header, IMAGE, bytes(header.length))
                await writes_done(embeddings)
            assert embeddings.counts["errors"] >= 1


async def test_a_full_redis_is_still_read(tmp_path: Path) -> None:
    with redis_server(tmp_path, "--maxmemory", "4mb", "--maxmemory-policy", "noeviction") as small:
        async with EmbeddingCache(open_cache(small.url)) as embeddings:
            embeddings.put(HEADER, IMAGE, VALUES)
            await writes_done(embeddings)
            large = Header("large", "f" * 64, "float32", 500_000, 2)
            for _ in range(3):
                embeddings.put(large, IMAGE, bytes(large.length))
                await writes_done(embeddings)
            assert embeddings.counts["errors"] >= 1
            assert await embeddings.get(EXPECTED) is not None


async def test_a_read_only_redis_is_still_read(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        async with EmbeddingCache(open_cache(server.url)) as embeddings:
            embeddings.put(HEADER, IMAGE, VALUES)
            await writes_done(embeddings)
            async with Redis.from_url(server.url) as client:
                await client.config_set("min-replicas-to-write", 1)  # NOREPLICAS: writes are refused from now on
            embeddings.put(HEADER, IMAGE, VALUES)
            await writes_done(embeddings)
            assert embeddings.counts["errors"] == 1
            assert await embeddings.get(EXPECTED) is not None
