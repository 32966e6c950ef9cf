"""Probes: which workers are up, how names fill the pools, and what is exported of workers."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from common import errors
from server.workers.probes import WorkerPools
from tests.server.fakes.vllm import METRICS
from tests.server.fakes.waiting import wait_until
from tests.server.workers.helpers import count_up, start_named_pools, start_pools

KEYS = [f"key-{i}" for i in range(600)]


async def all_kinds_answer(workers: WorkerPools) -> bool:
    return all(await workers.probe())


async def visions_up_after_probe(workers: WorkerPools, count: int) -> bool:
    await workers.probe()
    return len(workers.vision.available()) == count


async def test_one_late_probe_is_tolerated_two_mark_the_worker_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with start_pools(tmp_path, monkeypatch, timeout=1.0) as (workers, vision, language):
        for responsive in (vision.responsive, language.sink.responsive, language.engine.responsive):
            responsive.clear()
            is_up = (responsive is not vision.responsive, responsive is vision.responsive)
            assert await workers.probe() == is_up
            assert count_up(workers) == (1, 1)
            assert await workers.probe() == is_up
            assert count_up(workers) == tuple(map(int, is_up))
            responsive.set()
            assert await workers.probe() == (True, True)
            assert count_up(workers) == (1, 1)


async def test_concurrent_probes_count_as_one_late_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with start_pools(tmp_path, monkeypatch, timeout=1.0) as (workers, vision, language):
        vision.responsive.clear()
        language.engine.responsive.clear()
        assert await asyncio.gather(*(workers.probe() for _ in range(5))) == [(False, False)] * 5
        assert count_up(workers) == (1, 1)


async def test_a_worker_that_stopped_is_down_at_once_and_up_when_it_runs_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with start_pools(tmp_path, monkeypatch) as (workers, vision, language):
        cases: list[tuple[Any, tuple[bool, bool]]] = [
            (vision, (False, True)), (language.sink, (True, False)), (language.engine, (True, False)),
        ]  # fmt: skip
        for server, is_up in cases:
            await server.stop()
            assert await workers.probe() == is_up
            assert count_up(workers) == tuple(map(int, is_up))
            await server.start()
            await wait_until(lambda: all_kinds_answer(workers), "the worker is up again")


@pytest.mark.parametrize("models", [None, [], {}, {"data": None}, {"data": [{}]}, {"data": [5]}, {"data": {"a": 1}}, "x"])
async def test_a_vllm_without_a_valid_list_of_models_is_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: Any
) -> None:
    async with start_pools(tmp_path, monkeypatch) as (workers, _, language):
        language.engine.models = models
        assert await workers.probe() == (True, False)
        assert count_up(workers) == (1, 0)


async def test_a_vllm_whose_address_changed_is_reached_at_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with start_pools(tmp_path, monkeypatch) as (workers, _, language):
        await language.engine.stop()
        language.engine.address = language.sink.http = f"unix:{tmp_path}/moved"
        await language.engine.start()
        assert all(await asyncio.gather(workers.probe(), workers.probe()))
        assert count_up(workers) == (1, 1)


@pytest.mark.parametrize(
    "metrics",
    [
        "", "# nothing\n", "x" * 5_000_000, "vllm:num_requests_waiting 1\n", METRICS.replace(" 7.0", " many"),
        METRICS.replace("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
    ],
    ids=["empty", "comment only", "too large", "incomplete", "not a number", "other metric name"],
)  # fmt: skip
async def test_a_vllm_that_does_not_report_its_load_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metrics: str
) -> None:
    async with start_pools(tmp_path, monkeypatch) as (workers, _, language):
        client = workers.language.workers[0].client
        language.engine.metrics = METRICS
        assert await client.load(20) == (8, 5, 0.5), "requests of both engines, and the fullest KV cache"
        language.engine.metrics = METRICS + 'vllm:num_requests_waiting_by_reason{engine="0",reason="deferred"} 3.0\n'
        assert await client.load(20) == (5, 5, 0.5), "three wait for images"
        language.engine.metrics = metrics
        assert await client.load(20) is None
        assert await workers.probe() == (True, True)


async def test_workers_of_a_name_are_added_when_it_first_resolves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with start_named_pools(tmp_path, monkeypatch) as (workers, names):
        assert await workers.probe() == (False, True)
        assert names.exported() == {}
        await names.set_visions(0, 1)
        await wait_until(lambda: count_up(workers) == (2, 1), "both workers are added, probed and up without another poll")
        assert names.exported() == {worker.address: 1 for worker in names.visions}


async def test_a_new_worker_gets_requests_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with start_named_pools(tmp_path, monkeypatch) as (workers, names):
        await names.set_visions(0)
        await wait_until(lambda: count_up(workers) == (1, 1), "the first worker is up")
        await names.set_visions(1, 0)
        await wait_until(lambda: count_up(workers) == (2, 1), "the second worker is up")
        assert {workers.vision.pick(key).address for key in KEYS} == {worker.address for worker in names.visions}


async def test_a_new_worker_that_does_not_answer_gets_no_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with start_named_pools(tmp_path, monkeypatch) as (workers, names):
        running, starting = names.visions
        await starting.stop()
        await names.set_visions(0, 1)
        await wait_until(lambda: len(workers.vision.workers) == 2 and workers.vision.available(), "both workers are members")
        assert names.exported() == {running.address: 1, starting.address: 0}
        assert {workers.vision.pick(key).address for key in KEYS} == {running.address}
        await starting.start()
        await wait_until(lambda: visions_up_after_probe(workers, 2), "the second worker is up")


async def test_an_unlisted_worker_stays_while_it_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with start_named_pools(tmp_path, monkeypatch) as (workers, names):
        await names.set_visions(0, 1)
        await wait_until(lambda: count_up(workers) == (2, 1), "both workers are up")
        unlisted, listed = names.visions
        await names.set_visions(1)
        await workers.probe()
        await workers.vision.prune()
        assert names.exported() == {unlisted.address: 1, listed.address: 1}, "it may finish its requests"
        assert [worker.address for worker in workers.vision.available()] == [listed.address], "it gets no new ones"
        await unlisted.stop()
        await workers.probe()
        assert names.exported() == {unlisted.address: 0, listed.address: 1}
        await workers.vision.prune()
        assert names.exported() == {listed.address: 1}
        assert [worker.address for worker in workers.vision.workers] == [listed.address]
        await unlisted.start()
        await names.set_visions(0, 1)
        await wait_until(lambda: visions_up_after_probe(workers, 2), "the worker is up again")
        assert count_up(workers) == (2, 1)


async def test_a_failing_resolver_removes_no_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with start_named_pools(tmp_path, monkeypatch) as (workers, names):
        await names.set_visions(0, 1)
        await wait_until(lambda: count_up(workers) == (2, 1), "both workers are up")
        del names.addresses["vision"]
        await names.wait_for_lookups()
        await names.visions[0].stop()
        await workers.probe()
        await workers.vision.prune()
        assert names.exported() == {names.visions[0].address: 0, names.visions[1].address: 1}


async def test_the_client_of_a_removed_worker_is_closed_after_its_last_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with start_named_pools(tmp_path, monkeypatch) as (workers, names):
        await names.set_visions(0)
        await wait_until(lambda: count_up(workers) == (1, 1), "the worker is up")
        (worker,) = workers.vision.workers
        await names.set_visions()
        await names.visions[0].stop()
        with worker.in_use():
            await workers.probe()
            await workers.vision.prune()
            assert workers.vision.workers == []
            with pytest.raises(errors.Unavailable):
                await worker.client.describe(1)
        await workers.vision.prune()
        assert worker.client._connection.channel.get_state() is grpc.ChannelConnectivity.SHUTDOWN


async def test_static_addresses_and_names_can_be_combined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with start_named_pools(tmp_path, monkeypatch, vision_count=3, static=[0, 2]) as (workers, names):
        await names.set_visions(0, 1)
        await wait_until(lambda: count_up(workers) == (3, 1), "each worker is up, and a member once")
        await names.set_visions()
        for worker in names.visions:
            await worker.stop()
        await workers.probe()
        await workers.vision.prune()
        assert names.exported() == {names.visions[i].address: 0 for i in (0, 2)}, "static addresses are never removed"


EXPORT_TWICE = """
import asyncio
from server.metrics import Metrics
from server.workers.probes import WorkerPools

async def main():
    metrics = Metrics()
    async with WorkerPools(["a:1", "b:1"], ["c:1"], metrics) as workers:
        metrics.encodes.inc(3)
        print(metrics.text().decode(), "---", sep="\\n")
        del workers.vision.workers[0]
        print(metrics.text().decode())

asyncio.run(main())
"""


@pytest.mark.parametrize("multiprocess", [False, True])
def test_a_removed_worker_is_no_longer_exported(tmp_path: Path, multiprocess: bool) -> None:
    # in a process of its own: prometheus-client reads the variable when it is imported
    variables = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)} if multiprocess else {}
    command = [sys.executable, "-c", EXPORT_TWICE]
    process = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **variables})
    before, after = process.stdout.split("---")
    assert "dvd_encodes_total 3.0" in before
    assert "dvd_encodes_total 3.0" in after
    exported = [{line for line in text.splitlines() if line.startswith("dvd_worker_up")} for text in (before, after)]
    removed = 'dvd_worker_up{address="a:1",kind="vision"} 0.0'
    others = {'dvd_worker_up{address="b:1",kind="vision"} 0.0', 'dvd_worker_up{address="c:1",kind="language"} 0.0'}
    assert exported == [{removed} | others, others]
    assert bool(list(tmp_path.iterdir())) == multiprocess
