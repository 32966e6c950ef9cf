"""`memory://`: the budget and the order of eviction."""

from vision_worker.cache.memory import MemoryCache


async def test_the_least_recently_used_values_are_evicted() -> None:
    cache = MemoryCache(100)
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
    assert len(await cache.get("a") or b"") == 95, "a replaced value counts once"
