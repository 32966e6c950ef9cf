"""Pools: which worker gets a request, and which workers are members."""

import contextlib
from collections import Counter

import grpc
import pytest

from common import errors
from protos import vision_pb2
from server.workers.clients import VisionClient
from server.workers.pool import Pool
from server.workers.worker import VisionWorker

KEYS = [f"key-{i}" for i in range(600)]


def make_pool(count: int) -> Pool[VisionWorker]:
    """Return a pool of `count` workers, all of them up."""
    pool = Pool("vision", lambda address: VisionWorker(VisionClient(address)), "No vision worker is available.")
    for worker in pool.set_members("", [f"unix:/nowhere/{i}" for i in range(count)]):
        worker.mark_up(vision_pb2.VisionDescription())
    return pool


async def test_a_key_always_goes_to_the_same_worker_and_keys_are_spread() -> None:
    pool = make_pool(3)
    first = [pool.pick(key) for key in KEYS]
    assert [pool.pick(key) for key in KEYS] == first
    assert min(Counter(map(id, first)).values()) > 130


async def test_only_the_keys_of_a_worker_that_is_down_move() -> None:
    pool = make_pool(3)
    before = [pool.pick(key) for key in KEYS]
    down = pool.workers[1]
    down.mark_down("stopped")
    after = [pool.pick(key) for key in KEYS]
    assert down not in after
    pairs = list(zip(before, after, strict=True))
    assert all(new is old for old, new in pairs if old is not down)
    assert len({id(new) for old, new in pairs if old is down}) == 2, "both other workers get some of its keys"
    down.mark_up(vision_pb2.VisionDescription())
    assert [pool.pick(key) for key in KEYS] == before


async def test_a_worker_far_busier_than_the_others_is_not_picked() -> None:
    pool = make_pool(2)
    picked = pool.pick("key")
    with contextlib.ExitStack() as requests:
        while pool.pick("key") is picked:
            requests.enter_context(picked.track_in_flight())
            assert picked.outstanding < 50
        assert picked.outstanding > 2, "a small difference does not move a key"
    assert picked.outstanding == 0


@pytest.mark.parametrize("requests_per_worker", [0, 1, 1000])
async def test_a_worker_is_picked_however_busy_all_are(requests_per_worker: int) -> None:
    for count in (1, 2, 3):
        pool = make_pool(count)
        with contextlib.ExitStack() as requests:
            for worker in pool.workers:
                for _ in range(requests_per_worker):
                    requests.enter_context(worker.track_in_flight())
            assert pool.pick("key") in pool.workers


async def test_the_least_busy_worker_is_picked_without_a_key() -> None:
    pool = make_pool(3)
    with contextlib.ExitStack() as requests:
        for worker, outstanding in zip(pool.workers, (5, 2, 7), strict=True):
            for _ in range(outstanding):
                requests.enter_context(worker.track_in_flight())
        assert pool.pick(None) is pool.workers[1]


@pytest.mark.parametrize("reason", ["excluded", "down"])
async def test_a_pool_without_an_available_worker_raises_a_retryable_error(reason: str) -> None:
    pool = make_pool(1)
    if reason == "down":
        pool.workers[0].mark_down("stopped")
    with pytest.raises(errors.Unavailable, match="No vision worker is available") as error_info:
        pool.pick("key", exclude=pool.workers if reason == "excluded" else [])
    assert error_info.value.retry_after


async def test_set_members_creates_only_new_workers() -> None:
    pool = make_pool(2)
    first, second = pool.workers
    (new,) = pool.set_members("dns:vision:1", [second.address, "unix:/nowhere/2", "unix:/nowhere/2"])
    assert new.address == "unix:/nowhere/2"
    assert pool.workers == [first, second, new]


async def test_prune_removes_workers_that_are_down_and_unlisted() -> None:
    pool = make_pool(0)
    pool.set_members("a", ["unix:/nowhere/0", "unix:/nowhere/1"])
    pool.set_members("b", ["unix:/nowhere/2", "unix:/nowhere/3"])
    unlisted_down, listed_down, unlisted_up, listed_up = pool.workers
    for worker in (unlisted_up, listed_up):
        worker.mark_up(vision_pb2.VisionDescription())
    pool.set_members("a", [listed_down.address])
    pool.set_members("b", [listed_up.address])
    await pool.prune()
    assert pool.workers == [listed_down, unlisted_up, listed_up]
    assert unlisted_down.client._connection.channel.get_state() is grpc.ChannelConnectivity.SHUTDOWN


def fail(pool: Pool[VisionWorker], worker: VisionWorker, times: int = 5) -> None:
    for _ in range(times):
        pool.record_failure(worker)


async def test_a_worker_that_fails_what_others_serve_gets_no_requests() -> None:
    pool = make_pool(3)
    bad = pool.workers[1]
    fail(pool, bad, 4)
    assert bad in pool.available()
    fail(pool, bad, 1)
    assert bad not in pool.available()
    assert all(pool.pick(key) is not bad for key in KEYS)
    assert bad.is_up


@pytest.mark.parametrize(("count", "most"), [(1, 0), (2, 1), (3, 1), (4, 2)])
async def test_at_least_half_of_the_workers_are_never_ejected(count: int, most: int) -> None:
    pool = make_pool(count)
    for worker in pool.workers:
        fail(pool, worker)
    assert len(pool.workers) - len(pool.available()) == most


async def test_a_worker_that_is_ejected_is_better_than_none() -> None:
    pool = make_pool(2)
    bad, good = pool.workers
    fail(pool, bad)
    assert pool.pick("key") is good
    assert pool.pick("key", exclude=[good]) is bad
    good.mark_down("stopped")
    assert pool.pick("key") is bad


async def test_a_worker_far_slower_than_the_others_is_ejected() -> None:
    pool = make_pool(3)
    for worker, tiles in zip(pool.workers, (100, 100, 10), strict=True):
        for second in range(20):
            worker.throughput.update(second, tiles, is_saturated=True)
    for worker in pool.workers:
        pool.check_speed(worker)
    assert pool.available() == pool.workers[:2]


async def test_a_spare_worker_is_not_ejected_for_being_slower_than_the_others() -> None:
    pool = make_pool(3)
    pool.workers[2].mark_up(vision_pb2.VisionDescription(spare=True))
    for worker, tiles in zip(pool.workers, (100, 100, 10), strict=True):
        for second in range(20):
            worker.throughput.update(second, tiles, is_saturated=True)
    for worker in pool.workers:
        pool.check_speed(worker)
    assert pool.available() == pool.workers


async def test_a_draining_worker_gets_no_requests() -> None:
    pool = make_pool(2)
    draining, other = pool.workers
    draining.mark_up(vision_pb2.VisionDescription(draining=True))
    assert draining.is_up
    assert {pool.pick(key) for key in KEYS} == {other}
    with pytest.raises(errors.Unavailable):
        pool.pick("key", exclude=[other])


async def test_a_worker_that_is_no_longer_listed_gets_no_requests_after_a_few_lookups() -> None:
    pool = make_pool(0)
    pool.set_members("dns:vision:1", ["unix:/nowhere/0", "unix:/nowhere/1"])
    removed, kept = pool.workers
    for worker in pool.workers:
        worker.mark_up(vision_pb2.VisionDescription())
    for _ in range(2):
        pool.set_members("dns:vision:1", [kept.address])
        assert removed in pool.available(), "a resolver may omit an address"
    pool.set_members("dns:vision:1", [kept.address])
    assert pool.available() == [kept]
    assert removed in pool.workers, "it may still finish requests"
    pool.set_members("dns:vision:1", [kept.address, removed.address])
    assert removed in pool.available()
    for _ in range(3):
        pool.set_members("dns:vision:1", [])
    assert pool.available() == [removed, kept], "an empty answer must not become an outage"
