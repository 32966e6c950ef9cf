"""Deliveries to a real sink over a real socket: it accepts or rejects them, never fails, and serves the next one."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import errors, rpc
from common.checkpoint import open_checkpoint
from common.embedding import Header
from common.embedding_stream import data_messages, header_message
from lm_worker.shared_memory import create_folder
from lm_worker.sink import SinkOptions, SinkServer
from protos import embeddings_pb2 as pb
from protos import embeddings_pb2_grpc
from tests.fuzz.strategies import damaged

CHECKPOINT = Path(__file__).parents[1] / "data/golden/flash-qwen3/checkpoint"
DESCRIPTION = open_checkpoint(CHECKPOINT)
WIDTH, ROWS = DESCRIPTION.description.width, 3
VALUES = bytes(WIDTH * ROWS * 4)
GOOD = [
    header_message(Header("c" * 64, DESCRIPTION.fingerprint, "float32", ROWS, WIDTH)), *data_messages(memoryview(VALUES))
]  # fmt: skip
NUMBERS = st.sampled_from([0, 1, 2, ROWS, WIDTH, 2**31, 2**32 - 1])
KEYS = (
    st.text("abcdef0123456789", max_size=130)
    | st.text(max_size=200)
    | st.sampled_from(["", "..", "a/b", "a\0", "é", "k" * 5000, ".expected", ".waiting"])
)
HEADERS = st.builds(
    pb.EmbeddingHeader,
    key=KEYS,
    fingerprint=st.sampled_from([DESCRIPTION.fingerprint, "", "é" * 40]),
    dtype=st.sampled_from([0, 1, 2, 3, 99]),
    rows=NUMBERS, width=NUMBERS, length=NUMBERS | st.just(2**64 - 1),
)  # fmt: skip
CHUNKS = st.builds(lambda header: pb.DeliverChunk(header=header).SerializeToString(), HEADERS) | st.builds(
    lambda data: pb.DeliverChunk(data=data).SerializeToString(), st.binary(max_size=20)
)
DELIVERIES = st.lists(damaged(GOOD, 3) | CHUNKS | st.binary(max_size=20), max_size=4) | st.permutations(GOOD * 2).map(list)


@pytest.fixture(scope="module")
async def address(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    folder = tmp_path_factory.mktemp("fuzzed-sink")
    create_folder(folder / "store")
    options = SinkOptions(
        model=str(CHECKPOINT), listen=f"unix:{folder}/sink", http="unix:/nowhere", dtype="float32",
        folder=str(folder / "store"), budget=1 << 20, lease=0.0,
    )  # fmt: skip
    async with SinkServer(options):
        yield options.listen


async def outcome(channel: Any, messages: Sequence[bytes]) -> str:
    """Send a delivery. Returns the code of the error, or "stored"."""
    method = channel.stream_unary(
        "/dvd.v1.EmbeddingSink/Deliver", request_serializer=None, response_deserializer=pb.DeliverReply.FromString
    )
    try:
        with rpc.translate_errors("sink", quiet=True):
            await method(iter(messages), timeout=20)
    except errors.DvdError as error:
        return error.code
    return "stored"


@settings(max_examples=60)
@given(DELIVERIES, st.lists(KEYS, max_size=5), st.floats(0, 1e6) | st.floats())
async def test_a_sink_survives_any_delivery(address: str, messages: list[bytes], keys: list[str], seconds: float) -> None:
    async with rpc.open_channel(address) as channel, asyncio.timeout(60):
        assert await outcome(channel, messages) not in ("internal_error", "worker_unavailable", "deadline_exceeded")
        sink = embeddings_pb2_grpc.EmbeddingSinkStub(channel)
        with contextlib.suppress(errors.InvalidRequest), rpc.translate_errors("sink"):
            reply: pb.HasReply = await sink.Has(pb.HasRequest(keys=keys, expect_seconds=seconds))
            assert len(reply.tokens) == len(keys)
        description: pb.LanguageDescription = await sink.Describe(pb.DescribeRequest())
        assert description.used_bytes <= description.budget_bytes


async def test_it_accepts_after_that_what_it_accepted_before(address: str) -> None:
    async with rpc.open_channel(address) as channel:
        before = await outcome(channel, GOOD)
        for messages in ([], GOOD[:1], GOOD[1:], GOOD[::-1], [GOOD[0], b"\xff" * 20], [*GOOD, *GOOD]):
            assert await outcome(channel, messages) != "internal_error"
        assert await outcome(channel, GOOD) == before
