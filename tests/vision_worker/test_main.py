"""The process: start, signals, and its errors and exit status where it cannot serve."""

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import grpc
import pytest
import torch
from torch import Tensor

from common import rpc
from common.checkpoint import open_checkpoint
from protos import embeddings_pb2, vision_pb2, vision_pb2_grpc
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
        return torch.zeros(len(pixels), 1)

    monkeypatch.setattr(Fake, "forward", forward)
    monkeypatch.setattr(Fake, "project", lambda *_: None)
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
