"""Which worker gets a request, and how the gateway learns who is there."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import server.pool
from protos import vision_pb2
from server.clients import VisionClient
from server.metrics import Metrics
from server.pool import Pool, Workers
from server.pool import Vision as Member
from tests.server.peers import Language, Vision, described, until
from wire import errors

KEYS = [f"key-{i}" for i in range(600)]


def pool(count: int) -> Pool[Member]:
    there = vision_pb2.VisionDescription()
    return Pool([Member(VisionClient(f"unix:/nowhere/{i}"), there) for i in range(count)], "nobody is there")


async def test_a_key_always_goes_to_the_same_worker_and_keys_are_spread() -> None:
    three = pool(3)
    first = [three.pick(key) for key in KEYS]
    assert [three.pick(key) for key in KEYS] == first
    assert min(Counter(map(id, first)).values()) > 130


async def test_only_the_keys_of_a_worker_that_left_move() -> None:
    three = pool(3)
    first = [three.pick(key) for key in KEYS]
    gone = three.members[1]
    there, gone.said = gone.said, None
    second = [three.pick(key) for key in KEYS]
    assert gone not in second
    assert [b for a, b in zip(first, second, strict=True) if a is not gone] == [a for a in first if a is not gone]
    assert len({id(b) for a, b in zip(first, second, strict=True) if a is gone}) == 2, "both others take of its keys"
    gone.said = there
    assert [three.pick(key) for key in KEYS] == first


async def test_a_worker_far_busier_than_the_others_gets_no_more() -> None:
    two = pool(2)
    chosen = two.pick("key")
    while two.pick("key") is chosen:
        chosen.outstanding += 1
        assert chosen.outstanding < 50
    assert chosen.outstanding > 2, "a little busier does not matter"


@pytest.mark.parametrize("busy", [0, 1, 1000])
async def test_there_is_always_one_to_pick(busy: int) -> None:
    for count in (1, 2, 3):
        some = pool(count)
        for member in some.members:
            member.outstanding = busy
        assert some.pick("key") in some.members


async def test_without_a_key_the_least_busy_is_picked() -> None:
    three = pool(3)
    for member, outstanding in zip(three.members, (5, 2, 7), strict=True):
        member.outstanding = outstanding
    assert three.pick(None) is three.members[1]


async def test_nobody_there_is_an_error_that_says_when_to_come_back() -> None:
    one = pool(1)
    for without in ([], one.members):
        if not without:
            one.members[0].said = None
        with pytest.raises(errors.Unavailable, match="nobody is there") as caught:
            one.pick("key", without)
        assert caught.value.retry_after


@contextlib.asynccontextmanager
async def asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, timeout: float = 20.0
) -> AsyncIterator[tuple[Workers, Vision, Language]]:
    """Workers that are asked only by the test."""
    monkeypatch.setattr(server.pool, "POLL_EVERY", 3600.0)
    monkeypatch.setattr(server.pool, "PROBE_TIMEOUT", timeout)
    vision, language = Vision(f"unix:{folder}/vision"), Language(folder, 0)
    await vision.start()
    await language.start()
    workers = Workers([vision.address], [language.sink.address], Metrics())
    try:
        await until(lambda: workers.vision.up() and workers.language.up(), "both answer")
        yield workers, vision, language
    finally:
        await workers.close()
        await vision.stop()
        await language.stop()


def there(workers: Workers) -> tuple[int, int]:
    return len(workers.vision.up()), len(workers.language.up())


async def all_there(workers: Workers) -> bool:
    return all(await workers.probe())


async def test_who_is_late_once_may_be_busy_who_is_late_twice_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with asked(tmp_path, monkeypatch, timeout=1.0) as (workers, vision, language):
        for late in (vision.answers, language.sink.answers, language.engine.answers):
            late.clear()
            which = (late is not vision.answers, late is vision.answers)
            assert await workers.probe() == which
            assert there(workers) == (1, 1)
            assert await workers.probe() == which
            assert there(workers) == tuple(map(int, which))
            late.set()
            assert await workers.probe() == (True, True)
            assert there(workers) == (1, 1)


async def test_who_has_ended_is_not_there_at_once_and_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with asked(tmp_path, monkeypatch) as (workers, vision, language):
        ends: list[tuple[Any, tuple[bool, bool]]] = [
            (vision, (False, True)), (language.sink, (True, False)), (language.engine, (True, False)),
        ]  # fmt: skip
        for peer, expected in ends:
            await peer.stop()
            assert await workers.probe() == expected
            assert there(workers) == tuple(map(int, expected))
            await peer.start()
            await until(lambda: all_there(workers), "it is found again")


@pytest.mark.parametrize("listed", [None, [], {}, {"data": None}, {"data": [{}]}, {"data": [5]}, {"data": {"a": 1}}, "x"])
async def test_an_engine_that_lists_no_models_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: Any
) -> None:
    async with asked(tmp_path, monkeypatch) as (workers, _, language):
        language.engine.models = listed
        assert await workers.probe() == (True, False)
        assert there(workers) == (1, 0)


async def test_an_engine_that_moved_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with asked(tmp_path, monkeypatch) as (workers, _, language):
        await language.engine.stop()
        language.engine.address = language.sink.http = f"unix:{tmp_path}/moved"
        await language.engine.start()
        assert all(await asyncio.gather(workers.probe(), workers.probe()))
        assert there(workers) == (1, 1)


@pytest.mark.parametrize(
    "changed",
    [
        {"fingerprint": "e" * 64}, {"width": 5}, {"tile_size": 224}, {"tokens_per_tile": 64}, {"relative_threshold": 0.5},
        {"compressed_tokens_per_tile": 0}, {"absolute_threshold": 0.5},
    ],
)  # fmt: skip
async def test_what_workers_disagree_in_is_named_with_both_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    async with asked(tmp_path, monkeypatch) as (workers, vision, _):
        assert workers.mismatch() is None
        vision.checkpoint = described(**changed)
        await workers.probe()
        said = workers.mismatch()
        assert said is not None
        ((name, value),) = changed.items()
        assert {name, str(value), str(getattr(described(), name))} <= set(said.replace(";", "").split())
