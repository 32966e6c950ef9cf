"""Deliveries without gRPC: they are refused like those through gRPC, and no sender can disturb another."""

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from common import errors, rpc
from common.embedding import HEADER_SIZE, Header
from common.embedding_stream import header_message, placed_message
from common.grants import GrantSigner
from common.security import Credentials
from common.transport import direct_call
from common.transport.connection import frame
from common.transport.direct_call import DirectCalls, UnixSockets, calls_to, socket_path
from common.transport.shared_memory import SharedMemoryTransport
from lm_worker.shared_memory import create_folder
from lm_worker.sink import SinkOptions, SinkServer
from protos import embeddings_pb2 as pb
from protos import embeddings_pb2_grpc
from tests.common.transport.sinks import CHECKPOINT, header_of, values_of
from vision_worker.delivery import SinkChannels

TOKEN = "a-token-of-this-cluster"
CLUSTER = Credentials(TOKEN)
STALL_SECONDS = 0.5


def options(folder: Path) -> SinkOptions:
    return SinkOptions(
        model=str(CHECKPOINT), listen=f"unix:{folder}/sink", http="unix:/nowhere", dtype="float32",
        folder=str(folder / "store"), budget=1 << 20, lease=0.0, stall_seconds=STALL_SECONDS,
    )  # fmt: skip


@pytest.fixture
async def sink(tmp_path: Path) -> AsyncIterator[SinkOptions]:
    create_folder(tmp_path / "store")
    async with SinkServer(options(tmp_path)) as server:
        yield server._options
    assert not (tmp_path / "sink.deliver").exists()


@pytest.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[SinkOptions]:
    create_folder(tmp_path / "store")
    async with SinkServer(options(tmp_path), CLUSTER) as server:
        yield server._options


@contextlib.asynccontextmanager
async def connect(sink: SinkOptions) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    path = socket_path(sink.listen)
    assert path is not None
    reader, writer = await asyncio.open_unix_connection(path)
    async with asyncio.timeout(20):
        yield reader, writer
    writer.close()
    await writer.wait_closed()


async def read_message(reader: asyncio.StreamReader) -> bytes:
    return await reader.readexactly(int.from_bytes(await reader.readexactly(4), "little"))


def direct_calls(sink: SinkOptions) -> DirectCalls:
    calls = calls_to(sink.listen, [SharedMemoryTransport()])
    assert calls is not None
    return calls


async def answer(reader: asyncio.StreamReader) -> dict[str, Any]:
    """What the sink answers to the call, without what it says about further calls."""
    parsed: dict[str, Any] = json.loads(await read_message(reader))
    parsed.pop("eager", None)
    return parsed


async def deliver(sink: SinkOptions, number: int = 1, grant: bytes = b"", credentials: Credentials = CLUSTER) -> bool:
    calls, header = direct_calls(sink), header_of(number, 100)
    try:
        return await calls.deliver(header, values_of(header), 20, credentials.metadata, grant, [SharedMemoryTransport()])
    finally:
        await calls.close()


async def used_bytes(sink: SinkOptions) -> int:
    async with rpc.open_channel(sink.listen) as channel:
        description: pb.LanguageDescription = await embeddings_pb2_grpc.EmbeddingSinkStub(channel).Describe(
            pb.DescribeRequest()
        )
        return description.used_bytes


METADATA = json.dumps([["dvd-transports", "shm"]]).encode()


async def test_one_connection_serves_one_call_after_another(sink: SinkOptions) -> None:
    calls = direct_calls(sink)
    for number in (1, 2, 1):
        header = header_of(number, 100)
        assert await calls.deliver(header, values_of(header), 20, (), b"", [SharedMemoryTransport()])
    with pytest.raises(errors.InvalidRequest, match="expected at least 1 row"):
        await calls.deliver(header_of(3, 0), memoryview(b""), 20, (), b"", [SharedMemoryTransport()])
    header = header_of(4, 100)
    assert await calls.deliver(header, values_of(header), 20, (), b"", [SharedMemoryTransport()])
    assert len(calls._idle) == 1
    await calls.close()


async def test_shared_memory_that_failed_once_is_used_again(sink: SinkOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, placed, place = direct_calls(sink), list[str](), SharedMemoryTransport.place

    async def fail_once(*arguments: Any) -> bool:
        placed.append(arguments[2].key)
        return len(placed) > 1 and await place(*arguments)

    monkeypatch.setattr(SharedMemoryTransport, "place", fail_once)
    headers = [header_of(number, 100) for number in range(3)]
    for header in headers:
        assert await calls.deliver(header, values_of(header), 20, (), b"", [SharedMemoryTransport()])
    assert placed == [header.key for header in headers]
    await calls.close()


async def test_it_needs_token_and_grant(guarded: SinkOptions) -> None:
    async with rpc.open_channel(guarded.listen) as channel:
        stub = embeddings_pb2_grpc.EmbeddingSinkStub(channel)
        description = await stub.Describe(pb.DescribeRequest(), metadata=CLUSTER.metadata)
    header = header_of(1, 100)
    grant = GrantSigner(CLUSTER).sign(description.sink, guarded.listen, header.key, header.length, 60)
    for credentials in (Credentials(), Credentials("a-token-of-another-cluster")):
        with pytest.raises(errors.Unauthorized):
            await deliver(guarded, 1, grant, credentials)
    with pytest.raises(errors.GrantRefused):
        await deliver(guarded, 1, b"")
    assert list((Path(guarded.folder) / ".incoming").iterdir()) == []
    assert await deliver(guarded, 1, grant)


@pytest.mark.parametrize("message", [b"", b"null", b"{", b"[1]", b'[["a", 1]]', b'[["a"]]', b"\xff", b'"text"', 60_000 * b"["])
async def test_what_is_no_metadata_ends_the_connection(sink: SinkOptions, message: bytes) -> None:
    async with connect(sink) as (reader, writer):
        writer.write(frame(message))
        assert await reader.read() == b""
    assert await deliver(sink)


async def test_a_message_that_is_too_long_is_not_read(sink: SinkOptions) -> None:
    async with connect(sink) as (reader, writer):
        writer.write((65 << 10).to_bytes(4, "little"))
        assert await reader.read() == b""
    async with connect(sink) as (reader, writer):
        writer.write(frame(METADATA) + b"\xff\xff\xff\xff")
        assert await reader.read() == b""
    assert await deliver(sink)


@pytest.mark.parametrize(
    "message", [b"", b"\xff\xff", placed_message("shm", 1), pb.DeliverChunk(data=b"data").SerializeToString()]
)
async def test_a_call_that_does_not_begin_with_a_header_is_refused(sink: SinkOptions, message: bytes) -> None:
    async with connect(sink) as (reader, writer):
        writer.write(frame(METADATA) + frame(message))
        assert (await answer(reader))["error"] == "invalid_request"
    assert await deliver(sink)


@pytest.mark.parametrize(
    "second",
    [
        b"\xff",
        placed_message("tcp", 1),
        placed_message("shm", 1),
        header_message(header_of(7, 1)),
        pb.DeliverChunk().SerializeToString(),
    ],
    ids=["no message", "not offered", "another length", "a second header", "empty"],
)
async def test_a_second_message_that_does_not_fit_is_refused(sink: SinkOptions, second: bytes) -> None:
    header = header_of(7, 100)
    async with connect(sink) as (reader, writer):
        writer.write(frame(METADATA) + frame(header_message(header)))
        assert list((await answer(reader))["offers"]) == ["shm"]
        writer.write(frame(second))
        assert (await answer(reader))["error"] == "invalid_request"
    assert await used_bytes(sink) == 0
    assert await deliver(sink, 7)


@contextlib.asynccontextmanager
async def offered_file(sink: SinkOptions, header: Header, transports: str = "shm") -> AsyncIterator[tuple[Path, Any, Any]]:
    async with connect(sink) as (reader, writer):
        writer.write(frame(json.dumps([["dvd-transports", transports]]).encode()) + frame(header_message(header)))
        offer = await answer(reader)
        assert offer["progress"], "the sink takes reports of progress"
        yield Path(offer["offers"]["shm"]), reader, writer


async def test_values_are_checked_before_the_last_ones_are_placed(sink: SinkOptions) -> None:
    header = header_of(7, 100)
    async with offered_file(sink, header) as (path, reader, writer):
        with path.open("r+b") as file:
            file.seek(HEADER_SIZE)
            file.write(b"\xff\xff\xff\xff")
        writer.write(frame(placed_message("shm", 400, partial=True)))
        assert "infinite or undefined" in (await answer(reader))["message"]
    assert await used_bytes(sink) == 0


async def test_after_reports_of_progress_the_rest_is_checked(sink: SinkOptions) -> None:
    header = header_of(7, 100)
    async with offered_file(sink, header) as (path, reader, writer):
        path.write_bytes(header.pack() + values_of(header)[:-4] + b"\0\0\x80\x7f")
        for count in (1, 400, 400, header.length - 4):
            writer.write(frame(placed_message("shm", count, partial=True)))
        writer.write(frame(placed_message("shm", header.length)))
        assert "infinite or undefined" in (await answer(reader))["message"]
    async with offered_file(sink, header) as (path, reader, writer):
        path.write_bytes(header.pack() + values_of(header))
        writer.write(frame(placed_message("shm", 400, partial=True)) + frame(placed_message("shm", header.length)))
        assert await answer(reader) == {"already_here": False}
    assert (Path(sink.folder) / header.key).read_bytes() == header.pack() + values_of(header)


@pytest.mark.parametrize(
    "rest",
    [
        frame(placed_message("unix", header_of(7, 100).length)) + b"\xff" * header_of(7, 100).length,
        frame(pb.DeliverChunk(data=b"\0\0\0\0").SerializeToString()),
    ],
    ids=["through the connection", "in messages"],
)
async def test_values_that_were_reported_in_part_come_by_no_other_way(sink: SinkOptions, rest: bytes) -> None:
    """They would be mixed with those of the evicted embedding that had the file, and the first ones would not be checked."""
    async with offered_file(sink, header_of(7, 100), "shm,unix") as (_, reader, writer):
        writer.write(frame(placed_message("shm", 400, partial=True)) + rest)
        assert (await answer(reader))["error"] == "invalid_request"
    assert await used_bytes(sink) == 0


async def test_a_write_that_fails_after_a_report_is_repeated_through_grpc(
    sink: SinkOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_self: object, _offer: str, _header: Header, _data: memoryview, on_progress: Any) -> bool:
        on_progress("shm", 4)
        return False

    monkeypatch.setattr(SharedMemoryTransport, "place", fail)
    assert not await deliver(sink), "the sender then uses gRPC"
    async with asyncio.timeout(20):
        while await used_bytes(sink):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("counts", [[200, 100], [10**6], [2**63]])
async def test_a_report_of_impossible_progress_is_refused(sink: SinkOptions, counts: list[int]) -> None:
    async with offered_file(sink, header_of(7, 100)) as (_, reader, writer):
        for count in counts:
            writer.write(frame(placed_message("shm", count, partial=True)))
        assert (await answer(reader))["error"] == "invalid_request"
    assert await used_bytes(sink) == 0


async def test_a_sender_that_stalls_or_leaves_gives_back_budget_and_key(sink: SinkOptions) -> None:
    header = header_of(8, 100)
    async with connect(sink) as (reader, writer):
        writer.write(frame(METADATA) + frame(header_message(header)))
        assert "offers" in await answer(reader)
        assert (await answer(reader))["error"] == "deadline_exceeded"
    async with connect(sink) as (reader, writer):
        writer.write(frame(METADATA) + frame(header_message(header)))
        assert "offers" in await answer(reader)
    async with asyncio.timeout(20):
        while await used_bytes(sink):
            await asyncio.sleep(0.01)
    assert await deliver(sink, 8)


async def test_an_unexpected_error_is_logged_and_tells_nothing(
    sink: SinkOptions, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr("lm_worker.sink.Sink._validate_header", fail)
    with caplog.at_level(logging.ERROR), pytest.raises(errors.InternalError) as caught:
        await deliver(sink)
    assert "secret" not in str(caught.value)
    assert "ZeroDivisionError" in caplog.text


async def test_without_the_socket_senders_use_grpc(sink: SinkOptions) -> None:
    path = str(socket_path(sink.listen))
    os.rename(path, f"{path}.moved")
    assert not await deliver(sink)
    header = header_of(1, 100)
    async with SinkChannels() as sinks:
        await sinks.deliver(sink.listen, header, values_of(header), 20)
    assert (Path(sink.folder) / header.key).exists()
    os.rename(f"{path}.moved", path)


async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer nothing until the sender leaves."""
    await reader.read()
    writer.close()
    await writer.wait_closed()


async def test_a_sink_that_hangs_is_unavailable_before_the_deadline(sink: SinkOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_call, "_ANSWER_SECONDS", 0.1)
    header, calls = header_of(1, 100), DirectCalls(UnixSockets(hung := str(Path(sink.folder).parent / "hung")))
    server = await asyncio.start_unix_server(hang, hung)
    with pytest.raises(errors.SinkUnavailable, match="has not answered for"):
        await calls.deliver(header, values_of(header), 600, (), b"", [SharedMemoryTransport()])
    assert not calls._idle
    server.close()
    await server.wait_closed()


async def test_a_peer_without_token_that_leaves_leaves_no_traceback(
    guarded: SinkOptions, capfd: pytest.CaptureFixture[str]
) -> None:
    async with connect(guarded) as (_, writer):
        writer.write(frame(b"[]"))
    async with connect(guarded) as (reader, writer):
        writer.write(frame(b"[]") + frame(b"x"))
        assert b"missing or wrong cluster token" in await read_message(reader)
    assert "Traceback" not in capfd.readouterr().err


async def test_a_sink_that_hangs_is_left_at_the_deadline(sink: SinkOptions) -> None:
    header, calls = header_of(1, 100), DirectCalls(UnixSockets(hanging := str(Path(sink.folder).parent / "hanging")))
    server = await asyncio.start_unix_server(hang, hanging)
    with pytest.raises(errors.DeadlineExceeded):
        await calls.deliver(header, values_of(header), 0.1, (), b"", [SharedMemoryTransport()])
    assert not calls._idle
    server.close()
    await server.wait_closed()
