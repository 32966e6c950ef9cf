"""Threads that hang are reported, threads that are slow are not; over a real socket where `Describe` matters."""

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from common import rpc
from common.checkpoint import open_checkpoint
from common.tiling import Tiling
from common.tracing import Trace
from protos import embeddings_pb2, vision_pb2_grpc
from protos import vision_pb2 as pb
from tests.vision_worker import golden
from tests.vision_worker.images import start_image_decoder
from vision_worker import liveness
from vision_worker.batcher import Batcher
from vision_worker.cache.embedding_cache import EmbeddingCache
from vision_worker.delivery import SinkChannels
from vision_worker.encoder import Placement
from vision_worker.liveness import CpuClock, Progress, Watch
from vision_worker.metrics import Metrics
from vision_worker.models.fake import Fake
from vision_worker.prepare_threads import PrepareThreads
from vision_worker.preprocessing.tiling import Tiles
from vision_worker.process import watch_threads
from vision_worker.service import Service


@dataclass
class Thread:
    """A thread's progress, as a watch samples it."""

    busy: bool = True
    completed: int = 0
    cpu_seconds: float = 0.0

    def watch(self, limit: float = math.inf) -> Watch:
        return Watch("a batch", lambda: Progress(self.busy, self.completed, self.cpu_seconds), 3.0, lambda: limit)


def test_work_without_cpu_time_is_stalled_after_three_seconds() -> None:
    thread = Thread()
    watch = thread.watch()
    reasons = [watch.check(0.5) for _ in range(8)]
    assert reasons[:6] == [""] * 6
    assert reasons[6:] == ["a batch has used no CPU time for more than 3 s"] * 2
    thread.completed += 1
    assert watch.check(0.5) == ""


def test_a_little_cpu_time_is_progress() -> None:
    """A thread that competes with many processes."""
    thread = Thread()
    watch = thread.watch()
    for _ in range(1000):
        thread.cpu_seconds += 0.0005
        assert watch.check(0.5) == ""


def test_waking_up_is_no_progress() -> None:
    thread = Thread()
    watch = thread.watch()
    for _ in range(7):
        thread.cpu_seconds += 1e-5
        reason = watch.check(0.5)
    assert reason


def test_a_batch_that_takes_too_long_is_stalled_although_it_uses_the_cpu() -> None:
    thread = Thread()
    watch = thread.watch(limit=60.0)
    for _ in range(120):
        thread.cpu_seconds += 0.5
        assert watch.check(0.5) == ""
    thread.cpu_seconds += 0.5
    assert watch.check(0.5) == "a batch has taken longer than 60 s (--progress-timeout)"


def test_batch_after_batch_is_progress_whatever_they_take_together() -> None:
    thread = Thread()
    watch = thread.watch(limit=1.0)
    for _ in range(100):
        thread.completed += 1
        assert watch.check(0.9) == ""


def test_idle_time_is_counted_from_the_end_of_the_last_work() -> None:
    thread = Thread(busy=False)
    watch = thread.watch()
    for _ in range(10):
        assert watch.check(1.0) == ""
    assert watch.idle_seconds == 10
    thread.completed += 1  # work that began and ended between two checks
    watch.check(1.0)
    assert watch.idle_seconds == 0
    thread.busy = True
    watch.check(1.0)
    assert watch.idle_seconds == 0


def test_the_clock_measures_registered_threads_only_and_survives_their_end() -> None:
    clock, enough, end = CpuClock(), threading.Event(), threading.Event()

    def work() -> None:
        clock.register()
        while clock.seconds() < 0.01:
            pass
        enough.set()
        end.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    assert enough.wait(60)
    before = clock.seconds()
    assert before >= 0.01
    spent = time.thread_time()
    while time.thread_time() - spent < 0.1:
        pass
    assert clock.seconds() - before < 0.1
    end.set()
    thread.join()
    clock.seconds()


class SlowEncoder(Fake):
    """Its `forward` and `prepare` hang while their event is clear; `forward` first burns `cpu_seconds` of CPU time."""

    def __init__(self) -> None:
        super().__init__(
            open_checkpoint(golden.FOLDER / "flash-qwen3/checkpoint"), Placement(torch.device("cpu"), torch.float32)
        )
        self.device, self.decoder = threading.Event(), threading.Event()
        self.device.set()
        self.decoder.set()
        self.cpu_seconds = 0.0
        self.forwards = 0

    def prepare(self, image: npt.NDArray[np.uint8], options: Tiling) -> Tiles:
        assert self.decoder.wait(120)
        return super().prepare(image, options)

    def forward(self, pixels: Tensor) -> Tensor:
        self.forwards += 1
        end = time.thread_time() + self.cpu_seconds
        while time.thread_time() < end:
            pass
        assert self.device.wait(120)
        return super().forward(pixels)


@dataclass
class Worker:
    """A vision worker over a socket."""

    stub: vision_pb2_grpc.VisionStub
    encoder: SlowEncoder
    fingerprint: str

    async def stalled(self) -> str:
        # a real deadline: a probe must be answered although the device hangs
        description: pb.VisionDescription = await self.stub.Describe(embeddings_pb2.DescribeRequest(), timeout=10)
        return description.stalled

    async def until(self, text: str) -> None:
        """Wait until `stalled` contains `text`; empty: until it is empty."""
        async with asyncio.timeout(60):
            reason = await self.stalled()
            while text not in reason if text else reason:
                await asyncio.sleep(0.05)
                reason = await self.stalled()

    def encode(self, name: str = "square.png", key: str = "a") -> "asyncio.Future[pb.EncodeReply]":
        request = pb.EncodeRequest(
            images=[pb.Image(key=key, data=golden.image(name))], dtype=embeddings_pb2.FLOAT32, dry_run=True,
            fingerprint=self.fingerprint,
        )  # fmt: skip
        call: asyncio.Future[pb.EncodeReply] = asyncio.ensure_future(self.stub.Encode(request, timeout=120))
        return call


@contextlib.asynccontextmanager
async def start(folder: Path, progress_timeout: float = 0) -> AsyncIterator[Worker]:
    encoder, metrics, address = SlowEncoder(), Metrics(), f"unix:{folder}/vision"
    server = rpc.create_server(address)
    with start_image_decoder(metrics.decoder) as (decoder, _), PrepareThreads(1) as threads:
        async with (
            Batcher(encoder, 4, metrics) as batcher,
            SinkChannels() as sinks,
            watch_threads(batcher, threads, "cpu", progress_timeout) as watched,
            rpc.open_channel(address) as channel,
        ):
            service = Service(
                encoder=encoder, decoder=decoder, batcher=batcher, sinks=sinks, cache=EmbeddingCache(None),
                prepare_threads=threads,
                liveness=watched, draining=asyncio.Event(), metrics=metrics,
                trace=Trace(None, "vision"),
            )  # fmt: skip
            vision_pb2_grpc.add_VisionServicer_to_server(service, server)
            await server.start()
            try:
                yield Worker(vision_pb2_grpc.VisionStub(channel), encoder, encoder.checkpoint.fingerprint)
            finally:
                encoder.device.set()
                encoder.decoder.set()
                await server.stop(0)


@pytest.fixture
def quick_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "CHECK_SECONDS", 0.05)
    monkeypatch.setattr("vision_worker.process.IDLE_CPU_SECONDS", 1.0)
    monkeypatch.setattr("vision_worker.process.PREPARE_IDLE_CPU_SECONDS", 1.0)


async def test_a_device_that_hangs_is_reported_and_so_is_its_recovery(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dvd.vision")
    async with start(tmp_path) as worker:
        assert await worker.stalled() == ""
        worker.encoder.device.clear()
        call = worker.encode()
        await worker.until("a batch on cpu has used no CPU time for more than 3 s")
        assert not call.done()
        worker.encoder.device.set()
        await worker.until("")
        assert (await call).images[0].tokens
    begin, end = (record.getMessage() for record in caplog.records if record.name == "dvd.vision")
    assert begin.startswith("stalled: a batch on cpu has used no CPU time")
    assert end.startswith("progress again, after ")


@pytest.mark.usefixtures("quick_checks")
async def test_a_device_that_computes_for_long_is_not_stalled(tmp_path: Path) -> None:
    async with start(tmp_path) as worker:
        worker.encoder.cpu_seconds = 4.0
        call, reasons = worker.encode(), []
        while not call.done():
            reasons.append(await worker.stalled())
            await asyncio.sleep(0.02)
        await call
    assert set(reasons) == {""}


@pytest.mark.usefixtures("quick_checks")
async def test_a_batch_that_computes_for_ever_is_stalled_after_the_progress_timeout(tmp_path: Path) -> None:
    async with start(tmp_path, progress_timeout=0.5) as worker:
        worker.encoder.cpu_seconds = 3.0
        call = worker.encode()
        await worker.until("a batch on cpu has taken longer than 0 s (--progress-timeout)")
        await call
        await worker.until("")


@pytest.mark.usefixtures("quick_checks")
async def test_an_idle_device_that_hangs_is_found_by_a_self_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "SELF_TEST_SECONDS", 0.2)
    async with start(tmp_path) as worker:
        worker.encoder.device.clear()
        await worker.until("no CPU time")
        assert worker.encoder.forwards == 1, "one self-test at a time"
        worker.encoder.device.set()
        await worker.until("")
        async with asyncio.timeout(30):
            while worker.encoder.forwards < 2:
                await asyncio.sleep(0.05)


@pytest.mark.usefixtures("quick_checks")
async def test_self_tests_take_a_small_part_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "SELF_TEST_SECONDS", 0.1)
    async with start(tmp_path) as worker:
        worker.encoder.cpu_seconds = 0.5
        async with asyncio.timeout(30):
            while worker.encoder.forwards < 1:
                await asyncio.sleep(0.05)
        await asyncio.sleep(3)
        assert worker.encoder.forwards == 1, "the next one is 50 s later"


@pytest.mark.usefixtures("quick_checks")
async def test_threads_that_hang_while_images_wait_are_reported(tmp_path: Path) -> None:
    async with start(tmp_path) as worker:
        worker.encoder.decoder.clear()
        calls = [worker.encode(key="a")]
        await asyncio.sleep(2)
        assert await worker.stalled() == "", "one image alone does not wait"
        calls.append(worker.encode("tiny_33x21.png", key="b"))
        await worker.until("decoding has used no CPU time")
        worker.encoder.decoder.set()
        await worker.until("")
        await asyncio.gather(*calls)
