"""A vision worker over a real socket, with a small sink behind it."""

import asyncio
import logging
import math
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common import embedding_stream, errors, logs, rpc
from common.tracing import Trace
from protos import embeddings_pb2, embeddings_pb2_grpc, vision_pb2_grpc
from protos import vision_pb2 as pb
from tests.vision_worker import golden
from vision_worker.batcher import Batcher
from vision_worker.cache.embedding_cache import Cache, EmbeddingCache, Memory
from vision_worker.delivery import Sinks
from vision_worker.metrics import Metrics
from vision_worker.service import Service

STAGES = ("decode", "tile", "encode", "route", "deliver")
FLASH = golden.cases("flash-qwen3")


@dataclass
class Sink(embeddings_pb2_grpc.EmbeddingSinkServicer):
    """Keeps what is delivered; `fail` is raised instead, `hold` delays the answer."""

    headers: dict[str, embeddings_pb2.EmbeddingHeader] = field(default_factory=dict)
    data: dict[str, bytes] = field(default_factory=dict)
    fail: errors.DvdError | None = None

    async def Deliver(self, request: AsyncIterator[Any], context: Any) -> embeddings_pb2.DeliverReply:  # noqa: N802
        if self.fail:
            raise self.fail
        header = (await anext(request)).header
        await embedding_stream.request_values(context, None)
        parts = [chunk.data async for chunk in request]
        assert all(len(part) <= rpc.CHUNK_BYTES for part in parts)
        self.headers[header.key], self.data[header.key] = header, b"".join(parts)
        return embeddings_pb2.DeliverReply()


@dataclass
class Worker:
    stub: vision_pb2_grpc.VisionStub
    sink: Sink
    sink_address: str
    fingerprint: str
    batcher: Batcher
    metrics: Metrics
    cache: EmbeddingCache
    threads: ThreadPoolExecutor

    async def encode(
        self, *images: str | bytes, seconds: float | None = None, name: str = "key", metadata: Any = (), **fields: Any
    ) -> pb.EncodeReply:
        request = {
            "images": [
                pb.Image(key=f"{name}-{i}", data=golden.image(image) if isinstance(image, str) else image)
                for i, image in enumerate(images)
            ],
            "dtype": embeddings_pb2.FLOAT32, "deliver_to": self.sink_address, "fingerprint": self.fingerprint,
        } | fields  # fmt: skip
        with rpc.translate_errors("vision worker"):
            return await self.stub.Encode(pb.EncodeRequest(**request), timeout=seconds, metadata=metadata)

    def delivered(self, key: str) -> torch.Tensor:
        header = self.sink.headers[key]
        assert len(self.sink.data[key]) == header.length
        return torch.from_numpy(np.frombuffer(self.sink.data[key], np.float32).copy()).view(header.rows, header.width)

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"dvd_vision_{name}_total", labels) or 0

    def seen(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"dvd_vision_{name}", labels) or 0

    def outcomes(self) -> tuple[float, ...]:
        """Images that were encoded, found in the cache, and shared with another call."""
        return tuple(self.count("images", outcome=outcome) for outcome in ("encoded", "cached", "joined"))


async def serving(name: str, folder: Path, cache: Cache | None = None) -> AsyncIterator[Worker]:
    sink, sink_address, address = Sink(), f"unix:{folder}/sink", f"unix:{folder}/vision"
    sink_server, server = rpc.create_server(sink_address), rpc.create_server(address)
    embeddings_pb2_grpc.add_EmbeddingSinkServicer_to_server(sink, sink_server)
    encoder, sinks, metrics, threads = golden.encoder(name), Sinks(), Metrics(), ThreadPoolExecutor(2)
    async with Batcher(encoder, 16, metrics) as batcher, rpc.open_channel(address) as channel:
        embeddings = EmbeddingCache(cache)
        metrics.watch(embeddings)
        service = Service(encoder, batcher, sinks, embeddings, threads, 3_000_000, metrics, Trace(None, "vision"))
        vision_pb2_grpc.add_VisionServicer_to_server(service, server)
        await sink_server.start()
        await server.start()
        stub = vision_pb2_grpc.VisionStub(channel)
        yield Worker(stub, sink, sink_address, encoder.checkpoint.fingerprint, batcher, metrics, embeddings, threads)
        await server.stop(0)
        await sinks.close()
        await sink_server.stop(0)


@pytest.fixture
async def flash(tmp_path: Path) -> AsyncIterator[Worker]:
    async for worker in serving("flash-qwen3", tmp_path):
        yield worker


@pytest.fixture
async def plain(tmp_path: Path) -> AsyncIterator[Worker]:
    async for worker in serving("vit300m-qwen2", tmp_path):
        yield worker


async def test_describe(flash: Worker) -> None:
    said = await flash.stub.Describe(embeddings_pb2.DescribeRequest())
    assert said.checkpoint.fingerprint == flash.fingerprint
    assert (said.checkpoint.width, said.checkpoint.compressed_tokens_per_tile) == (128, 64)
    assert (said.device, said.dtype) == ("cpu", embeddings_pb2.FLOAT32)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in FLASH if len(case.stems) > 1])
async def test_several_images_are_one_group(flash: Worker, case: golden.Case) -> None:
    reply = await flash.encode(*case.said["images"])
    assert [list(image.compressed) for image in reply.images] == case.said["compressed"]
    assert [image.tokens for image in reply.images] == case.said["visual_tokens"]
    assert [[image.columns, image.rows] for image in reply.images] == case.said["grid"]
    for i, image in enumerate(reply.images):
        wanted = case.embeds(i)
        assert wanted is not None
        assert golden.relative(flash.delivered(image.key)[:: golden.SAMPLE], wanted) < 1e-5
        assert len(image.scores) == len(image.compressed)
    assert min(getattr(reply.timings, stage) for stage in STAGES) > 0


async def test_routes_of_single_images_in_one_crowd(flash: Worker) -> None:
    """All at once, hence in mixed batches."""
    cases = [case for case in FLASH if len(case.stems) == 1]
    replies = await asyncio.gather(*(flash.encode(case.said["images"][0], name=case.id) for case in cases))
    assert [list(r.images[0].compressed) for r in replies] == [case.said["compressed"][0] for case in cases]


async def test_an_image_twice_in_a_request(flash: Worker) -> None:
    """The quantile of twice the same scores may differ from that of once, hence fixed routes for the embedding."""
    twice = await flash.encode("wide_1300x800.jpg", "wide_1300x800.jpg", router=pb.Router(mode=pb.Router.OFF))
    assert flash.sink.data["key-0"] == flash.sink.data["key-1"]
    assert twice.images[0].tokens == 7 * 256
    embedding = flash.delivered("key-0")
    await flash.encode("wide_1300x800.jpg", router=pb.Router(mode=pb.Router.OFF))
    assert golden.relative(flash.delivered("key-0"), embedding) < 2e-6
    routed = await flash.encode("wide_1300x800.jpg", "wide_1300x800.jpg")
    assert routed.images[0].compressed == routed.images[1].compressed


@pytest.mark.parametrize(("dtype", "size"), [(embeddings_pb2.BFLOAT16, 2), (embeddings_pb2.FLOAT16, 2)])
async def test_dtype_of_the_delivery(flash: Worker, dtype: embeddings_pb2.Dtype, size: int) -> None:
    await flash.encode("square.png", dtype=dtype)
    header = flash.sink.headers["key-0"]
    assert (header.dtype, header.rows, header.width, header.length) == (dtype, 256, 128, 256 * 128 * size)
    assert header.fingerprint == flash.fingerprint


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
async def test_router_of_the_caller(flash: Worker, router: pb.Router, tokens: int) -> None:
    reply = await flash.encode("wide_1300x800.jpg", router=router)
    assert reply.images[0].tokens == tokens


@pytest.mark.parametrize(
    ("tiling", "tiles"),
    [
        (pb.Tiling(max_tiles=1), 1),
        (pb.Tiling(max_tiles=6), 7),
        (pb.Tiling(min_tiles=14), 15),  # above the checkpoint's own most, which gives way
        (pb.Tiling(min_tiles=4, max_tiles=4), 5),
    ],
)
async def test_tiling_of_the_caller(flash: Worker, tiling: pb.Tiling, tiles: int) -> None:
    reply = await flash.encode("wide_1300x800.jpg", tiling=tiling)
    assert len(reply.images[0].compressed) == tiles


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"fingerprint": "other"}, errors.CheckpointMismatch, "expects checkpoint other, this vision worker serves"),
        ({"images": []}, errors.InvalidRequest, "at least one image"),
        ({"deliver_to": ""}, errors.InvalidRequest, "deliver_to"),
        ({"dry_run": True}, errors.InvalidRequest, "and not both"),
        ({"dtype": 0}, errors.InvalidRequest, "dtype"),
        ({"tiling": pb.Tiling(min_tiles=5, max_tiles=4)}, errors.InvalidRequest, "5 and max_tiles 4"),
        ({"tiling": pb.Tiling(max_tiles=41)}, errors.InvalidRequest, "at most 40"),
        ({"router": pb.Router(relative_threshold=1.5)}, errors.InvalidRequest, "relative_threshold 1.5"),
        ({"router": pb.Router(absolute_threshold=math.nan)}, errors.InvalidRequest, "absolute_threshold nan"),
        ({"router": pb.Router(mode=7)}, errors.InvalidRequest, "mode 7"),
        ({"images": [pb.Image(key="k", data=b"text")]}, errors.InvalidImage, "not an image"),
        ({"images": [pb.Image(data=b"text")]}, errors.InvalidRequest, "key"),
    ],
)
async def test_what_is_refused(flash: Worker, fields: dict[str, Any], error: type[errors.DvdError], message: str) -> None:
    with pytest.raises(error, match=message):
        await flash.encode("square.png", **fields)
    assert not flash.sink.data


async def test_one_bad_image_of_two(flash: Worker) -> None:
    with pytest.raises(errors.InvalidImage):
        await flash.encode("square.png", b"\x89PNG")
    assert not flash.sink.data


async def test_without_a_router(plain: Worker) -> None:
    reply = await plain.encode("wide_1300x800.jpg")
    assert (reply.images[0].tokens, len(reply.images[0].scores)) == (7 * 256, 0)
    with pytest.raises(errors.InvalidRequest, match="no router"):
        await plain.encode("square.png", router=pb.Router(mode=pb.Router.ALL))


async def test_errors_of_the_sink_reach_the_caller(flash: Worker) -> None:
    flash.sink.fail = errors.SinkFull("no room for 1 MiB")
    with pytest.raises(errors.SinkFull, match="no room"):
        await flash.encode("square.png")
    with pytest.raises(errors.SinkUnavailable, match="sink did not answer"):
        await flash.encode("square.png", deliver_to="127.0.0.1:9")


async def test_a_caller_who_leaves_frees_the_queue(flash: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    left: asyncio.Queue[None] = asyncio.Queue()
    entered = asyncio.Event()

    async def never(*_: object) -> None:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            left.put_nowait(None)

    with monkeypatch.context() as patch:
        patch.setattr(flash.batcher, "encode", never)
        call = asyncio.create_task(flash.encode("square.png"))
        await entered.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await asyncio.wait_for(left.get(), 5)
        with pytest.raises(errors.DeadlineExceeded):
            await flash.encode("square.png", seconds=0.2)
        await asyncio.wait_for(left.get(), 5)
    assert (await flash.encode("square.png")).images[0].tokens == 256


# What can be seen of it


async def test_each_stage_is_timed_and_counted_once(caching: Worker) -> None:
    await asyncio.gather(*(caching.encode("wide_1300x800.jpg") for _ in range(2)))
    await caching.encode("wide_1300x800.jpg")
    stages = {stage: caching.seen("stage_seconds_count", stage=stage) for stage in STAGES}
    assert stages == {"decode": 1, "tile": 1, "encode": 1, "route": 1, "deliver": 3}
    assert [caching.seen("wait_seconds_count", stage=stage) for stage in ("decode", "encode")] == [1, 1]
    assert (caching.seen("batch_tiles_count"), caching.seen("batch_tiles_sum")) == (1, 7)
    assert caching.outcomes() == (1, 1, 1)
    for event, count in (("hits", 1), ("misses", 1), ("errors", 0), ("evictions", 0)):
        labels = {"tier": "memory", "event": event}
        assert caching.metrics.registry.get_sample_value("dvd_cache_events_total", labels) == count


async def test_errors_are_counted_by_their_code_and_nothing_stays_behind(flash: Worker) -> None:
    bad: list[dict[str, Any]] = [{"images": [pb.Image(key="k", data=b"text")]}, {"fingerprint": "x"}, {"deliver_to": "[::1]:9"}]
    for fields in bad:
        with pytest.raises(errors.DvdError):
            await flash.encode("square.png", **fields)
    codes = [flash.count("errors", code=code) for code in ("invalid_image", "checkpoint_mismatch", "sink_unavailable")]
    assert codes == [1, 1, 1]
    assert [flash.seen(gauge) for gauge in ("calls_in_flight", "waiting_images", "waiting_tiles")] == [0, 0, 0]


async def test_who_leaves_before_a_thread_is_free_waits_no_more(flash: Worker) -> None:
    free = threading.Event()
    busy = [flash.threads.submit(free.wait, 60) for _ in range(2)]
    call = asyncio.create_task(flash.encode("square.png"))
    async with asyncio.timeout(20):
        while flash.seen("waiting_images") != 1:
            await asyncio.sleep(0.01)
        call.cancel()
        while flash.seen("calls_in_flight"):
            await asyncio.sleep(0.01)
        assert flash.seen("waiting_images") == 0
        free.set()
        await asyncio.gather(*map(asyncio.wrap_future, busy))
    assert flash.count("errors", code="cancelled") == 1
    await flash.encode("square.png")
    assert flash.seen("waiting_images") == 0


@pytest.mark.parametrize(("said", "logged"), [("a-request.1", "a-request.1"), ('no id"', ""), (None, "")])
async def test_a_call_is_a_line_in_the_log_under_its_callers_id(
    flash: Worker, caplog: pytest.LogCaptureFixture, said: str | None, logged: str
) -> None:
    names = Names()
    log = logging.getLogger("dvd.encode")
    log.addFilter(names)
    caplog.set_level("INFO", log.name)
    metadata = ((logs.REQUEST_ID_KEY, said),) if said else ()
    await flash.encode("wide_1300x800.jpg", metadata=metadata)
    with pytest.raises(errors.InvalidImage):
        await flash.encode(b"text", metadata=metadata)
    log.removeFilter(names)
    first, second = (record.__dict__["fields"] for record in caplog.records if record.name == log.name)
    assert first.pop("seconds") > 0
    assert first == {"images": 1, "outcome": "encoded", "tiles": 7, "tokens": first["tokens"]}
    assert second["error"] == "invalid_image"
    assert names.seen == [logged, logged]


class Names(logging.Filter):
    """The request under which each record was made."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        self.seen.append(logs.request_id.get())
        return True


# Never twice


@pytest.fixture
async def caching(tmp_path: Path) -> AsyncIterator[Worker]:
    async for worker in serving("flash-qwen3", tmp_path, Memory(64 << 20)):
        yield worker


async def test_a_hundred_calls_at_once_are_one_encode(flash: Worker) -> None:
    replies = await asyncio.gather(*(flash.encode("wide_1300x800.jpg") for _ in range(100)))
    assert flash.outcomes() == (1, 0, 99)
    assert flash.count("tiles") == 7
    assert len({reply.images[0].SerializeToString() for reply in replies}) == 1


async def test_another_sink_gets_what_was_made_before(caching: Worker) -> None:
    first = await caching.encode("wide_1300x800.jpg")
    delivered = caching.sink.data.pop("key-0")
    second = await caching.encode("wide_1300x800.jpg")
    assert caching.outcomes() == (1, 1, 0)
    assert caching.sink.data["key-0"] == delivered
    assert first.images == second.images
    assert (first.cached, second.cached) == (False, True)
    assert (second.timings.decode, second.timings.encode) == (0, 0)


async def test_a_group_of_which_a_part_is_kept_is_made_anew(caching: Worker) -> None:
    """Its images are routed as one."""
    await caching.encode("square.png")
    await caching.encode("square.png", "wide_1300x800.jpg")
    assert caching.outcomes() == (3, 0, 0)
    await caching.encode("square.png", "wide_1300x800.jpg")
    assert caching.outcomes() == (3, 2, 0)


async def test_what_failed_is_not_kept(caching: Worker) -> None:
    with pytest.raises(errors.InvalidImage):
        await caching.encode(b"\x89PNG")
    assert (await caching.encode("square.png")).images[0].tokens == 256
    assert caching.outcomes() == (1, 0, 0)


async def test_a_dry_run_delivers_nothing_and_is_not_made_twice(caching: Worker) -> None:
    dry = await caching.encode("wide_1300x800.jpg", deliver_to="", dry_run=True)
    assert not caching.sink.data
    real = await caching.encode("wide_1300x800.jpg")
    assert dry.images == real.images
    assert (dry.cached, real.cached, dry.timings.deliver) == (False, True, 0)
    assert caching.outcomes() == (1, 1, 0)
    assert len(caching.sink.data["key-0"]) == real.images[0].tokens * 128 * 4
