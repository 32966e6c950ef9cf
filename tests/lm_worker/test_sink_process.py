"""The sink's process ends with its language worker, and the language worker with its sink."""

import asyncio
import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from common import rpc
from lm_worker.shared_memory import create_folder
from lm_worker.sink import SinkOptions
from lm_worker.sink_process import SinkProcess
from protos import embeddings_pb2 as pb
from protos import embeddings_pb2_grpc

CHECKPOINT = Path(__file__).parents[1] / "data/golden/flash-qwen3/checkpoint"
START_SECONDS = 60


@pytest.fixture
def options(tmp_path: Path) -> SinkOptions:
    create_folder(tmp_path / "store")
    return SinkOptions(
        model=str(CHECKPOINT),
        listen=f"unix:{tmp_path}/sink",
        http="unix:/nowhere",
        dtype="float32",
        folder=str(tmp_path / "store"),
        budget=1 << 20,
        lease=1.0,
    )


def has_memory(options: SinkOptions) -> bool:
    return Path(options.folder).exists()


async def until_ready(options: SinkOptions) -> None:
    channel = rpc.open_channel(options.listen)
    await asyncio.wait_for(channel.channel_ready(), START_SECONDS)
    await channel.close()


async def test_the_sink_ends_with_the_block_and_removes_its_memory(options: SinkOptions) -> None:
    async with SinkProcess(options) as sink:
        await until_ready(options)
        assert has_memory(options)
    assert sink.exit_status == 0
    assert not has_memory(options)


async def test_a_sink_that_ends_stops_this_process(options: SinkOptions, capsys: pytest.CaptureFixture[str]) -> None:
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    try:
        async with SinkProcess(options) as sink:
            await until_ready(options)
            os.kill(sink.pid, signal.SIGKILL)
            await asyncio.wait_for(stopped.wait(), START_SECONDS)
    finally:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)
    assert "dvd language: the sink ended with exit status -9; stopping" in capsys.readouterr().err


async def describe(options: SinkOptions) -> pb.LanguageDescription:
    async with rpc.open_channel(options.listen) as channel:
        stub = embeddings_pb2_grpc.EmbeddingSinkStub(channel)
        description: pb.LanguageDescription = await stub.Describe(pb.DescribeRequest(), timeout=START_SECONDS)
        return description


async def test_it_reports_the_fingerprint_of_the_language_weights_and_from_then_on_that_the_worker_drains(
    options: SinkOptions,
) -> None:
    async with SinkProcess(dataclasses.replace(options, language_fingerprint="f" * 64)) as sink:
        await until_ready(options)
        description = await describe(options)
        assert (description.language_fingerprint, description.draining) == ("f" * 64, False)
        sink.drain()
        async with asyncio.timeout(START_SECONDS):
            while not (await describe(options)).draining:
                await asyncio.sleep(0.02)


async def test_a_sink_that_hangs_is_killed_when_the_block_ends(options: SinkOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_worker.sink_process._STOP_SECONDS", 0.5)
    async with SinkProcess(options) as sink:
        await until_ready(options)
        os.kill(sink.pid, signal.SIGSTOP)
    assert sink.exit_status == -signal.SIGKILL


PARENT = """
import asyncio, json, sys
from lm_worker.sink import SinkOptions
from lm_worker.sink_process import SinkProcess

async def main():
    async with SinkProcess(SinkOptions(**json.loads(sys.argv[1]))) as sink:
        print(sink.pid, flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize("is_stopped", [False, True])
async def test_a_sink_whose_parent_is_killed_ends_and_removes_its_memory(options: SinkOptions, is_stopped: bool) -> None:
    arguments = json.dumps(dataclasses.asdict(options))
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", PARENT, arguments, stdout=asyncio.subprocess.PIPE)
    assert parent.stdout is not None
    sink = int(await parent.stdout.readline())
    await until_ready(options)
    if is_stopped:
        os.kill(sink, signal.SIGSTOP)
    parent.kill()
    async with asyncio.timeout(START_SECONDS):
        while has_memory(options):
            await asyncio.sleep(0.02)
    await parent.communicate()
