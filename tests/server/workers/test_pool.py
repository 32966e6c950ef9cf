"""Which worker gets a request, and how the gateway learns who is there."""

import asyncio
import contextlib
import os
import re
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Collection, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

import server.workers.discovery
import server.workers.probes
from common import errors
from protos import vision_pb2
from server.metrics import Metrics
from server.workers.clients import VisionClient
from server.workers.pool import Pool
from server.workers.probes import WorkerPools
from server.workers.worker import VisionWorker
from tests.server.fakes.language_worker import FakeLanguageWorker
from tests.server.fakes.vision_worker import FakeVisionWorker, checkpoint_description
from tests.server.fakes.vllm import METRICS
from tests.server.fakes.waiting import wait_until

KEYS = [f"key-{i}" for i in range(600)]


def pool(count: int) -> Pool[VisionWorker]:
    made = Pool("vision", lambda address: VisionWorker(VisionClient(address)), "nobody is there")
    for worker in made.set_members("", [f"unix:/nowhere/{i}" for i in range(count)]):
        worker.mark_up(vision_pb2.VisionDescription())
    return made


async def test_a_key_always_goes_to_the_same_worker_and_keys_are_spread() -> None:
    three = pool(3)
    first = [three.pick(key) for key in KEYS]
    assert [three.pick(key) for key in KEYS] == first
    assert min(Counter(map(id, first)).values()) > 130


async def test_only_the_keys_of_a_worker_that_left_move() -> None:
    three = pool(3)
    first = [three.pick(key) for key in KEYS]
    gone = three.workers[1]
    gone.mark_down("gone")
    second = [three.pick(key) for key in KEYS]
    assert gone not in second
    assert [b for a, b in zip(first, second, strict=True) if a is not gone] == [a for a in first if a is not gone]
    assert len({id(b) for a, b in zip(first, second, strict=True) if a is gone}) == 2, "both others take of its keys"
    gone.mark_up(vision_pb2.VisionDescription())
    assert [three.pick(key) for key in KEYS] == first


async def test_a_worker_far_busier_than_the_others_gets_no_more() -> None:
    two = pool(2)
    chosen = two.pick("key")
    with contextlib.ExitStack() as requests:
        while two.pick("key") is chosen:
            requests.enter_context(chosen.track_in_flight())
            assert chosen.outstanding < 50
        assert chosen.outstanding > 2, "a little busier does not matter"
    assert chosen.outstanding == 0


@pytest.mark.parametrize("busy", [0, 1, 1000])
async def test_there_is_always_one_to_pick(busy: int) -> None:
    for count in (1, 2, 3):
        some = pool(count)
        with contextlib.ExitStack() as requests:
            for worker in some.workers:
                for _ in range(busy):
                    requests.enter_context(worker.track_in_flight())
            assert some.pick("key") in some.workers


async def test_without_a_key_the_least_busy_is_picked() -> None:
    three = pool(3)
    with contextlib.ExitStack() as requests:
        for worker, outstanding in zip(three.workers, (5, 2, 7), strict=True):
            for _ in range(outstanding):
                requests.enter_context(worker.track_in_flight())
        assert three.pick(None) is three.workers[1]


async def test_nobody_there_is_an_error_that_says_when_to_come_back() -> None:
    one = pool(1)
    for without in ([], one.workers):
        if not without:
            one.workers[0].mark_down("gone")
        with pytest.raises(errors.Unavailable, match="nobody is there") as caught:
            one.pick("key", without)
        assert caught.value.retry_after


@contextlib.asynccontextmanager
async def asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, timeout: float = 20.0
) -> AsyncIterator[tuple[WorkerPools, FakeVisionWorker, FakeLanguageWorker]]:
    """WorkerPools that are asked only by the test."""
    monkeypatch.setattr(server.workers.probes, "POLL_INTERVAL_SECONDS", 3600.0)
    monkeypatch.setattr(server.workers.probes, "PROBE_TIMEOUT_SECONDS", timeout)
    vision, language = FakeVisionWorker(f"unix:{folder}/vision"), FakeLanguageWorker(folder, 0)
    await vision.start()
    await language.start()
    try:
        async with WorkerPools([vision.address], [language.sink.address], Metrics()) as workers:
            await wait_until(lambda: workers.vision.available() and workers.language.available(), "both answer")
            await workers.probe()  # the first one has ended then
            yield workers, vision, language
    finally:
        await vision.stop()
        await language.stop()


def there(workers: WorkerPools) -> tuple[int, int]:
    return len(workers.vision.available()), len(workers.language.available())


async def all_there(workers: WorkerPools) -> bool:
    return all(await workers.probe())


async def test_who_is_late_once_may_be_busy_who_is_late_twice_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with asked(tmp_path, monkeypatch, timeout=1.0) as (workers, vision, language):
        for late in (vision.responsive, language.sink.responsive, language.engine.responsive):
            late.clear()
            which = (late is not vision.responsive, late is vision.responsive)
            assert await workers.probe() == which
            assert there(workers) == (1, 1)
            assert await workers.probe() == which
            assert there(workers) == tuple(map(int, which))
            late.set()
            assert await workers.probe() == (True, True)
            assert there(workers) == (1, 1)


async def test_who_is_asked_by_several_at_once_is_late_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with asked(tmp_path, monkeypatch, timeout=1.0) as (workers, vision, language):
        vision.responsive.clear()
        language.engine.responsive.clear()
        assert await asyncio.gather(*(workers.probe() for _ in range(5))) == [(False, False)] * 5
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
            await wait_until(lambda: all_there(workers), "it is found again")


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
    "said",
    [
        "", "# nothing\n", "x" * 5_000_000, "vllm:num_requests_waiting 1\n", METRICS.replace(" 7.0", " many"),
        METRICS.replace("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
    ],
    ids=["empty", "a comment", "too much", "a part", "no number", "another name"],
)  # fmt: skip
async def test_an_engine_that_does_not_say_its_load_is_there_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    async with asked(tmp_path, monkeypatch) as (workers, _, language):
        client = workers.language.workers[0].client
        assert await client.load(20) == (8, 5, 0.5), "of both engines: requests together, the fullest cache"
        language.engine.metrics = said
        assert await client.load(20) is None
        assert await workers.probe() == (True, True)


@pytest.mark.parametrize(
    "changed",
    [
        {"fingerprint": "e" * 64}, {"width": 5}, {"tile_size": 224}, {"tokens_per_tile": 64}, {"relative_threshold": 0.5},
        {"compressed_tokens_per_tile": 0}, {"absolute_threshold": 0.5}, {"min_tiles": 2}, {"max_tiles": 6},
        {"thumbnail": False},
    ],
)  # fmt: skip
async def test_what_workers_disagree_in_is_named_with_both_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    async with asked(tmp_path, monkeypatch) as (workers, vision, language):
        assert workers.mismatch() is None
        vision.checkpoint = checkpoint_description(**changed)
        await workers.probe()
        said = workers.mismatch()
        assert said is not None
        ((name, value),) = changed.items()
        values = {name, str(value), str(getattr(checkpoint_description(), name))}
        assert values <= set(said.summary.replace(";", "").split())
        assert values <= set(said.details.replace(";", "").split())
        for kind, address in (("vision", vision.address), ("language", language.sink.address)):
            assert f"({kind} worker {address})" in said.details
            assert address not in said.summary, "callers need not know where"


async def test_the_odd_one_out_is_named_apart_from_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with names(tmp_path, monkeypatch, vision=7) as (workers, zone):
        zone.visions[3].checkpoint = checkpoint_description(width=5)
        await zone.has(*range(7))
        await wait_until(lambda: there(workers) == (7, 1), "all there")
        said = workers.mismatch()
        assert said is not None
        others = ", ".join(f"vision worker {zone.visions[i].address}" for i in (0, 1, 2, 4))
        assert f"width 4 ({others} and 3 more) and 5 (vision worker {zone.visions[3].address});" in said.details


async def test_a_dtype_that_no_vision_worker_delivers_is_a_mismatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with asked(tmp_path, monkeypatch) as (workers, _, language):
        for number, wrong in ((9, True), (0, True), (1, False)):
            language.sink.dtype = number
            await workers.probe()
            said = workers.mismatch()
            assert bool(said) == wrong
            if said:
                assert f"dtype number {number}, but vision workers deliver bfloat16, float16, float32" in said.summary
                assert said.details.startswith(f"language worker {language.sink.address} computes in")


class Zone:
    """What names stand for, and the peers that may be behind them. A name that has no addresses here does not resolve."""

    def __init__(self, folder: Path, visions: int) -> None:
        self.addresses: dict[str, list[str]] = {}
        self.asked: Counter[str] = Counter()
        self.visions, self.language = (
            [FakeVisionWorker(f"unix:{folder}/v{i}") for i in range(visions)],
            FakeLanguageWorker(folder, 0),
        )
        self.metrics = Metrics()

    async def resolve(self, name: str, port: int) -> Collection[str]:
        assert port == 1
        self.asked[name] += 1
        if name not in self.addresses:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return self.addresses[name]

    async def has(self, *visions: int) -> None:
        """Change what the name of the vision workers stands for; return when that has been taken over."""
        self.addresses["vision"] = [self.visions[i].address for i in visions]
        await self.taken_over()

    async def taken_over(self) -> None:
        before = self.asked["vision"]  # the first question from now on may be under way: the third follows what the second told
        await wait_until(lambda: self.asked["vision"] >= before + 3, "the name is asked for again")

    def shown(self) -> dict[str, float]:
        """`dvd_worker_up` of each vision worker."""
        lines = self.metrics.text().decode().splitlines()
        found = (re.fullmatch(r'dvd_worker_up\{address="(.+)",kind="vision"\} (.+)', line) for line in lines)
        return {line[1]: float(line[2]) for line in found if line}


@contextlib.asynccontextmanager
async def names(
    folder: Path, monkeypatch: pytest.MonkeyPatch, vision: int = 2, static: Sequence[int] = ()
) -> AsyncIterator[tuple[WorkerPools, Zone]]:
    """Pools filled by names, resolved without a pause, beside static addresses. Only new workers are probed, or by the test."""
    monkeypatch.setattr(server.workers.probes, "POLL_INTERVAL_SECONDS", 3600.0)
    monkeypatch.setattr(server.workers.probes, "PROBE_TIMEOUT_SECONDS", 20.0)
    monkeypatch.setattr(server.workers.discovery, "RESOLVE_INTERVAL_SECONDS", 0.01)
    zone = Zone(folder, vision)
    for peer in (*zone.visions, zone.language):
        await peer.start()
    zone.addresses["language"] = [zone.language.sink.address]
    visions = [*(zone.visions[i].address for i in static), "dns:vision:1"]
    try:
        async with WorkerPools(visions, ["dns:language:1"], zone.metrics, zone.resolve) as workers:
            await wait_until(lambda: workers.language.available(), "the name of the language worker is found")
            yield workers, zone
    finally:
        for peer in (*zone.visions, zone.language):
            await peer.stop()


async def test_a_name_that_does_not_resolve_yet_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with names(tmp_path, monkeypatch) as (workers, zone):
        assert await workers.probe() == (False, True)
        assert zone.shown() == {}
        await zone.has(0, 1)
        await wait_until(lambda: there(workers) == (2, 1), "found, asked and there without another poll")
        assert zone.shown() == {peer.address: 1 for peer in zone.visions}


async def test_who_comes_gets_requests_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with names(tmp_path, monkeypatch) as (workers, zone):
        first, second = (peer.address for peer in zone.visions)
        await zone.has(0)
        await wait_until(lambda: there(workers) == (1, 1), "the first")
        await zone.has(1, 0)
        await wait_until(lambda: there(workers) == (2, 1), "the second")
        assert {workers.vision.pick(key).address for key in KEYS} == {first, second}


async def test_who_comes_but_does_not_answer_gets_nothing_until_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with names(tmp_path, monkeypatch) as (workers, zone):
        starting = zone.visions[1]
        await starting.stop()
        await zone.has(0, 1)
        await wait_until(lambda: len(workers.vision.workers) == 2 and workers.vision.available(), "both known")
        assert zone.shown() == {zone.visions[0].address: 1, starting.address: 0}
        assert {workers.vision.pick(key).address for key in KEYS} == {zone.visions[0].address}
        await starting.start()
        await wait_until(lambda: probed(workers, 2), "it has started")


async def probed(workers: WorkerPools, visions: int) -> bool:
    await workers.probe()
    return len(workers.vision.available()) == visions


async def test_who_is_no_longer_listed_stays_while_it_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with names(tmp_path, monkeypatch) as (workers, zone):
        await zone.has(0, 1)
        await wait_until(lambda: there(workers) == (2, 1), "both")
        gone, stays = zone.visions
        await zone.has(1)
        await workers.probe()
        await workers.vision.prune()
        assert there(workers) == (2, 1), "a resolver may leave out some"
        await gone.stop()
        await workers.probe()
        assert zone.shown() == {gone.address: 0, stays.address: 1}
        await workers.vision.prune()
        assert zone.shown() == {stays.address: 1}
        assert [worker.address for worker in workers.vision.workers] == [stays.address]
        await gone.start()
        await zone.has(0, 1)
        await wait_until(lambda: probed(workers, 2), "it may come back")
        assert there(workers) == (2, 1)


async def test_a_resolver_that_fails_takes_nobody_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with names(tmp_path, monkeypatch) as (workers, zone):
        await zone.has(0, 1)
        await wait_until(lambda: there(workers) == (2, 1), "both")
        del zone.addresses["vision"]
        await zone.taken_over()
        await zone.visions[0].stop()
        await workers.probe()
        await workers.vision.prune()
        assert zone.shown() == {zone.visions[0].address: 0, zone.visions[1].address: 1}


async def test_who_left_is_closed_once_nobody_uses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with names(tmp_path, monkeypatch) as (workers, zone):
        await zone.has(0)
        await wait_until(lambda: there(workers) == (1, 1), "there")
        (worker,) = workers.vision.workers
        await zone.has()
        await zone.visions[0].stop()
        with worker.in_use():
            await workers.probe()
            await workers.vision.prune()
            assert workers.vision.workers == []
            with pytest.raises(errors.Unavailable):
                await worker.client.describe(1)
        await workers.vision.prune()
        assert worker.client._channel.get_state() is grpc.ChannelConnectivity.SHUTDOWN


async def test_static_workers_and_names_are_one_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with names(tmp_path, monkeypatch, vision=3, static=[0, 2]) as (workers, zone):
        await zone.has(0, 1)
        await wait_until(lambda: there(workers) == (3, 1), "each once")
        await zone.has()
        for peer in zone.visions:
            await peer.stop()
        await workers.probe()
        await workers.vision.prune()
        assert zone.shown() == {zone.visions[i].address: 0 for i in (0, 2)}, "the operator's own stay"


SHOWN_TWICE = """
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


@pytest.mark.parametrize("several", [False, True])
def test_who_has_left_is_not_shown_by_one_of_several_processes_either(tmp_path: Path, several: bool) -> None:
    variables = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)} if several else {}  # read when prometheus-client is imported
    command = [sys.executable, "-c", SHOWN_TWICE]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **variables})
    before, after = done.stdout.split("---")
    assert "dvd_encodes_total 3.0" in before
    assert "dvd_encodes_total 3.0" in after
    found = [{line for line in text.splitlines() if line.startswith("dvd_worker_up")} for text in (before, after)]
    gone = 'dvd_worker_up{address="a:1",kind="vision"} 0.0'
    stay = {'dvd_worker_up{address="b:1",kind="vision"} 0.0', 'dvd_worker_up{address="c:1",kind="language"} 0.0'}
    assert found == [{gone} | stay, stay]
    assert bool(list(tmp_path.iterdir())) == several
