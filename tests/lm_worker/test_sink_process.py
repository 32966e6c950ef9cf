"""The sink's process ends with its language worker, and the language worker with its sink."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from common import rpc
from lm_worker.shared_memory import create_folder
from lm_worker.sink import SinkOptions
from lm_worker.sink_process import SinkProcess

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
