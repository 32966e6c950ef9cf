"""Encode calls to a real vision worker over a real socket: it answers or rejects them, never fails, and serves the next one.

Its tower is a hash, its decoder processes and the sink are real.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import rpc
from lm_worker.shared_memory import create_folder
from lm_worker.sink import SinkOptions, SinkServer
from protos import embeddings_pb2
from protos import vision_pb2 as pb
from tests.fuzz.strategies import damaged
from tests.fuzz.test_media import IMAGES
from tests.trouble.media_stack import CHECKPOINT, DecodingVisionWorker

CALLERS_MISTAKES = frozenset({
    grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED,
})  # fmt: skip
UNREACHABLE = grpc.StatusCode.UNAVAILABLE
"""Status where `deliver_to` is no sink."""
NOWHERE = "unix:/nowhere"
KEYS = st.text("abcdef0123456789", min_size=1, max_size=4) | st.text(max_size=150) | st.sampled_from(["", "..", "a/b", "a\0"])
NUMBERS = st.sampled_from([0, 1, 2, 6, 12, 40, 41, 2**31, 2**32 - 1])
FLOATS = st.floats(0, 1) | st.floats(width=32)


def requests(sink: str, fingerprint: str) -> "st.SearchStrategy[pb.EncodeRequest]":
    """Return Encode calls, most of which are wrong in some way."""
    images = st.builds(
        pb.Image,
        key=KEYS,
        data=st.sampled_from(IMAGES) | damaged(IMAGES, 4) | st.binary(max_size=40),
        grant=st.binary(max_size=9),
    )
    return st.builds(
        pb.EncodeRequest,
        images=st.lists(images, max_size=4),
        tiling=st.builds(pb.Tiling, min_tiles=NUMBERS, max_tiles=NUMBERS),
        router=st.builds(
            pb.Router, mode=st.sampled_from([0, 1, 2, 3, 2**31 - 1]),
            relative_threshold=st.none() | FLOATS, absolute_threshold=st.none() | FLOATS,
        ),
        dtype=st.sampled_from([0, 1, 2, 3, 99]),
        deliver_to=st.sampled_from([sink, sink, "", NOWHERE, "nowhere", "unix:", "[::1]:0", "x" * 600]) | st.text(max_size=20),
        fingerprint=st.sampled_from([fingerprint, fingerprint, "", "é" * 200]),
        caller=st.text(max_size=600),
        scope=st.binary(max_size=600),
        dry_run=st.booleans(),
    )  # fmt: skip


@dataclass
class Target:
    """A vision worker and a sink."""

    vision: DecodingVisionWorker
    sink: str

    async def status(self, message: bytes, seconds: float = 60) -> grpc.StatusCode:
        """Send the bytes of an Encode call. Returns the status of the answer."""
        async with rpc.open_channel(self.vision.address) as channel:
            method: Any = channel.unary_unary("/dvd.v1.Vision/Encode")
            try:
                await method(message, timeout=seconds)
            except grpc.aio.AioRpcError as error:
                return error.code()
        return grpc.StatusCode.OK

    def good(self) -> pb.EncodeRequest:
        """Return a call that must be served."""
        image = pb.Image(key="good", data=IMAGES[0])
        return pb.EncodeRequest(images=[image], dtype=embeddings_pb2.FLOAT32, deliver_to=self.sink)

    async def assert_serves(self) -> None:
        """Assert that a good call is served, and that nothing is left of others."""
        assert await self.status(self.good().SerializeToString()) is grpc.StatusCode.OK
        async with asyncio.timeout(60):
            while not self.vision.threads.is_idle:
                await asyncio.sleep(0.005)
        calls = self.vision.metrics.registry.get_sample_value("dvd_vision_calls_in_flight")
        assert calls == 0


@pytest.fixture(scope="module")
async def target(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Target]:
    folder: Path = tmp_path_factory.mktemp("fuzzed-vision")
    create_folder(folder / "store")
    options = SinkOptions(
        model=str(CHECKPOINT), listen=f"unix:{folder}/sink", http="unix:/nowhere", dtype="float32",
        folder=str(folder / "store"), budget=1 << 20, lease=0.0,
    )  # fmt: skip
    vision = DecodingVisionWorker(f"unix:{folder}/vision")
    async with SinkServer(options):
        await vision.start()
        yield Target(vision, options.listen)
        await vision.stop()


@settings(max_examples=60)
@given(data=st.data(), seconds=st.sampled_from([60.0, 60.0, 60.0, 0.05, 0.001]))
async def test_a_vision_worker_survives_any_call(target: Target, data: st.DataObject, seconds: float) -> None:
    request = data.draw(requests(target.sink, target.vision.encoder.checkpoint.fingerprint))
    allowed = {grpc.StatusCode.OK, *CALLERS_MISTAKES, *([UNREACHABLE] if request.deliver_to != target.sink else [])}
    assert await target.status(request.SerializeToString(), seconds) in allowed
    await target.assert_serves()


@settings(max_examples=60)
@given(data=st.data())
async def test_a_vision_worker_survives_any_bytes(target: Target, data: st.DataObject) -> None:
    message = data.draw(damaged([target.good().SerializeToString(), b""], 5) | st.binary(max_size=60))
    assert await target.status(message) in {grpc.StatusCode.OK, *CALLERS_MISTAKES, UNREACHABLE}
    await target.assert_serves()
