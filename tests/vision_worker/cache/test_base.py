"""The contract of `Cache`, for every implementation, and the URLs that choose one."""

from typing import Any

import pytest

from vision_worker.cache.base import Cache, open_cache


async def test_a_stored_value_is_returned(cache: Cache) -> None:
    assert await cache.get("a") is None
    await cache.put("a", [b"one", memoryview(b"two"), bytearray(3)])
    await cache.put("b", [b"\xff" * (3 << 20)])
    assert bytes(await cache.get("a") or b"") == b"onetwo\0\0\0"
    assert len(await cache.get("b") or b"") == 3 << 20
    await cache.put("a", [b"new"])
    assert bytes(await cache.get("a") or b"") == b"new"


@pytest.mark.parametrize(
    "url", ["", "memory", "http://a", "memory://?bytes=0", "memory://?bytes=x", "memory://?bytes=-1", "memory://?size=3"]
)
def test_an_invalid_url_is_named_in_the_error(url: str) -> None:
    with pytest.raises(ValueError, match="memory://") as raised:
        open_cache(url)
    assert repr(url) in str(raised.value)


def test_the_memory_budget_is_read_from_the_url() -> None:
    cache: Any = open_cache("memory://?bytes=77")
    assert cache._budget == 77
