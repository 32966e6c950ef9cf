"""The service over a real socket, delivering to a small sink."""

import asyncio
import contextlib
import logging
import math
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from common import embedding_stream, errors, logs, messages, rpc
from common.grants import GrantSigner
from common.security import OPEN, Credentials
from common.tiling import Tiling
from common.tracing import Trace
from protos import embeddings_pb2, embeddings_pb2_grpc, vision_pb2_grpc
from protos import vision_pb2 as pb
from tests.vision_worker import golden
from tests.vision_worker.images import start_image_decoder
from vision_worker.batcher import Batcher
from vision_worker.cache.base import Cache
from vision_worker.cache.embedding_cache import EmbeddingCache
from vision_worker.cache.memory import MemoryCache
from vision_worker.deadline import Deadline
from vision_worker.delivery import SinkChannels
from vision_worker.metrics import Metrics
from vision_worker.models.internvl import InternVL
from vision_worker.prepare_threads import PrepareThreads
from vision_worker.preprocessing.tiling import Tiles
from vision_worker.process import watch_threads
from vision_worker.quantization import NARROW_DTYPES, quantize
from vision_worker.service import Service
from vision_worker.tile_group import EncodedGroup

STAGES = ("decode", "tile", "encode", "route", "deliver")
FLASH = golden.cases("flash-qwen3")


@dataclass
class Sink(embeddings_pb2_grpc.EmbeddingSinkServicer):
    """Stores what is delivered, or raises `error` instead."""

    headers: dict[str, embeddings_pb2.EmbeddingHeader] = field(default_factory=dict)
    data: dict[str, bytes] = field(default_factory=dict)
    error: errors.DvdError | None = None

    async def Deliver(self, request: AsyncIterator[Any], context: Any) -> embeddings_pb2.DeliverReply:  # noqa: N802
        if self.error:
            raise self.error
        header = (await anext(request)).header
        await embedding_stream.request_values(context, {})
        parts = [chunk.data async for chunk in request]
        assert all(len(part) <= rpc.CHUNK_BYTES for part in parts)
        self.headers[header.key], self.data[header.key] = header, b"".join(parts)
        return embeddings_pb2.DeliverReply()


@dataclass
class Worker:
    """A vision worker's parts, and a client of its service."""

    stub: vision_pb2_grpc.VisionStub
    sink: Sink
    sink_address: str
    fingerprint: str
    batcher: Batcher
    metrics: Metrics
    threads: PrepareThreads
    draining: asyncio.Event

    async def encode(
        self, *images: str | bytes, seconds: float | None = None, name: str = "key", metadata: Any = (), **fields: Any
    ) -> pb.EncodeReply:
        request: dict[str, Any] = {
            "images": [
                pb.Image(key=f"{name}-{i}", data=golden.image(image) if isinstance(image, str) else image)
                for i, image in enumerate(images)
            ],
            "dtype": embeddings_pb2.FLOAT32, "deliver_to": self.sink_address, "fingerprint": self.fingerprint,
        } | fields  # fmt: skip
        with rpc.translate_errors("vision worker"):
            reply: pb.EncodeReply = await self.stub.Encode(pb.EncodeRequest(**request), timeout=seconds, metadata=metadata)
            return reply

    def delivered(self, key: str) -> torch.Tensor:
        header = self.sink.headers[key]
        assert len(self.sink.data[key]) == header.length
        return torch.from_numpy(np.frombuffer(self.sink.data[key], np.float32).copy()).view(header.rows, header.width)

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"dvd_vision_{name}_total", labels) or 0

    def sample(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"dvd_vision_{name}", labels) or 0

    def outcomes(self) -> tuple[float, ...]:
        """Images that were encoded, found in the cache, and shared with another call."""
        return tuple(self.count("images", outcome=outcome) for outcome in ("encoded", "cached", "joined"))


async def serve(name: str, folder: Path, cache: Cache | None = None, credentials: Credentials = OPEN) -> AsyncIterator[Worker]:
    sink, sink_address, address = Sink(), f"unix:{folder}/sink", f"unix:{folder}/vision"
    sink_server, server = rpc.create_server(sink_address), rpc.create_server(address, credentials=credentials)
    embeddings_pb2_grpc.add_EmbeddingSinkServicer_to_server(sink, sink_server)
    encoder, metrics, threads, draining = golden.encoder(name), Metrics(), PrepareThreads(2), asyncio.Event()
    async with (
        contextlib.AsyncExitStack() as stack,
        Batcher(encoder, 16, metrics) as batcher,
        EmbeddingCache(cache) as embeddings,
        SinkChannels() as sinks,
        watch_threads(batcher, threads, "cpu", 60) as liveness,
        rpc.open_channel(address) as channel,
    ):
        metrics.watch(embeddings)
        decoder, _ = stack.enter_context(start_image_decoder(metrics.decoder, max_pixels=3_000_000))
        service = Service(
            encoder=encoder, decoder=decoder, batcher=batcher, sinks=sinks, cache=embeddings, prepare_threads=threads,
            liveness=liveness, draining=draining, metrics=metrics, trace=Trace(None, "vision"),
            grants=GrantSigner(credentials),
        )  # fmt: skip
        vision_pb2_grpc.add_VisionServicer_to_server(service, server)
        await sink_server.start()
        await server.start()
        stub = vision_pb2_grpc.VisionStub(channel)
        yield Worker(stub, sink, sink_address, encoder.checkpoint.fingerprint, batcher, metrics, threads, draining)
        await server.stop(0)
        await sink_server.stop(0)


@pytest.fixture
async def flash(tmp_path: Path) -> AsyncIterator[Worker]:
    async for worker in serve("flash-qwen3", tmp_path):
        yield worker


@pytest.fixture
async def plain(tmp_path: Path) -> AsyncIterator[Worker]:
    async for worker in serve("vit300m-qwen2", tmp_path):
        yield worker


async def test_describe_returns_checkpoint_device_and_dtype(flash: Worker) -> None:
    description = await flash.stub.Describe(embeddings_pb2.DescribeRequest())
    assert description.checkpoint.fingerprint == flash.fingerprint
    assert (description.checkpoint.width, description.checkpoint.compressed_tokens_per_tile) == (128, 64)
    assert (description.device, description.dtype) == ("cpu", embeddings_pb2.FLOAT32)


async def test_describe_returns_the_state_of_the_worker(flash: Worker) -> None:
    before = await flash.stub.Describe(embeddings_pb2.DescribeRequest())
    flash.draining.set()
    after = await flash.stub.Describe(embeddings_pb2.DescribeRequest())
    assert [(state.draining, state.stalled, state.batch_tiles) for state in (before, after)] == [
        (False, "", 16),
        (True, "", 16),
    ]
    assert (await flash.encode("square.png")).images[0].tokens == 256, "a draining worker still accepts calls"


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in FLASH if len(case.stems) > 1])
async def test_several_images_of_a_request_are_routed_as_one_group(flash: Worker, case: golden.Case) -> None:
    reply = await flash.encode(*case.fields["images"])
    assert [list(image.compressed) for image in reply.images] == case.fields["compressed"]
    assert [image.tokens for image in reply.images] == case.fields["visual_tokens"]
    assert [[image.columns, image.rows] for image in reply.images] == case.fields["grid"]
    for i, image in enumerate(reply.images):
        expected = case.sampled_embedding(i)
        assert expected is not None
        assert golden.relative_error(flash.delivered(image.key)[:: golden.SAMPLE_STRIDE], expected) < 1e-5
        assert len(image.scores) == len(image.compressed)
    assert min(getattr(reply.timings, stage) for stage in STAGES) > 0


@pytest.mark.slow
async def test_routes_do_not_depend_on_concurrent_calls(flash: Worker) -> None:
    """Many images at once, hence in mixed batches."""
    cases = [case for case in FLASH if len(case.stems) == 1][::2]
    calls = (flash.encode(case.fields["images"][0], name=f"case{i}") for i, case in enumerate(cases))
    replies = await asyncio.gather(*calls)
    assert [list(r.images[0].compressed) for r in replies] == [case.fields["compressed"][0] for case in cases]


async def test_an_image_may_be_twice_in_a_request(flash: Worker) -> None:
    """Routes are fixed here: the quantile of scores that occur twice may differ from that of the same scores once."""
    twice = await flash.encode("wide_1300x800.jpg", "wide_1300x800.jpg", router=pb.Router(mode=pb.Router.OFF))
    assert flash.sink.data["key-0"] == flash.sink.data["key-1"]
    assert twice.images[0].tokens == 7 * 256
    embedding = flash.delivered("key-0")
    await flash.encode("wide_1300x800.jpg", router=pb.Router(mode=pb.Router.OFF))
    assert golden.relative_error(flash.delivered("key-0"), embedding) < 2e-6
    routed = await flash.encode("wide_1300x800.jpg", "wide_1300x800.jpg")
    assert routed.images[0].compressed == routed.images[1].compressed


@pytest.mark.parametrize(("dtype", "size"), [(embeddings_pb2.BFLOAT16, 2), (embeddings_pb2.FLOAT16, 2)])
async def test_embeddings_are_delivered_in_the_requested_dtype(flash: Worker, dtype: embeddings_pb2.Dtype, size: int) -> None:
    await flash.encode("square.png", dtype=dtype)
    header = flash.sink.headers["key-0"]
    assert (header.dtype, header.rows, header.width, header.length) == (dtype, 256, 128, 256 * 128 * size)
    assert header.fingerprint == flash.fingerprint


@pytest.mark.parametrize("name", ["int8", "fp8"])
async def test_narrow_embeddings_are_quantised_once_and_cached_as_they_are(caching: Worker, name: str) -> None:
    """Each dtype has its own entry in the cache, so that none is ever read as another one."""
    await caching.encode("square.png")
    exact = caching.delivered("key-0")
    scales, codes = quantize(exact, NARROW_DTYPES[name])
    expected = scales.numpy().tobytes() + codes.view(torch.uint8).numpy().tobytes()
    replies = [await caching.encode("square.png", dtype=messages.dtype_to_proto(name), name=f"narrow{i}") for i in range(2)]
    assert [reply.cached for reply in replies] == [False, True]
    for i in range(2):
        header = caching.sink.headers[f"narrow{i}-0"]
        assert (header.rows, header.width, header.length) == (256, 128, 256 * (128 + 4))
        assert messages.dtype_from_proto(header.dtype) == name
        assert caching.sink.data[f"narrow{i}-0"] == expected
    assert (await caching.encode("square.png", name="again")).cached
    assert torch.equal(caching.delivered("again-0"), exact)
    assert caching.count("delivered_bytes") == 2 * len(expected) + 2 * 256 * 128 * 4
    assert caching.outcomes() == (2, 2, 0)


async def test_describe_names_the_dtypes_of_embeddings(flash: Worker) -> None:
    description = await flash.stub.Describe(embeddings_pb2.DescribeRequest())
    names = {messages.dtype_from_proto(number) for number in description.embedding_dtypes}
    assert names == {"bfloat16", "float16", "float32", "int8", "fp8"}


@pytest.mark.parametrize(
    ("router", "tokens"),
    [
        (pb.Router(mode=pb.Router.ALL), 7 * 64),
        (pb.Router(mode=pb.Router.OFF), 7 * 256),
        (pb.Router(relative_threshold=1.0), 7 * 256),
        (pb.Router(relative_threshold=0.0, absolute_threshold=0.0), 6 * 64 + 256),
    ],
    ids=["all", "off", "relative-1", "both-0"],
)
async def test_the_request_chooses_the_router(flash: Worker, router: pb.Router, tokens: int) -> None:
    reply = await flash.encode("wide_1300x800.jpg", router=router)
    assert reply.images[0].tokens == tokens


@pytest.mark.parametrize(
    ("tiling", "tiles"),
    [
        (pb.Tiling(max_tiles=1), 1),
        (pb.Tiling(max_tiles=6), 7),
        (pb.Tiling(min_tiles=14), 15),  # above the checkpoint's own maximum, which then does not apply
        (pb.Tiling(min_tiles=4, max_tiles=4), 5),
    ],
)
async def test_the_request_chooses_the_tiling(flash: Worker, tiling: pb.Tiling, tiles: int) -> None:
    reply = await flash.encode("wide_1300x800.jpg", tiling=tiling)
    assert len(reply.images[0].compressed) == tiles


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"fingerprint": "other"}, errors.CheckpointMismatch, "expects checkpoint 'other', this vision worker serves"),
        ({"images": []}, errors.InvalidRequest, "0 images: expected 1 to 4096"),
        ({"deliver_to": ""}, errors.InvalidRequest, "deliver_to"),
        ({"dry_run": True}, errors.InvalidRequest, "and not both"),
        ({"deliver_to": "file:///etc/passwd"}, errors.InvalidRequest, "expected HOST:PORT"),
        ({"deliver_to": "unix:/" + "x" * 512}, errors.InvalidRequest, "deliver_to has length 518"),
        ({"caller": "x" * 513}, errors.InvalidRequest, "caller has length 513"),
        ({"scope": b"x" * 513}, errors.InvalidRequest, "scope has length 513"),
        ({"images": [pb.Image(key="k")] * 4097}, errors.InvalidRequest, "4097 images"),
        *(
            ({"images": [pb.Image(key=key, data=b"a")]}, errors.InvalidRequest, r"images\[0\].key: .* not an embedding key")
            for key in ("", "schlüssel", "../k", "k\n", "k" * 129, "k" * 100_000)
        ),
        ({"dtype": 0}, errors.InvalidRequest, "dtype"),
        ({"tiling": pb.Tiling(min_tiles=5, max_tiles=4)}, errors.InvalidRequest, "5 and max_tiles 4"),
        ({"tiling": pb.Tiling(max_tiles=41)}, errors.InvalidRequest, "max_tiles 41.*nor max_tiles 40"),
        ({"router": pb.Router(relative_threshold=1.5)}, errors.InvalidRequest, "relative_threshold 1.5"),
        ({"router": pb.Router(absolute_threshold=math.nan)}, errors.InvalidRequest, "absolute_threshold nan"),
        ({"router": pb.Router(mode=cast(Any, 7))}, errors.InvalidRequest, "mode 7"),
        ({"images": [pb.Image(key="k", data=b"text")]}, errors.InvalidImage, "not an image"),
        ({"images": [pb.Image(data=b"text")]}, errors.InvalidRequest, "key"),
    ],
)
async def test_an_invalid_request_is_rejected(
    flash: Worker, fields: dict[str, Any], error: type[errors.DvdError], message: str
) -> None:
    with pytest.raises(error, match=message):
        await flash.encode("square.png", **fields)
    assert not flash.sink.data


async def test_one_bad_image_fails_the_whole_request(flash: Worker) -> None:
    with pytest.raises(errors.InvalidImage) as error_info:
        await flash.encode("square.png", b"\x89PNG")
    assert error_info.value.param == "images[1]"
    assert not flash.sink.data


async def test_a_checkpoint_without_router_does_not_compress(plain: Worker) -> None:
    reply = await plain.encode("wide_1300x800.jpg")
    assert (reply.images[0].tokens, len(reply.images[0].scores)) == (7 * 256, 0)
    with pytest.raises(errors.InvalidRequest, match="no router"):
        await plain.encode("square.png", router=pb.Router(mode=pb.Router.ALL))


async def test_sink_errors_reach_the_caller(flash: Worker) -> None:
    flash.sink.error = errors.SinkFull("no room for 1 MiB")
    for _ in range(5):  # grpc.aio sometimes loses an error that arrives while it is writing: retry, as callers do
        with pytest.raises((errors.SinkFull, errors.SinkUnavailable)) as error_info:
            await flash.encode("square.png")
        if "(internal)" not in str(error_info.value):
            break
    assert error_info.type is errors.SinkFull
    assert "no room" in str(error_info.value)
    with pytest.raises(errors.SinkUnavailable, match="sink did not answer"):
        await flash.encode("square.png", deliver_to="127.0.0.1:9")


async def test_cancellation_and_deadline_reach_the_batcher(flash: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled: asyncio.Queue[None] = asyncio.Queue()
    entered = asyncio.Event()

    async def never_return(*_: object) -> None:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.put_nowait(None)

    with monkeypatch.context() as patch:
        patch.setattr(flash.batcher, "encode", never_return)
        call = asyncio.create_task(flash.encode("square.png"))
        await entered.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await asyncio.wait_for(cancelled.get(), 60)
        with pytest.raises(errors.DeadlineExceeded):
            await flash.encode("square.png", seconds=2)
        await asyncio.wait_for(cancelled.get(), 60)
    assert (await flash.encode("square.png")).images[0].tokens == 256


async def test_a_call_that_joins_extends_the_deadline_of_the_group(flash: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    deadlines, may_end = list[Deadline](), asyncio.Event()
    encode = flash.batcher.encode

    async def encode_later(*arguments: Any) -> EncodedGroup:
        deadlines.append(arguments[4])
        assert arguments[3] == "first"
        await may_end.wait()
        return await encode(*arguments)

    monkeypatch.setattr(flash.batcher, "encode", encode_later)
    first = asyncio.create_task(flash.encode("square.png", seconds=60, caller="first"))
    while not deadlines:
        await asyncio.sleep(0.01)
    assert deadlines[0].passes_within(61)
    second = asyncio.create_task(flash.encode("square.png", seconds=600, caller="second"))
    async with asyncio.timeout(20):
        while deadlines[0].passes_within(61):
            await asyncio.sleep(0.01)
    third = asyncio.create_task(flash.encode("square.png"))
    async with asyncio.timeout(20):
        while deadlines[0].passes_within(1e9):
            await asyncio.sleep(0.01)
    may_end.set()
    await asyncio.gather(first, second, third)
    assert flash.outcomes() == (1, 0, 2)


async def test_a_call_does_not_join_a_group_that_was_dropped(flash: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has more time; the task of the dropped group has not ended yet."""
    encode, deadlines, may_fail = flash.batcher.encode, list[Deadline](), asyncio.Event()

    async def drop_the_first(*arguments: Any) -> EncodedGroup:
        deadlines.append(arguments[4])
        if len(deadlines) > 1:
            return await encode(*arguments)
        deadlines[0].missed = True
        await may_fail.wait()
        raise errors.DeadlineExceeded("dropped")

    monkeypatch.setattr(flash.batcher, "encode", drop_the_first)
    first = asyncio.create_task(flash.encode("square.png", seconds=60))
    async with asyncio.timeout(20):
        while not deadlines:
            await asyncio.sleep(0.01)
    assert (await flash.encode("square.png", seconds=600)).images[0].tokens == 256
    may_fail.set()
    with pytest.raises(errors.DeadlineExceeded, match="dropped"):
        await first
    assert flash.outcomes() == (1, 0, 0)


async def test_an_image_whose_deadline_has_passed_is_not_decoded(flash: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    release, decoded = threading.Event(), list[Any]()
    prepare = InternVL.prepare

    def record(encoder: InternVL, image: Any, options: Tiling) -> Tiles:
        decoded.append(image)
        return prepare(encoder, image, options)

    monkeypatch.setattr(InternVL, "prepare", record)
    busy = [asyncio.create_task(flash.threads.run("", lambda _: release.wait(60))) for _ in range(2)]
    with pytest.raises(errors.DeadlineExceeded):
        await flash.encode("square.png", seconds=1)
    monkeypatch.setattr(Deadline, "passes_within", lambda _self, seconds: seconds == 0)
    late = asyncio.create_task(flash.encode("square.png", seconds=60))
    async with asyncio.timeout(20):
        while flash.sample("waiting_images") != 1:
            await asyncio.sleep(0.01)
    release.set()
    with pytest.raises(errors.DeadlineExceeded, match=r"before images\[0\] was decoded"):
        await late
    await asyncio.gather(*busy)
    assert decoded == []


# Metrics and logs


# Keys


async def test_a_known_key_with_another_image_gets_the_embedding_of_that_image(caching: Worker) -> None:
    """Neither the cache nor a shared call depends on the key that a caller claims."""
    planted = await caching.encode("wide_1300x800.jpg", name="known", deliver_to="", dry_run=True)
    for _ in range(2):
        first, second = await asyncio.gather(
            caching.encode("square.png", name="known"),
            caching.encode("vga_640x480.png", name="known", deliver_to="", dry_run=True),
        )
        assert first.images[0].tokens == 256
        assert len(first.images[0].compressed) == 1
        assert caching.sink.headers["known-0"].rows == 256
        assert len({len(reply.images[0].compressed) for reply in (planted, first, second)}) == 3
        assert {reply.images[0].key for reply in (planted, first, second)} == {"known-0"}
    assert caching.outcomes() == (3, 2, 0)


async def test_equal_images_share_an_embedding_whatever_their_keys(caching: Worker) -> None:
    for name, cached in (("one", False), ("two", True)):
        reply = await caching.encode("square.png", name=name)
        assert (reply.cached, reply.images[0].key) == (cached, f"{name}-0")
    assert caching.sink.data["one-0"] == caching.sink.data["two-0"]


async def test_callers_of_different_scopes_share_nothing(caching: Worker) -> None:
    replies = await asyncio.gather(*(caching.encode("square.png", scope=scope) for scope in (b"me", b"you")))
    assert [reply.cached for reply in replies] == [False, False]
    assert caching.outcomes() == (2, 0, 0)
    assert (await caching.encode("square.png", scope=b"you")).cached


async def test_each_setting_has_an_embedding_of_its_own(caching: Worker) -> None:
    settings: list[dict[str, Any]] = [
        {}, {"tiling": pb.Tiling(max_tiles=6)}, {"tiling": pb.Tiling(min_tiles=4, max_tiles=6)},
        {"router": pb.Router(mode=pb.Router.ALL)}, {"router": pb.Router(mode=pb.Router.OFF)},
        {"router": pb.Router(relative_threshold=0)}, {"router": pb.Router(absolute_threshold=0)},
        {"dtype": embeddings_pb2.BFLOAT16},
    ]  # fmt: skip
    for cached in (False, True):
        assert [(await caching.encode("wide_1300x800.jpg", **fields)).cached for fields in settings] == [cached] * len(settings)


async def test_different_files_with_one_key_are_refused(flash: Worker) -> None:
    images = [pb.Image(key="k", data=golden.image(name)) for name in ("square.png", "square.png", "tiny_33x21.png")]
    with pytest.raises(errors.InvalidRequest, match=r"images\[2\] has the key of images\[0\]"):
        await flash.encode(images=images)
    assert (await flash.encode(images=images[:2])).images[1].tokens == 256


async def test_each_stage_is_counted_once_per_encoded_group(caching: Worker) -> None:
    await asyncio.gather(*(caching.encode("wide_1300x800.jpg") for _ in range(2)))
    await caching.encode("wide_1300x800.jpg")
    stages = {stage: caching.sample("stage_seconds_count", stage=stage) for stage in STAGES}
    assert stages == {"decode": 1, "tile": 1, "encode": 1, "route": 1, "deliver": 3}
    assert [caching.sample("wait_seconds_count", stage=stage) for stage in ("decode", "encode")] == [1, 1]
    assert (caching.sample("batch_tiles_count"), caching.sample("batch_tiles_sum")) == (1, 7)
    assert caching.outcomes() == (1, 1, 1)
    for event, count in (("hits", 1), ("misses", 1), ("errors", 0), ("evictions", 0)):
        labels = {"tier": "memory", "event": event}
        assert caching.metrics.registry.get_sample_value("dvd_cache_events_total", labels) == count


async def test_errors_are_counted_by_code_and_gauges_return_to_zero(flash: Worker) -> None:
    invalid: list[dict[str, Any]] = [
        {"images": [pb.Image(key="k", data=b"text")]},
        {"fingerprint": "x"},
        {"deliver_to": "[::1]:9"},
    ]
    for fields in invalid:
        with pytest.raises(errors.DvdError):
            await flash.encode("square.png", **fields)
    codes = [flash.count("errors", code=code) for code in ("invalid_image", "checkpoint_mismatch", "sink_unavailable")]
    assert codes == [1, 1, 1]
    assert [flash.sample(gauge) for gauge in ("calls_in_flight", "waiting_images", "waiting_tiles")] == [0, 0, 0]


async def test_a_call_cancelled_before_a_thread_is_free_no_longer_waits(flash: Worker) -> None:
    release = threading.Event()
    busy = [asyncio.create_task(flash.threads.run("", lambda _: release.wait(60))) for _ in range(2)]
    call = asyncio.create_task(flash.encode("square.png"))
    async with asyncio.timeout(20):
        while flash.sample("waiting_images") != 1:
            await asyncio.sleep(0.01)
        call.cancel()
        while flash.sample("calls_in_flight"):
            await asyncio.sleep(0.01)
        assert flash.sample("waiting_images") == 0
        release.set()
        await asyncio.gather(*busy)
    assert flash.count("errors", code="cancelled") == 1
    await flash.encode("square.png")
    assert flash.sample("waiting_images") == 0


@pytest.mark.parametrize(("request_id", "logged"), [("a-request.1", "a-request.1"), ('no id"', ""), (None, "")])
async def test_each_call_is_logged_with_the_request_id_of_its_caller(
    flash: Worker, caplog: pytest.LogCaptureFixture, request_id: str | None, logged: str
) -> None:
    ids = RequestIds()
    log = logging.getLogger("dvd.encode")
    log.addFilter(ids)
    caplog.set_level("INFO", log.name)
    metadata = ((logs.REQUEST_ID_KEY, request_id),) if request_id else ()
    await flash.encode("wide_1300x800.jpg", metadata=metadata)
    with pytest.raises(errors.InvalidImage):
        await flash.encode(b"text", metadata=metadata)
    log.removeFilter(ids)
    first, second = (record.__dict__["fields"] for record in caplog.records if record.name == log.name)
    assert first.pop("seconds") > 0
    assert first == {"images": 1, "outcome": "encoded", "tiles": 7, "tokens": first["tokens"]}
    assert second["error"] == "invalid_image"
    assert ids.values == [logged, logged]


class RequestIds(logging.Filter):
    """Collects the request id of each log record."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        self.values.append(logs.request_id.get())
        return True


# Nothing is encoded twice


@pytest.fixture
async def caching(tmp_path: Path) -> AsyncIterator[Worker]:
    async for worker in serve("flash-qwen3", tmp_path, MemoryCache(64 << 20)):
        yield worker


async def test_a_hundred_concurrent_calls_are_encoded_once(flash: Worker) -> None:
    replies = await asyncio.gather(*(flash.encode("wide_1300x800.jpg") for _ in range(100)))
    assert flash.outcomes() == (1, 0, 99)
    assert flash.count("tiles") == 7
    assert len({reply.images[0].SerializeToString() for reply in replies}) == 1


async def test_a_cached_embedding_is_delivered_without_encoding(caching: Worker) -> None:
    first = await caching.encode("wide_1300x800.jpg")
    delivered = caching.sink.data.pop("key-0")
    second = await caching.encode("wide_1300x800.jpg")
    assert caching.outcomes() == (1, 1, 0)
    assert caching.sink.data["key-0"] == delivered
    assert first.images == second.images
    assert (first.cached, second.cached) == (False, True)
    assert (second.timings.decode, second.timings.encode) == (0, 0)


async def test_a_partly_cached_group_is_encoded_again(caching: Worker) -> None:
    """Because its images are routed together."""
    await caching.encode("square.png")
    await caching.encode("square.png", "wide_1300x800.jpg")
    assert caching.outcomes() == (3, 0, 0)
    await caching.encode("square.png", "wide_1300x800.jpg")
    assert caching.outcomes() == (3, 2, 0)


async def test_errors_are_not_cached(caching: Worker) -> None:
    with pytest.raises(errors.InvalidImage):
        await caching.encode(b"\x89PNG")
    assert (await caching.encode("square.png")).images[0].tokens == 256
    assert caching.outcomes() == (1, 0, 0)


async def test_a_dry_run_delivers_nothing_and_fills_the_cache(caching: Worker) -> None:
    dry = await caching.encode("wide_1300x800.jpg", deliver_to="", dry_run=True)
    assert not caching.sink.data
    real = await caching.encode("wide_1300x800.jpg")
    assert dry.images == real.images
    assert (dry.cached, real.cached, dry.timings.deliver) == (False, True, 0)
    assert caching.outcomes() == (1, 1, 0)
    assert len(caching.sink.data["key-0"]) == real.images[0].tokens * 128 * 4


# Grants

CLUSTER = Credentials("a-token-of-this-cluster")


async def test_a_worker_connects_only_where_a_grant_allows(tmp_path: Path) -> None:
    async for worker in serve("flash-qwen3", tmp_path, credentials=CLUSTER):
        with pytest.raises(errors.Unauthorized, match="cluster token"):
            await worker.encode("square.png")
        signer = GrantSigner(CLUSTER)
        elsewhere = signer.sign("sink", "unix:/elsewhere", "k", 1 << 20, 60)
        for grant, message in ((b"", "no grant"), (b"x", "cannot be parsed"), (elsewhere, "another address")):
            images = [pb.Image(key="k", data=golden.image("square.png"), grant=grant)]
            with pytest.raises(errors.GrantRefused, match=message):
                await worker.encode(images=images, metadata=CLUSTER.metadata)
        assert worker.outcomes() == (0, 0, 0), "nothing was computed"
        assert not worker.sink.data
        good = signer.sign("sink", worker.sink_address, "k", 1 << 20, 60)
        images = [pb.Image(key="k", data=golden.image("square.png"), grant=good)]
        assert (await worker.encode(images=images, metadata=CLUSTER.metadata)).images[0].tokens == 256
        assert worker.sink.headers["k"].grant == good
        assert (await worker.encode("square.png", deliver_to="", dry_run=True, metadata=CLUSTER.metadata)).cached is False
