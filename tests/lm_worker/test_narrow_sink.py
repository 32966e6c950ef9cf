"""A sink of narrow embeddings, over TCP and over a Unix socket, where the sender writes the sink's file."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common import errors, rpc
from common.checkpoint import open_checkpoint
from common.embedding import HEADER_SIZE, Header
from lm_worker.shared_memory import create_folder, map_embedding
from lm_worker.sink import SinkOptions
from protos import embeddings_pb2 as pb
from protos import embeddings_pb2_grpc
from tests.ports import free_port
from vision_worker.delivery import SinkChannels
from vision_worker.quantization import NARROW_DTYPES, join, quantize, view

CHECKPOINT = Path(__file__).parents[1] / "data/golden/flash-qwen3/checkpoint"
FINGERPRINT = open_checkpoint(CHECKPOINT).fingerprint
ROWS, WIDTH = 2560, 128  # several messages
LENGTH = ROWS * (WIDTH + 4)


@pytest.fixture(
    scope="module", params=[(dtype, kind) for dtype in sorted(NARROW_DTYPES) for kind in ("tcp", "unix")], ids="-".join
)
def narrow(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SinkOptions]:
    """A sink whose language model computes in bfloat16."""
    folder, (dtype, kind) = tmp_path_factory.mktemp("narrow"), request.param
    create_folder(folder / "store")
    options = SinkOptions(
        model=str(CHECKPOINT), listen=f"unix:{folder}/sink" if kind == "unix" else f"127.0.0.1:{free_port()}",
        http="unix:/nowhere", dtype=dtype, model_dtype="bfloat16", folder=str(folder / "store"), budget=8 << 20, lease=60.0,
    )  # fmt: skip
    process = subprocess.Popen([sys.executable, *options.arguments()], stdin=subprocess.PIPE)
    yield options
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(20) == 0


async def describe(options: SinkOptions) -> pb.LanguageDescription:
    async with rpc.open_channel(options.listen) as channel:
        await asyncio.wait_for(channel.channel_ready(), 30)
        description: pb.LanguageDescription = await embeddings_pb2_grpc.EmbeddingSinkStub(channel).Describe(
            pb.DescribeRequest()
        )
        return description


async def deliver(options: SinkOptions, key: str, data: bytes | memoryview, **changes: Any) -> None:
    await describe(options)  # it has started then
    fields: dict[str, Any] = {"dtype": options.dtype, "rows": ROWS, "width": WIDTH} | changes
    async with SinkChannels() as sinks:
        for retries_left in reversed(range(3)):
            try:
                await sinks.deliver(options.listen, Header(key, FINGERPRINT, **fields), memoryview(data), 30)
                return
            except errors.Unavailable as error:  # grpc.aio sometimes loses an error that arrives while it is writing: retry
                if "(internal)" not in str(error) or not retries_left:
                    raise


def payload(dtype: str) -> memoryview:
    tokens = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    return view(join(quantize(tokens, NARROW_DTYPES[dtype]), slice(0, ROWS)))


async def test_describe_names_both_dtypes(narrow: SinkOptions) -> None:
    description = await describe(narrow)
    assert description.dtype == pb.Dtype.Value(narrow.dtype.upper())
    assert description.model_dtype == pb.BFLOAT16


async def test_a_narrow_embedding_is_stored_as_it_was_sent(narrow: SinkOptions) -> None:
    before = (await describe(narrow)).used_bytes
    sent = payload(narrow.dtype)
    assert len(sent) == LENGTH
    await deliver(narrow, "whole", sent)
    header, mapping = map_embedding(Path(narrow.folder) / "whole")
    assert (header.dtype, header.rows, header.width) == (narrow.dtype, ROWS, WIDTH)
    assert mapping[HEADER_SIZE:] == sent
    assert (await describe(narrow)).used_bytes == before + HEADER_SIZE + LENGTH


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8", "fp8"])
async def test_another_dtype_is_rejected(narrow: SinkOptions, dtype: str) -> None:
    if dtype == narrow.dtype:
        dtype = "float16"
    header = Header("other", FINGERPRINT, dtype, ROWS, WIDTH)
    expected = rf"in {dtype}; this language worker takes {narrow.dtype} \(--embedding-dtype\)"
    with pytest.raises(errors.CheckpointMismatch, match=expected):
        await deliver(narrow, "other", bytes(header.length), dtype=dtype)


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0, 600.0])
@pytest.mark.parametrize("row", [0, ROWS - 1])
async def test_a_bad_scale_is_rejected_and_leaves_nothing_behind(narrow: SinkOptions, scale: float, row: int) -> None:
    before = (await describe(narrow)).used_bytes
    sent = bytearray(payload(narrow.dtype))
    sent[4 * row : 4 * row + 4] = np.array(scale, "<f4").tobytes()
    with pytest.raises(errors.InvalidRequest, match=f"scale {scale:g} of a row; expected 0 to"):
        await deliver(narrow, "bad", bytes(sent))
    assert (await describe(narrow)).used_bytes == before
    assert not (Path(narrow.folder) / "bad").exists()


async def test_codes_that_no_value_has_are_rejected(narrow: SinkOptions) -> None:
    sent = bytearray(payload(narrow.dtype))
    sent[-1], message = (0x80, "int8 value -128") if narrow.dtype == "int8" else (0x7F, "undefined fp8")
    with pytest.raises(errors.InvalidRequest, match=message):
        await deliver(narrow, "last", bytes(sent))


@pytest.mark.parametrize("change", [-1, 1, -4, 4, -4 * ROWS])
async def test_a_payload_of_another_length_is_rejected(narrow: SinkOptions, change: int) -> None:
    sent = bytes(payload(narrow.dtype)) + bytes(8)
    with pytest.raises(errors.InvalidRequest, match="bytes"):
        await deliver(narrow, "long", sent[: LENGTH + change])
    assert not (Path(narrow.folder) / "long").exists()
