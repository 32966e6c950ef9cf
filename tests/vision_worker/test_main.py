"""The process: start, signals, and its errors and exit status where it cannot serve."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from torch import Tensor

from common import embedding_stream, rpc
from common.checkpoint import open_checkpoint
from protos import embeddings_pb2, embeddings_pb2_grpc, vision_pb2, vision_pb2_grpc
from tests.hub import ID, LANGUAGE, VISION, fill_cache, split_checkpoint
from tests.vision_worker import golden
from vision_worker.__main__ import main
from vision_worker.models.fake import Fake

CHECKPOINT = str(golden.FOLDER / "flash-qwen3/checkpoint")


def test_a_missing_checkpoint_exits_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["/nowhere"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("dvd vision: no checkpoint at '/nowhere'")


@pytest.mark.parametrize("flag", ["--device=toaster", "--max-batch-tiles=-1"])
def test_an_invalid_option_exits_with_2(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([CHECKPOINT, flag]) == 2
    assert "dvd vision: --" in capsys.readouterr().err


def test_compiling_without_a_compiler_exits_with_2(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "vision_worker", CHECKPOINT, "--vision-compile=true", "--max-batch-tiles=1"],
        env={**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == 2
    assert "dvd vision: --vision-compile: torch cannot compile here" in process.stderr.splitlines()[-1]


def test_an_address_in_use_exits_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert main([CHECKPOINT, "--vision-backend=fake", f"--listen={address}"]) == 1
    assert f"cannot listen on {address}" in capsys.readouterr().err


def test_a_lost_device_exits_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(_self: Fake, pixels: Tensor) -> Tensor:
        if bool(pixels.any()):  # tiles for warming up are blank
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return torch.zeros(len(pixels), dtype=torch.int64)

    monkeypatch.setattr(Fake, "forward", forward)
    monkeypatch.setattr("vision_worker.batcher._is_usable", lambda _: False)
    address, codes = f"unix:{tmp_path}/vision", list[grpc.StatusCode]()

    def encode() -> None:
        image = vision_pb2.Image(key="a", data=golden.image("hd_1920x1080.jpg"))
        request = vision_pb2.EncodeRequest(images=[image], dtype=embeddings_pb2.FLOAT32, dry_run=True, fingerprint=fingerprint)
        with grpc.insecure_channel(address) as channel:
            try:
                vision_pb2_grpc.VisionStub(channel).Encode(request, timeout=60, wait_for_ready=True)
            except grpc.RpcError as error:
                codes.append(error.code())

    fingerprint = open_checkpoint(Path(CHECKPOINT)).fingerprint
    caller = threading.Thread(target=encode)
    caller.start()
    assert main([CHECKPOINT, "--vision-backend=fake", f"--listen={address}"]) == 1
    caller.join()
    assert codes == [grpc.StatusCode.UNAVAILABLE], "the caller may then ask another worker"
    assert "dvd vision: device cpu is no longer usable" in capsys.readouterr().err


async def test_a_worker_needs_only_the_files_of_its_half(tmp_path: Path) -> None:
    """Served by its id from a cache without the language model; its fingerprint is that of a worker with the other half."""
    repository = split_checkpoint(Path(CHECKPOINT), tmp_path / "repository")
    fill_cache(tmp_path / "cache", repository, LANGUAGE)
    other_half = fill_cache(tmp_path / "other", repository, VISION)
    address = f"unix:{tmp_path}/vision"
    process = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-m", "vision_worker", ID, f"--listen={address}", "--max-batch-tiles=1"],
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
    )
    try:
        async with rpc.open_channel(address) as channel:
            stub = vision_pb2_grpc.VisionStub(channel)
            description = await stub.Describe(embeddings_pb2.DescribeRequest(), timeout=60, wait_for_ready=True)
        assert description.checkpoint.fingerprint == open_checkpoint(other_half).fingerprint
    finally:
        process.kill()
        process.wait()


async def test_a_worker_starts_serves_and_stops_on_sigterm(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/vision"
    command = [sys.executable, "-m", "vision_worker", CHECKPOINT, f"--listen={address}", "--max-batch-tiles=2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)  # noqa: ASYNC220
    try:
        assert process.stderr is not None
        output = ""
        while "ready on" not in output:
            line = process.stderr.readline()
            assert line, output
            output += line
        assert output.index("loading") < output.index("warming up") < output.index("ready on")
        async with rpc.open_channel(address) as channel:
            await vision_pb2_grpc.VisionStub(channel).Describe(embeddings_pb2.DescribeRequest(), timeout=5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0
    finally:
        process.kill()
        process.communicate()


@dataclass
class HoldingSink(embeddings_pb2_grpc.EmbeddingSinkServicer):
    """A sink that finishes no delivery before `may_end` is set; `entered` is set by the first one."""

    entered: asyncio.Event = field(default_factory=asyncio.Event)
    may_end: asyncio.Event = field(default_factory=asyncio.Event)

    async def Deliver(self, request: AsyncIterator[Any], context: Any) -> embeddings_pb2.DeliverReply:  # noqa: N802
        self.entered.set()
        await self.may_end.wait()
        await embedding_stream.request_values(context, {})
        async for _ in request:
            pass
        return embeddings_pb2.DeliverReply()


@dataclass
class RunningWorker:
    """A vision worker's process, and a sink that holds deliveries."""

    process: subprocess.Popen[bytes]
    stub: vision_pb2_grpc.VisionStub
    sink: HoldingSink
    sink_address: str
    fingerprint: str

    def encode(self, name: str, **fields: Any) -> "asyncio.Future[vision_pb2.EncodeReply]":
        image = vision_pb2.Image(key=name, data=golden.image("square.png"))
        request = vision_pb2.EncodeRequest(images=[image], dtype=embeddings_pb2.FLOAT32, fingerprint=self.fingerprint, **fields)
        call: asyncio.Future[vision_pb2.EncodeReply] = asyncio.ensure_future(self.stub.Encode(request, timeout=120))
        return call

    async def held_call(self) -> "asyncio.Future[vision_pb2.EncodeReply]":
        """A call in flight, whose delivery the sink holds."""
        call = self.encode("held", deliver_to=self.sink_address)
        await asyncio.wait_for(self.sink.entered.wait(), 60)
        return call

    async def encode_until_rejected(self) -> None:
        while True:
            await self.encode("new", dry_run=True)
            await asyncio.sleep(0.1)

    async def describe(self) -> vision_pb2.VisionDescription:
        request = embeddings_pb2.DescribeRequest()
        reply: vision_pb2.VisionDescription = await self.stub.Describe(request, timeout=60, wait_for_ready=True)
        return reply

    async def signal_and_drain(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            while not (await self.describe()).draining:
                await asyncio.sleep(0.01)

    async def wait(self) -> int:
        return await asyncio.to_thread(self.process.wait, 60)


@contextlib.asynccontextmanager
async def start_worker(folder: Path, *flags: str) -> AsyncIterator[RunningWorker]:
    address, sink, sink_address = f"unix:{folder}/vision", HoldingSink(), f"unix:{folder}/sink"
    sink_server = rpc.create_server(sink_address)
    embeddings_pb2_grpc.add_EmbeddingSinkServicer_to_server(sink, sink_server)
    await sink_server.start()
    process = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-m", "vision_worker", CHECKPOINT, "--vision-backend=fake", f"--listen={address}", *flags]
    )
    try:
        async with rpc.open_channel(address) as channel:
            fingerprint = open_checkpoint(Path(CHECKPOINT)).fingerprint
            worker = RunningWorker(process, vision_pb2_grpc.VisionStub(channel), sink, sink_address, fingerprint)
            assert not (await worker.describe()).draining
            yield worker
    finally:
        process.kill()
        process.wait()
        await sink_server.stop(0)


async def test_a_worker_drains_on_sigterm(tmp_path: Path) -> None:
    """Calls in flight are answered, and so are those of gateways that do not know yet."""
    async with start_worker(tmp_path) as worker:
        call = await worker.held_call()
        await worker.signal_and_drain()
        await asyncio.sleep(1)  # until every gateway's next probe
        assert (await worker.encode("new", dry_run=True)).images[0].tokens == 256
        worker.sink.may_end.set()
        assert (await call).images[0].tokens == 256
        assert await worker.wait() == 0


async def test_calls_may_take_longer_than_new_ones_are_accepted(tmp_path: Path) -> None:
    async with start_worker(tmp_path) as worker:
        call = await worker.held_call()
        await worker.signal_and_drain()
        with pytest.raises(grpc.aio.AioRpcError) as error_info:
            await asyncio.wait_for(worker.encode_until_rejected(), 60)
        assert error_info.value.code() is grpc.StatusCode.UNAVAILABLE, "the gateway asks another worker"
        assert worker.process.poll() is None
        worker.sink.may_end.set()
        assert (await call).images[0].tokens == 256
        assert await worker.wait() == 0


async def test_calls_that_take_longer_than_the_grace_are_cancelled(tmp_path: Path) -> None:
    async with start_worker(tmp_path, "--shutdown-grace=0.5") as worker:
        call = await worker.held_call()
        worker.process.send_signal(signal.SIGINT)
        with pytest.raises(grpc.aio.AioRpcError):
            await call
        assert await worker.wait() == 0


async def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    async with start_worker(tmp_path, "--shutdown-grace=600") as worker:
        call = await worker.held_call()
        await worker.signal_and_drain()
        worker.process.send_signal(signal.SIGTERM)
        assert await worker.wait() == -signal.SIGTERM
        with pytest.raises(grpc.aio.AioRpcError):
            await call


def test_a_thread_that_hangs_does_not_keep_the_process(tmp_path: Path) -> None:
    script = f"""
import sys, threading
from vision_worker.__main__ import main
from vision_worker.models.fake import Fake

forward = Fake.forward
def hang(self, pixels):
    if pixels.any():  # tiles for warming up are blank
        print("hangs", flush=True)
        threading.Event().wait()
    return forward(self, pixels)
Fake.forward = hang
sys.exit(main([{CHECKPOINT!r}, "--vision-backend=fake", "--listen=unix:{tmp_path}/vision", "--shutdown-grace=0.5"]))
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        with grpc.insecure_channel(f"unix:{tmp_path}/vision") as channel:
            image = vision_pb2.Image(key="a", data=golden.image("square.png"))
            request = vision_pb2.EncodeRequest(images=[image], dtype=embeddings_pb2.FLOAT32, dry_run=True)
            # referenced until the end: a future that is collected cancels its call
            call = vision_pb2_grpc.VisionStub(channel).Encode.future(request, timeout=120, wait_for_ready=True)
            assert process.stdout is not None
            assert process.stdout.readline() == b"hangs\n"
            process.terminate()
            assert process.wait(60) == 0
            assert call.exception(60) is not None
    finally:
        process.kill()
        process.communicate()


def niceness_by_thread(pid: int) -> dict[str, int]:
    """Returns the niceness of each thread of a process, by the thread's id."""
    threads = [task.name for task in Path(f"/proc/{pid}/task").iterdir()]
    return {thread: os.getpriority(os.PRIO_PROCESS, int(thread)) for thread in threads}


@pytest.mark.parametrize("is_spare", [False, True])
async def test_threads_of_a_spare_worker_that_compute_have_low_priority(tmp_path: Path, is_spare: bool) -> None:
    """The event loop's has not: it has to answer probes."""
    async with start_worker(tmp_path, "--spare" if is_spare else "--spare=false") as worker:
        assert (await worker.describe()).spare is is_spare
        await worker.encode("image", dry_run=True)
        niceness = niceness_by_thread(worker.process.pid)
        own = os.getpriority(os.PRIO_PROCESS, 0)
        assert niceness.pop(str(worker.process.pid)) == own
        lowered = [value for value in niceness.values() if value > own]
        assert len(lowered) >= 2 if is_spare else not lowered, "one that decodes, one for the device"
