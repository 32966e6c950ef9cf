"""What every transport guarantees, between real senders and a real sink in a process of its own."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from common import embedding_stream, errors, rpc
from common.embedding import HEADER_SIZE, Header
from common.grants import GrantSigner
from common.security import Credentials
from common.transport.base import OnProgress, Transport
from lm_worker.pins import Pins
from lm_worker.shared_memory import map_embedding
from protos import embeddings_pb2 as pb
from protos import embeddings_pb2_grpc
from tests.common.transport.sinks import (
    ROW_BYTES,
    TRANSPORTS,
    RunningSink,
    header_of,
    is_right,
    start_sink,
    stored_right,
    values_of,
)
from vision_worker.delivery import SinkChannels

BUDGET = 16 << 20
ROWS = 2048
"""Of an embedding of 1 MiB: each transport needs several steps for it."""
TOKEN = "a-token-of-this-cluster"
first_numbers = itertools.count(1_000_000)
"""Of embeddings by which a sender learns the port for direct calls."""


EAGER = "tcp-eager"
"""The senders' connections are known to take small embeddings without an offer."""


@pytest.fixture(scope="module", params=[*TRANSPORTS, EAGER])
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def transport(case: str) -> str:
    return "tcp" if case == EAGER else case


@pytest.fixture(scope="module")
def name(transport: str) -> str:
    """Name of the transport in metrics and in the negotiation."""
    return transport.split("-")[0]


@pytest.fixture(scope="module")
def sink(transport: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSink]:
    with start_sink(tmp_path_factory.mktemp(transport) / "store", transport, BUDGET) as running:
        yield running


@pytest.fixture
async def sinks(case: str, transport: str, sink: RunningSink) -> AsyncIterator[SinkChannels]:
    """A sender's channels, which live as long as a vision worker, and have delivered already."""
    async with SinkChannels(transports=TRANSPORTS[transport]) as channels:
        await send(channels, sink, header_of(next(first_numbers), 1))
        if case == EAGER:  # as many connections as tests have deliveries at the same time
            await asyncio.gather(*(send(channels, sink, header_of(next(first_numbers), 1)) for _ in range(8)))
        yield channels


async def describe(sink: RunningSink, token: str = "") -> pb.LanguageDescription:
    async with rpc.open_channel(sink.options.listen) as channel:
        stub = embeddings_pb2_grpc.EmbeddingSinkStub(channel)
        metadata = Credentials(token or None).metadata
        description: pb.LanguageDescription = await stub.Describe(
            pb.DescribeRequest(), wait_for_ready=True, timeout=30, metadata=metadata
        )
        return description


async def send(sinks: SinkChannels, sink: RunningSink, header: Header, data: memoryview | None = None) -> None:
    await sinks.deliver(sink.options.listen, header, values_of(header) if data is None else data, 30)


async def expect_nothing_left(sink: RunningSink) -> None:
    """Wait until a failed delivery uses nothing: the sink may learn of the failure, or of the delivery, after its sender."""

    def visible_bytes() -> int:
        return sum((sink.folder / key).stat().st_size for key in sink.embeddings())

    async with asyncio.timeout(20):
        while any((sink.folder / ".incoming").iterdir()) or (await describe(sink)).used_bytes != visible_bytes():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("rows", [1, 7, ROWS, 4 * ROWS - 3])
async def test_the_bytes_are_right_and_travel_by_the_transport(
    name: str, sink: RunningSink, sinks: SinkChannels, rows: int
) -> None:
    before = await asyncio.to_thread(sink.received_by)
    for number in (1, 2):
        header = header_of(number, rows)
        await send(sinks, sink, header)
        assert stored_right(sink, header.key)
    after = await asyncio.to_thread(sink.received_by)
    grown = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    assert grown == {name: 2 * rows * ROW_BYTES}


async def test_reused_files_have_the_right_bytes_only(sink: RunningSink, sinks: SinkChannels) -> None:
    """Far more than fits, in many sizes, several at once, while a reader maps some of them past their eviction."""
    random, pins, mappings = np.random.default_rng(0), Pins(sink.folder), []
    for number in range(10, 60, 4):
        headers = [header_of(number + i, int(random.integers(1, 2 * ROWS))) for i in range(4)]
        await asyncio.gather(*(send(sinks, sink, header) for header in headers))
        assert all(stored_right(sink, header.key) for header in headers)
        assert pins.pin(headers[0].key)
        mappings.append((headers[0].key, map_embedding(pins.path(headers[0].key))[1]))
        pins.unpin(headers[0].key)
        assert sum(file.stat().st_size for file in sink.files()) <= BUDGET
    assert all(is_right(mapping[:], key) for key, mapping in mappings)
    assert len(sink.embeddings()) < 4 * len(mappings), "some have been evicted"
    for _, mapping in mappings:
        mapping.close()


@pytest.mark.parametrize("change", [-4, -1, -ROWS * ROW_BYTES, 4], ids=["short", "torn value", "empty", "over-long"])
async def test_a_delivery_of_another_length_is_never_visible(sink: RunningSink, sinks: SinkChannels, change: int) -> None:
    header = header_of(100, ROWS)
    data = memoryview(bytes(values_of(header)) + bytes(4))[: header.length + change]
    with pytest.raises((errors.InvalidRequest, errors.DeadlineExceeded)):
        await send(sinks, sink, header, data)
    assert not (sink.folder / header.key).exists()
    await expect_nothing_left(sink)
    await send(sinks, sink, header)
    assert stored_right(sink, header.key)
    await evict(sink, sinks, header)


async def evict(sink: RunningSink, sinks: SinkChannels, header: Header) -> None:
    """Fill the sink until it has evicted an embedding."""
    for number in range(1_000_000):
        if not (sink.folder / header.key).exists():
            return
        await send(sinks, sink, header_of(10_000 + number % 40, 4 * ROWS))
    raise AssertionError


@pytest.mark.parametrize("at", [0, ROWS * 64, ROWS * 128 - 1], ids=["first", "middle", "last"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
async def test_a_value_that_is_not_finite_is_never_visible(
    sink: RunningSink, sinks: SinkChannels, at: int, value: float
) -> None:
    header = header_of(200, ROWS)
    values = np.ones(ROWS * 128, "float32")
    values[at] = value
    with pytest.raises(errors.InvalidRequest, match="infinite or undefined"):
        await send(sinks, sink, header, memoryview(values.tobytes()))
    assert not (sink.folder / header.key).exists()
    await expect_nothing_left(sink)


@pytest.mark.parametrize("seconds", [0.0, 0.001, 0.003, 0.01, 0.03])
async def test_a_cancelled_delivery_gives_back_budget_and_key(sink: RunningSink, sinks: SinkChannels, seconds: float) -> None:
    header = header_of(300, 4 * ROWS)
    await send(sinks, sink, header_of(301, 1))  # the channel is open
    task = asyncio.create_task(send(sinks, sink, header))
    await asyncio.sleep(seconds)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await expect_nothing_left(sink)
    await send(sinks, sink, header)
    assert stored_right(sink, header.key)
    await evict(sink, sinks, header)


async def test_concurrent_duplicates_are_stored_once(sink: RunningSink, sinks: SinkChannels, name: str) -> None:
    header, before = header_of(400, ROWS), await asyncio.to_thread(sink.received_by)
    await asyncio.gather(*(send(sinks, sink, header) for _ in range(8)))
    assert stored_right(sink, header.key)
    after = await asyncio.to_thread(sink.received_by)
    assert after[name] - before[name] == header.length


class Untouched:
    """A transport that must not be used."""

    def __init__(self, name: str) -> None:
        self.name = name  # type: ignore[misc]  # one class for all of them

    name: ClassVar[str]

    async def place(self, offer: str, header: Header, data: memoryview, on_progress: OnProgress | None = None) -> bool:
        pytest.fail("a refused delivery was offered a slot")

    async def close(self) -> None:
        pass


async def test_what_exceeds_the_budget_is_refused_before_values_are_written(sink: RunningSink, name: str) -> None:
    rows = BUDGET // ROW_BYTES + 1
    header = header_of(500, rows)
    async with SinkChannels(transports=lambda *_: [Untouched(name)]) as sinks:
        with pytest.raises((errors.SinkFull, errors.ContextLengthExceeded)):
            await send(sinks, sink, header)
    await expect_nothing_left(sink)


async def test_pinned_embeddings_are_never_overwritten(sink: RunningSink, sinks: SinkChannels) -> None:
    pins, keys = Pins(sink.folder), list[str]()

    async def fill() -> None:
        for number in range(600, 700):
            header = header_of(number, 2 * ROWS)
            await send(sinks, sink, header)
            assert pins.pin(header.key)
            keys.append(header.key)

    with pytest.raises(errors.SinkFull):
        await fill()
    assert len(keys) > 5
    assert all(stored_right(sink, key) for key in keys)
    for key in keys:
        pins.unpin(key)
    await send(sinks, sink, header_of(700, 2 * ROWS))


class Broken:
    """A transport whose sender cannot use what is offered, or finds so only after it has written something."""

    name: ClassVar[str]

    def __init__(self, inner: Transport) -> None:
        self.name = inner.name  # type: ignore[misc]
        self._inner = inner

    async def place(self, offer: str, header: Header, data: memoryview, on_progress: OnProgress | None = None) -> bool:
        await self._inner.place(offer[:-1] + ("0" if offer[-1] != "0" else "1"), header, data, on_progress)
        return False

    async def close(self) -> None:
        await self._inner.close()


async def test_values_are_streamed_where_a_transport_does_not_work(sink: RunningSink, transport: str) -> None:
    def broken(address: str, credentials: Credentials) -> Sequence[Transport]:
        return [Broken(inner) for inner in TRANSPORTS[transport](address, credentials)]

    before = await asyncio.to_thread(sink.received_by)
    header = header_of(800, ROWS)
    async with SinkChannels(transports=broken) as sinks:
        await send(sinks, sink, header)
    assert stored_right(sink, header.key)
    after = await asyncio.to_thread(sink.received_by)
    name = "unix" if transport == "shm" else "grpc"  # through the connection of the direct call, if there is one
    assert after[name] - before.get(name, 0) == header.length


class Hanging:
    """TCP whose connection has broken without a sign: it waits for ever."""

    name: ClassVar[str] = "tcp"

    async def place(self, offer: str, header: Header, data: memoryview, on_progress: OnProgress | None = None) -> bool:
        await asyncio.Event().wait()
        raise AssertionError

    async def close(self) -> None:
        pass


@pytest.mark.parametrize("case", ["tcp"], indirect=True)
async def test_a_sender_gives_up_placing_when_the_call_ends(sink: RunningSink) -> None:
    """The sink ends it, since nothing arrives; the sender's own deadline is far."""

    async with SinkChannels(transports=lambda *_: [Hanging()]) as sinks:
        header = header_of(850, ROWS)
        with pytest.raises(errors.DeadlineExceeded, match="stalled"):
            await sinks.deliver(sink.options.listen, header, values_of(header), 600)
    await expect_nothing_left(sink)


async def test_values_that_are_said_to_be_placed_but_are_not_are_refused(sink: RunningSink, name: str) -> None:
    """By a transport that was not offered, and by TCP without a connection."""
    header = header_of(900, ROWS)
    names = {"shm": "tcp", "tcp": "tcp", "grpc": "shm"}

    async def claim() -> AsyncIterator[bytes]:
        yield embedding_stream.header_message(header)
        yield embedding_stream.placed_message(names[name], header.length)

    async with rpc.open_channel(sink.options.listen) as channel:
        method: Any = channel.stream_unary("/dvd.v1.EmbeddingSink/Deliver")
        with pytest.raises(errors.InvalidRequest), rpc.translate_errors("sink"):
            await method(claim(), timeout=30, metadata=(("dvd-transports", "tcp"),))
    assert not (sink.folder / header.key).exists()
    await expect_nothing_left(sink)


@pytest.fixture(scope="module")
def guarded(transport: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSink]:
    """A sink of a cluster with a token."""
    folder = tmp_path_factory.mktemp(f"guarded-{transport}") / "store"
    with start_sink(folder, transport, BUDGET, token=TOKEN) as running:
        yield running


async def test_a_delivery_without_a_grant_is_offered_no_slot(guarded: RunningSink, transport: str, name: str) -> None:
    header, description = header_of(1, ROWS), await describe(guarded, TOKEN)
    signer = GrantSigner(Credentials(TOKEN))

    def sign(sink: str = description.sink, key: str = header.key) -> bytes:
        return signer.sign(sink, guarded.options.listen, key, header.length, 60)

    async with SinkChannels(Credentials(TOKEN), lambda *_: [Untouched(name)]) as sinks:
        for grant in (b"", sign(sink="another"), sign(key="x")):
            with pytest.raises(errors.GrantRefused):
                await sinks.deliver(guarded.options.listen, header, values_of(header), 30, grant)
    assert guarded.files() == []
    async with SinkChannels(Credentials(TOKEN), TRANSPORTS[transport]) as sinks:
        await sinks.deliver(guarded.options.listen, header, values_of(header), 30, sign())
        assert stored_right(guarded, header.key)
        before, header = await asyncio.to_thread(guarded.received_by), header_of(2, ROWS)
        with pytest.raises(errors.GrantRefused):
            await sinks.deliver(guarded.options.listen, header, values_of(header), 30, sign())
        await sinks.deliver(guarded.options.listen, header, values_of(header), 30, sign(key=header.key))
    assert stored_right(guarded, header.key)
    assert (await asyncio.to_thread(guarded.received_by))[name] - before.get(name, 0) == header.length
    assert (guarded.folder / header.key).stat().st_size == HEADER_SIZE + header.length


async def test_the_sink_gives_its_memory_back(transport: str, tmp_path: Path) -> None:
    with start_sink(tmp_path / "store", transport, BUDGET) as sink:
        async with SinkChannels(transports=TRANSPORTS[transport]) as sinks:
            for number in range(30):
                await send(sinks, sink, header_of(number, 4 * ROWS))
    assert not (tmp_path / "store").exists()
