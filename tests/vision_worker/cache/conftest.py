"""A redis server and both kinds of cache."""

from collections.abc import AsyncIterator, Iterator

import pytest
import redis.asyncio

from tests.redis_server import Server, redis_server
from vision_worker.cache.base import Cache, open_cache


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(params=["memory", "redis"])
async def cache(request: pytest.FixtureRequest, server: Server) -> AsyncIterator[Cache]:
    cache = open_cache("memory://" if request.param == "memory" else server.url)
    assert cache is not None
    yield cache
    await cache.close()
    client = redis.asyncio.Redis.from_url(server.url)
    await client.flushall()
    await client.aclose()
