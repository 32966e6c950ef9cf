"""The sink as a process, over a real socket: what it accepts, what it rejects, when it ends."""

import asyncio
import contextlib
import math
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from common import embedding_stream, errors, rpc
from common.checkpoint import open_checkpoint
from common.embedding import HEADER_SIZE, Header
from common.grants import GrantSigner
from common.security import TOKEN_VARIABLE, Credentials
from common.transport.shared_memory import SharedMemoryTransport
from lm_worker.shared_memory import create_folder, is_expected, map_embedding
from lm_worker.sink import SinkOptions
from protos import embeddings_pb2 as pb
from protos import embeddings_pb2_grpc
from tests.ports import free_port
from vision_worker.delivery import SinkChannels

CHECKPOINT = Path(__file__).parents[1] / "data/golden/flash-qwen3/checkpoint"
FINGERPRINT = open_checkpoint(CHECKPOINT).fingerprint
WIDTH, ROWS = 128, 256
LENGTH = ROWS * WIDTH * 4
STALL_SECONDS = 3.0
BAD_KEYS = [
    "", "../../etc/passwd", ".pinned", ".incoming", ".free", ".expected", ".waiting", ".expected/key", "schlüssel", "key\n",
    "key\0", "٣", "k" * 129, "k" * 1_000_000,
]  # fmt: skip


@dataclass
class RunningSink:
    options: SinkOptions
    process: "subprocess.Popen[bytes]"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSink]:
    folder = tmp_path_factory.mktemp("sink")
    create_folder(folder / "store")
    options = SinkOptions(
        model=str(CHECKPOINT),
        listen=f"unix:{folder}/sink",
        http="unix:/nowhere",
        dtype="float32",
        folder=str(folder / "store"),
        budget=8 << 20,
        lease=0.0,
        metrics_port=free_port(),
        stall_seconds=STALL_SECONDS,
    )
    process = subprocess.Popen([sys.executable, *options.arguments()], stdin=subprocess.PIPE)
    yield RunningSink(options, process)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(20) == 0, "the sink must end with its language worker"
    assert not (folder / "store").exists(), "the sink must give its memory back"


@pytest.fixture
async def sink(running: RunningSink) -> AsyncIterator[embeddings_pb2_grpc.EmbeddingSinkStub]:
    channel = rpc.open_channel(running.options.listen)
    await asyncio.wait_for(channel.channel_ready(), 30)
    yield embeddings_pb2_grpc.EmbeddingSinkStub(channel)
    await channel.close()


def header(key: str, **changes: Any) -> pb.EmbeddingHeader:
    """A header that the sink accepts, with some fields changed."""
    valid: dict[str, Any] = {
        "key": key,
        "fingerprint": FINGERPRINT,
        "dtype": pb.FLOAT32,
        "rows": ROWS,
        "width": WIDTH,
        "length": LENGTH,
    }
    return pb.EmbeddingHeader(**{**valid, **changes})


async def deliver(
    sink: embeddings_pb2_grpc.EmbeddingSinkStub, first: pb.EmbeddingHeader | None, data: bytes, chunk: int = 50_000
) -> pb.DeliverReply:
    async def parts() -> AsyncIterator[pb.DeliverChunk]:
        if first is not None:
            yield pb.DeliverChunk(header=first)
        for start in range(0, len(data), chunk):
            yield pb.DeliverChunk(data=data[start : start + chunk])

    for retries_left in reversed(range(3)):
        try:
            with rpc.translate_errors("sink"):
                reply: pb.DeliverReply = await sink.Deliver(parts())
                return reply
        except errors.Unavailable as error:  # grpc.aio sometimes loses an error that arrives while it is writing: retry
            if "(internal)" not in str(error) or not retries_left:
                raise
    raise AssertionError


async def test_describe_returns_checkpoint_dtype_and_address(sink: embeddings_pb2_grpc.EmbeddingSinkStub) -> None:
    description = await sink.Describe(pb.DescribeRequest())
    assert (description.checkpoint.fingerprint, description.checkpoint.width, description.dtype) == (
        FINGERPRINT,
        WIDTH,
        pb.FLOAT32,
    )
    assert (description.http, description.budget_bytes) == ("unix:/nowhere", 8 << 20)


async def test_a_delivery_is_stored_whole(running: RunningSink, sink: embeddings_pb2_grpc.EmbeddingSinkStub) -> None:
    data = np.random.default_rng(0).standard_normal(ROWS * WIDTH).astype("float32").tobytes()
    assert not (await deliver(sink, header("whole"), data)).already_here
    assert (await sink.Has(pb.HasRequest(keys=["whole", "absent"]))).tokens == [ROWS, 0]
    _, mapping = map_embedding(Path(running.options.folder) / "whole")
    assert mapping[HEADER_SIZE:] == data
    assert (await deliver(sink, header("whole"), data)).already_here


async def test_concurrent_deliveries_of_one_key_store_it_once(sink: embeddings_pb2_grpc.EmbeddingSinkStub) -> None:
    replies = await asyncio.gather(*(deliver(sink, header("equal"), bytes(LENGTH)) for _ in range(8)))
    assert sorted(reply.already_here for reply in replies) == [False] + 7 * [True]


NAN = np.full(ROWS * WIDTH, np.nan, "float32").tobytes()


@pytest.mark.parametrize(
    ("changes", "data", "error", "message"),
    [
        ({}, bytes(LENGTH - 4), errors.InvalidRequest, f"has {LENGTH - 4} bytes; its header declares {LENGTH}"),
        ({}, bytes(LENGTH + 4), errors.InvalidRequest, f"more than the {LENGTH} bytes"),
        ({}, bytes(LENGTH - 1), errors.InvalidRequest, "not a multiple of 4"),
        ({}, b"", errors.InvalidRequest, "has 0 bytes"),
        ({}, NAN, errors.InvalidRequest, "infinite or undefined"),
        ({"width": 127}, bytes(LENGTH), errors.InvalidRequest, r"256 × 127; expected at least 1 row of width 128"),
        ({"rows": 0, "length": 0}, b"", errors.InvalidRequest, "expected at least 1 row"),
        ({"rows": 2**32 - 1}, b"", errors.ContextLengthExceeded, "4294967295 visual tokens"),
        (
            {"dtype": pb.BFLOAT16},
            bytes(LENGTH),
            errors.CheckpointMismatch,
            r"in bfloat16; this language worker takes float32 \(--embedding-dtype\)",
        ),
        ({"dtype": 0}, bytes(LENGTH), errors.InvalidRequest, "unknown dtype number 0"),
        ({"length": LENGTH + 4}, bytes(LENGTH + 4), errors.InvalidRequest, f"have {LENGTH}"),
        ({"fingerprint": "0" * 64}, bytes(LENGTH), errors.CheckpointMismatch, "000000000000"),
        ({"fingerprint": "größer"}, bytes(LENGTH), errors.CheckpointMismatch, r"gr\\xf6"),
        *(({"key": key}, bytes(LENGTH), errors.InvalidRequest, "not an embedding key") for key in BAD_KEYS),
    ],
)
async def test_an_invalid_delivery_is_rejected_and_leaves_nothing_behind(
    sink: embeddings_pb2_grpc.EmbeddingSinkStub, changes: dict[str, Any], data: bytes, error: type[Exception], message: str
) -> None:
    before = (await sink.Describe(pb.DescribeRequest())).used_bytes
    with pytest.raises(error, match=message):
        await deliver(sink, header(**{"key": "bad", **changes}), data)
    assert (await sink.Describe(pb.DescribeRequest())).used_bytes == before
    assert (await sink.Has(pb.HasRequest(keys=["bad"]))).tokens == [0]


def read_metrics(running: RunningSink) -> dict[str, float]:
    """Every sample that the sink exports, by name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{running.options.metrics_port}/metrics", timeout=20) as response:
        samples = (line.rpartition(" ") for line in response.read().decode().splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}


async def test_deliveries_and_rejections_are_counted(running: RunningSink, sink: embeddings_pb2_grpc.EmbeddingSinkStub) -> None:
    before = await asyncio.to_thread(read_metrics, running)
    for _ in range(2):
        await deliver(sink, header("counted"), bytes(LENGTH))
    for invalid, error in ((header("c", fingerprint="x"), errors.CheckpointMismatch), (header("../c"), errors.InvalidRequest)):
        with pytest.raises(error):
            await deliver(sink, invalid, bytes(LENGTH))
    after = await asyncio.to_thread(read_metrics, running)
    description = await sink.Describe(pb.DescribeRequest())
    assert (after["dvd_sink_used_bytes"], after["dvd_sink_budget_bytes"]) == (description.used_bytes, description.budget_bytes)
    grown = {name: value - before.get(name, 0) for name, value in after.items() if "_created" not in name}
    assert {name: value for name, value in grown.items() if value and "lag" not in name} == {
        'dvd_sink_deliveries_total{outcome="stored"}': 1,
        'dvd_sink_deliveries_total{outcome="already_here"}': 1,
        'dvd_sink_refusals_total{code="checkpoint_mismatch"}': 1,
        'dvd_sink_refusals_total{code="invalid_request"}': 1,
        'dvd_sink_received_bytes_total{transport="grpc"}': LENGTH,
        "dvd_sink_used_bytes": LENGTH + HEADER_SIZE,
        "dvd_sink_embeddings": 1,
    }


async def test_a_delivery_without_a_header_is_rejected(sink: embeddings_pb2_grpc.EmbeddingSinkStub) -> None:
    with pytest.raises(errors.InvalidRequest, match="must be its header"):
        await deliver(sink, None, b"pickle")


async def test_a_sender_that_disconnects_midway_leaves_nothing_behind(sink: embeddings_pb2_grpc.EmbeddingSinkStub) -> None:
    async def half() -> AsyncIterator[pb.DeliverChunk]:
        yield pb.DeliverChunk(header=header("left"))
        yield pb.DeliverChunk(data=bytes(1000))
        await asyncio.sleep(60)

    before = (await sink.Describe(pb.DescribeRequest())).used_bytes
    call = sink.Deliver(half())
    await asyncio.sleep(0.3)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await deliver(sink, header("left"), bytes(LENGTH))
    assert (await sink.Describe(pb.DescribeRequest())).used_bytes <= before + LENGTH + HEADER_SIZE


async def raw_call(running: RunningSink, method: str, message: bytes, *, stream: bool = False) -> grpc.StatusCode:
    """Send bytes as the first message of a call, and return the status of the reply."""
    async with grpc.aio.insecure_channel(running.options.listen) as channel:
        name = f"/dvd.v1.EmbeddingSink/{method}"
        bytes_method: Any = channel.stream_unary(name) if stream else channel.unary_unary(name)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await bytes_method(iter([message]) if stream else message, timeout=30)
    assert "Traceback" not in str(caught.value.details())
    return caught.value.code()


@pytest.mark.parametrize("message", [b"\x0a\x02\xff\xfe", b"\xff\xff\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\0"])
@pytest.mark.parametrize("method", ["Has", "Deliver"])
async def test_bytes_that_are_no_message_are_invalid(running: RunningSink, method: str, message: bytes) -> None:
    assert await raw_call(running, method, message, stream=method == "Deliver") is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_message_above_the_limit_is_refused(running: RunningSink, sink: embeddings_pb2_grpc.EmbeddingSinkStub) -> None:
    assert await raw_call(running, "Has", bytes(5 << 20)) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not (await deliver(sink, header("after-large-message"), bytes(LENGTH))).already_here


@pytest.mark.parametrize("key", BAD_KEYS)
async def test_a_lookup_of_what_is_no_key_is_refused(sink: embeddings_pb2_grpc.EmbeddingSinkStub, key: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await sink.Has(pb.HasRequest(keys=["good", key]))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "not an embedding key" in str(caught.value.details())
    assert len(str(caught.value.details())) < 400


async def test_a_lookup_of_too_many_keys_is_refused(sink: embeddings_pb2_grpc.EmbeddingSinkStub) -> None:
    keys = [f"{number:0128}" for number in range(4097)]
    assert (await sink.Has(pb.HasRequest(keys=keys[:-1]))).tokens == [0] * 4096
    with pytest.raises(errors.InvalidRequest, match=r"4097 keys; expected at most 4096"), rpc.translate_errors("sink"):
        await sink.Has(pb.HasRequest(keys=keys))


async def test_what_a_lookup_expects_is_marked_until_it_is_delivered(
    running: RunningSink, sink: embeddings_pb2_grpc.EmbeddingSinkStub
) -> None:
    folder = Path(running.options.folder)
    assert (await sink.Has(pb.HasRequest(keys=["expected", "late"], expect_seconds=1e300))).tokens == [0, 0]
    assert is_expected(folder, "expected")
    assert (folder / ".expected/late").stat().st_mtime < time.monotonic() + 86_401, "at most for a day"
    assert not (await deliver(sink, header("expected"), bytes(LENGTH))).already_here
    assert not is_expected(folder, "expected")
    assert is_expected(folder, "late")


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -math.inf, -1.0])
async def test_a_time_that_is_no_number_of_seconds_is_refused(
    running: RunningSink, sink: embeddings_pb2_grpc.EmbeddingSinkStub, seconds: float
) -> None:
    with pytest.raises(errors.InvalidRequest, match="expect_seconds is"), rpc.translate_errors("sink"):
        await sink.Has(pb.HasRequest(keys=["never"], expect_seconds=seconds))
    assert not (Path(running.options.folder) / ".expected/never").exists()


async def test_a_lookup_with_a_bad_key_marks_none(running: RunningSink, sink: embeddings_pb2_grpc.EmbeddingSinkStub) -> None:
    with pytest.raises(errors.InvalidRequest), rpc.translate_errors("sink"):
        await sink.Has(pb.HasRequest(keys=["unmarked", ".waiting"], expect_seconds=60))
    assert not (Path(running.options.folder) / ".expected/unmarked").exists()


async def deliver_messages(sink: embeddings_pb2_grpc.EmbeddingSinkStub, *parts: pb.DeliverChunk, stall: bool = False) -> None:
    """Deliver these messages, and then nothing; `stall` keeps the call open."""

    async def messages() -> AsyncIterator[pb.DeliverChunk]:
        for part in parts:
            yield part
        if stall:
            await asyncio.Event().wait()

    with rpc.translate_errors("sink"):
        await sink.Deliver(messages())


@pytest.mark.parametrize("second", ["another", "first", None])
async def test_a_second_header_or_an_empty_message_is_refused(
    sink: embeddings_pb2_grpc.EmbeddingSinkStub, second: str | None
) -> None:
    key = f"first-of-{second}"
    further = pb.DeliverChunk(header=header(key if second == "first" else second)) if second else pb.DeliverChunk()
    with pytest.raises(errors.InvalidRequest, match="one header"):
        await deliver_messages(sink, pb.DeliverChunk(header=header(key)), further)
    assert not (await deliver(sink, header(key), bytes(LENGTH))).already_here


@pytest.mark.parametrize("count", [0, 1, 2], ids=["no header", "header", "some values"])
async def test_a_delivery_that_stalls_gives_back_its_memory_and_its_key(
    running: RunningSink, sink: embeddings_pb2_grpc.EmbeddingSinkStub, count: int
) -> None:
    parts = [pb.DeliverChunk(header=header(f"stalled-{count}")), pb.DeliverChunk(data=bytes(1000))][:count]
    before = (await sink.Describe(pb.DescribeRequest())).used_bytes
    counted = 'dvd_sink_refusals_total{code="deadline_exceeded"}'
    refusals = (await asyncio.to_thread(read_metrics, running)).get(counted, 0)
    with pytest.raises(errors.DeadlineExceeded, match="stalled"):
        await deliver_messages(sink, *parts, stall=True)
    assert (await sink.Describe(pb.DescribeRequest())).used_bytes == before
    assert not any((Path(running.options.folder) / ".incoming").iterdir())
    assert (await asyncio.to_thread(read_metrics, running))[counted] == refusals + 1
    assert not (await deliver(sink, header(f"stalled-{count}"), bytes(LENGTH))).already_here


async def test_a_delivery_that_trickles_is_ended(sink: embeddings_pb2_grpc.EmbeddingSinkStub) -> None:
    async def trickle() -> AsyncIterator[pb.DeliverChunk]:
        yield pb.DeliverChunk(header=header("trickle"))
        while True:
            yield pb.DeliverChunk(data=bytes(4))
            await asyncio.sleep(STALL_SECONDS / 5)

    with pytest.raises(errors.DeadlineExceeded, match=f"The delivery of {LENGTH} bytes took longer"), rpc.translate_errors("s"):
        await sink.Deliver(trickle())
    assert not (await deliver(sink, header("trickle"), bytes(LENGTH))).already_here


async def send(running: RunningSink, key: str, rows: int, data: bytes) -> pb.DeliverReply:
    """Deliver an embedding the way a vision worker does."""
    header = Header(key, FINGERPRINT, "float32", rows, WIDTH)
    channel = rpc.open_channel(running.options.listen)
    try:
        with rpc.translate_errors("sink"):
            return await embedding_stream.deliver(channel, header, memoryview(data), 30, transports=[SharedMemoryTransport()])
    finally:
        await channel.close()


VALUES = np.random.default_rng(1).standard_normal(ROWS * WIDTH).astype("float32").tobytes()


async def test_a_full_sink_rejects_large_deliveries_before_their_values_are_sent(running: RunningSink) -> None:
    rows = 4 * ROWS
    large = bytes(4 * LENGTH)
    replies = await asyncio.gather(*(send(running, "large-0", rows, large) for _ in range(8)))
    assert sorted(reply.already_here for reply in replies) == [False] + 7 * [True]
    folder = Path(running.options.folder)
    links = []
    with contextlib.suppress(errors.SinkFull):
        for number in range(1, 100):
            await send(running, f"large-{number}", rows, large)
            os.link(folder / f"large-{number}", folder / ".pinned" / f"large-{number}")
            links.append(folder / ".pinned" / f"large-{number}")
    before = (await asyncio.to_thread(read_metrics, running))['dvd_sink_received_bytes_total{transport="shm"}']
    for number in range(30):
        with pytest.raises(errors.SinkFull):
            await send(running, f"more-{number}", rows, large)
    assert (await asyncio.to_thread(read_metrics, running))['dvd_sink_received_bytes_total{transport="shm"}'] == before
    for path in links:
        path.unlink()
    assert not (await send(running, "more", rows, large)).already_here


async def test_a_full_sink_evicts_and_accepts_more(running: RunningSink, sink: embeddings_pb2_grpc.EmbeddingSinkStub) -> None:
    for i in range(80):
        await deliver(sink, header(f"many-{i}"), bytes(LENGTH))
    description = await sink.Describe(pb.DescribeRequest())
    assert description.budget_bytes - LENGTH - HEADER_SIZE < description.used_bytes <= description.budget_bytes
    assert (await sink.Has(pb.HasRequest(keys=["many-0", "many-79"]))).tokens == [0, ROWS]
    samples = await asyncio.to_thread(read_metrics, running)
    assert samples['dvd_cache_events_total{event="evictions",tier="sink"}'] >= 80 - samples["dvd_sink_embeddings"]


TOKEN = "a-token-of-this-cluster"
CLUSTER = Credentials(TOKEN)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSink]:
    """A sink of a cluster with a token."""
    folder = tmp_path_factory.mktemp("guarded")
    create_folder(folder / "store")
    options = SinkOptions(
        model=str(CHECKPOINT), listen=f"unix:{folder}/sink", http="unix:/nowhere", dtype="float32",
        folder=str(folder / "store"), budget=2 * (LENGTH + HEADER_SIZE), lease=0.0, metrics_port=free_port(),
    )  # fmt: skip
    environment = {**os.environ, TOKEN_VARIABLE: TOKEN}
    process = subprocess.Popen([sys.executable, *options.arguments()], stdin=subprocess.PIPE, env=environment)
    yield RunningSink(options, process)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(20) == 0


async def grant_of(guarded: RunningSink, key: str, size: int = LENGTH, seconds: float = 60) -> bytes:
    """A grant of the gateway for a delivery to the sink."""
    async with rpc.open_channel(guarded.options.listen) as channel:
        await asyncio.wait_for(channel.channel_ready(), 30)
        stub = embeddings_pb2_grpc.EmbeddingSinkStub(channel)
        description = await stub.Describe(pb.DescribeRequest(), metadata=CLUSTER.metadata)
    return GrantSigner(CLUSTER).sign(description.sink, guarded.options.listen, key, size, seconds)


async def send_granted(guarded: RunningSink, key: str, grant: bytes, credentials: Credentials = CLUSTER) -> pb.DeliverReply:
    """Deliver an embedding the way a vision worker of the cluster does."""
    async with SinkChannels(credentials) as sinks:
        await sinks.deliver(
            guarded.options.listen, Header(key, FINGERPRINT, "float32", ROWS, WIDTH), memoryview(VALUES), 30, grant
        )
    return pb.DeliverReply()


async def test_a_stranger_can_use_no_method_of_a_sink(guarded: RunningSink) -> None:
    async with rpc.open_channel(guarded.options.listen) as channel:
        await asyncio.wait_for(channel.channel_ready(), 30)
        stub = embeddings_pb2_grpc.EmbeddingSinkStub(channel)
        for metadata in ((), Credentials("another-token-entirely").metadata, (("authorization", TOKEN),)):
            for call in (
                stub.Describe(pb.DescribeRequest(), metadata=metadata),
                stub.Has(pb.HasRequest(keys=["a"]), metadata=metadata),
                stub.Deliver(iter([pb.DeliverChunk(header=header("a"))]), metadata=metadata),
            ):
                with pytest.raises(errors.Unauthorized, match="cluster token") as caught, rpc.translate_errors("sink"):
                    await call
                assert TOKEN not in str(caught.value)
        assert (await stub.Describe(pb.DescribeRequest(), metadata=CLUSTER.metadata)).used_bytes == 0


async def test_a_delivery_needs_a_grant_that_fits(guarded: RunningSink) -> None:
    for grant, message in (
        (b"", "no grant"),
        (await grant_of(guarded, "other"), "another embedding"),
        (await grant_of(guarded, "granted", size=LENGTH - 1), "its grant allows"),
        (await grant_of(guarded, "granted", seconds=-60), "expired"),
        (GrantSigner(CLUSTER).sign("another", guarded.options.listen, "granted", LENGTH, 60), "another sink"),
    ):
        refused = 'dvd_sink_refusals_total{code="grant_refused"}'
        before = (await asyncio.to_thread(read_metrics, guarded)).get(refused, 0)
        with pytest.raises(errors.GrantRefused, match=message):
            await send_granted(guarded, "granted", grant)
        assert (await asyncio.to_thread(read_metrics, guarded))[refused] == before + 1
    await send_granted(guarded, "granted", await grant_of(guarded, "granted"))
    assert (Path(guarded.options.folder) / "granted").exists()


async def test_a_grant_cannot_be_replayed_after_its_delivery(guarded: RunningSink) -> None:
    grant = await grant_of(guarded, "once")
    for _ in range(2):  # the second finds the embedding
        await send_granted(guarded, "once", grant)
    for key in ("evict-0", "evict-1"):
        await send_granted(guarded, key, await grant_of(guarded, key))
    assert not (Path(guarded.options.folder) / "once").exists()
    with pytest.raises(errors.GrantRefused, match="used already"):
        await send_granted(guarded, "once", grant)
    await send_granted(guarded, "once", await grant_of(guarded, "once"))
