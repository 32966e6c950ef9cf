"""Direct calls over TCP: what a stranger on the sink's port can do, and what happens to a sender without a usable port."""

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from common import errors
from common.embedding import Header
from common.embedding_stream import header_message, placed_message
from common.security import OPEN, Credentials
from common.transport import direct_call
from common.transport.connection import Connection, frame
from common.transport.direct_call import EAGER_KEY, DirectCalls, TcpPort
from lm_worker import direct_calls
from lm_worker.direct_calls import DirectCallServer
from lm_worker.shared_memory import create_folder
from lm_worker.sink import SinkOptions, SinkServer, _listen_for_direct_calls
from tests.certificates import Authority
from tests.common.transport.sinks import CHECKPOINT, header_of, values_of
from tests.ports import free_port

TOKEN = "a-token-of-this-cluster"
HEADER = header_of(3, 1000)
FOREIGN = Header("another", "0" * 64, "float32", 5, 128)
"""Of another checkpoint: it is refused before a slot is taken."""
METADATA = json.dumps([["dvd-transports", "tcp"], *Credentials(TOKEN).metadata]).encode()


def options(tmp_path: Path, listen: str, port: int = 0) -> SinkOptions:
    return SinkOptions(
        model=str(CHECKPOINT), listen=listen, http="unix:/nowhere", dtype="float32", folder=str(tmp_path / "store"),
        budget=8 << 20, lease=0.0, delivery_port=port,
    )  # fmt: skip


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[DirectCallServer]:
    """The direct calls of a sink without grants, whose senders show the cluster token all the same."""
    create_folder(tmp_path / "store")
    async with SinkServer(options(tmp_path, f"127.0.0.1:{free_port()}")) as sink:
        assert sink._direct_calls is not None
        sink._direct_calls._credentials = Credentials(TOKEN)
        yield sink._direct_calls


def offer_of(server: DirectCallServer) -> str:
    return f"{server.port} {server.sink_id}"


async def port_of(server: DirectCallServer) -> TcpPort:
    """The port as a sender has learned it."""
    port = TcpPort("127.0.0.1:1")
    assert not await port.place(offer_of(server), HEADER, memoryview(b"")), "nothing is placed by a gRPC call"
    return port


async def deliver(calls: DirectCalls, number: int = 3, rows: int = 1000) -> bool:
    header = header_of(number, rows)
    return await calls.deliver(header, values_of(header), 20, Credentials(TOKEN).metadata, b"", [])


def stored(tmp_path: Path) -> list[str]:
    return sorted(file.name for file in (tmp_path / "store").iterdir() if file.is_file())


async def test_one_connection_serves_one_embedding_after_another(server: DirectCallServer, tmp_path: Path) -> None:
    calls = DirectCalls(await port_of(server))
    for number in range(4):
        assert await deliver(calls, number, 1 + 900 * number)
    assert len(stored(tmp_path)) == 4
    assert (len(calls._idle), len(server._idle), len(server._strangers)) == (1, 1, 0)
    await calls.close()


async def test_embeddings_at_the_same_time_get_their_own_values(server: DirectCallServer, tmp_path: Path) -> None:
    calls = DirectCalls(await port_of(server))
    assert all(await asyncio.gather(*(deliver(calls, number, 2000) for number in range(5))))
    for number in range(5):
        header = header_of(number, 2000)
        assert (tmp_path / "store" / header.key).read_bytes() == header.pack() + values_of(header)
    await calls.close()


@pytest.mark.parametrize(
    "first", [b"", b"GET / HTTP/1.1\r\n", b"\7\0\0", frame(METADATA)], ids=["silent", "HTTP", "torn", "half"]
)
async def test_a_stranger_is_disconnected_and_gets_no_byte(
    server: DirectCallServer, first: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_calls, "_STRANGER_SECONDS", 0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(first)
    async with asyncio.timeout(20):
        assert await reader.read() == b""
        while server._strangers:
            await asyncio.sleep(0.01)
    writer.close()


async def test_without_the_token_nothing_is_received_and_the_connection_is_closed(
    server: DirectCallServer, tmp_path: Path
) -> None:
    calls = DirectCalls(await port_of(server))
    with pytest.raises(errors.Unauthorized):
        await calls.deliver(HEADER, values_of(HEADER), 20, Credentials("another-token-of-16").metadata, b"", [])
    async with asyncio.timeout(20):
        while server._strangers:
            await asyncio.sleep(0.01)
    assert (len(server._idle), stored(tmp_path)) == (0, [])
    await calls.close()


@pytest.mark.parametrize("token", ["", "Bearer wrong", "\ud800"])
async def test_a_stranger_has_one_call_a_connection(server: DirectCallServer, token: str) -> None:
    """Calls one after the other would keep the event loop from all others."""
    metadata = json.dumps([["authorization", token]]).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write((frame(metadata) + frame(b"")) * 100)
    assert (await answer(reader))["error"] == errors.Unauthorized.code
    with contextlib.suppress(ConnectionResetError):  # the rest was not read
        assert await reader.read() == b""
    writer.close()


async def test_a_stranger_that_takes_no_answer_is_disconnected(
    server: DirectCallServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(*_: bytes) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(direct_calls, "_SEND_SECONDS", 0.2)
    monkeypatch.setattr("common.transport.connection.Connection.send", hang)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(frame(b"[]") + frame(b""))
    async with asyncio.timeout(20):
        assert await reader.read() == b""
    writer.close()


async def test_a_sink_that_has_the_port_of_another_one_closes(server: DirectCallServer, tmp_path: Path) -> None:
    """The sender then uses gRPC, whose address is right, and learns the port anew."""
    port = TcpPort("127.0.0.1:1")
    await port.place(f"{server.port} {'0' * 16}", HEADER, memoryview(b""))
    calls = DirectCalls(port)
    assert not await deliver(calls)
    assert stored(tmp_path) == []
    await port.place(offer_of(server), HEADER, memoryview(b""))
    assert await deliver(calls)
    await calls.close()


async def test_values_through_the_connection_are_not_reported_in_parts(server: DirectCallServer, tmp_path: Path) -> None:
    """The slot may have the values of an evicted embedding, which would become visible."""
    calls = DirectCalls(await port_of(server))
    assert await deliver(calls, 1)
    store: Any = server._sink._store  # type: ignore[attr-defined]
    store._evict(next(iter(store._entries)))
    for message in (placed_message("tcp", HEADER.length, partial=True), placed_message("tcp", 4, partial=True)):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(frame(METADATA) + frame(header_message(HEADER)))
        assert "tcp" in (await answer(reader))["offers"]
        writer.write(frame(message))
        writer.write_eof()
        assert (await answer(reader))["error"] == "invalid_request"
        writer.close()
        await expect_nothing(tmp_path)
    await calls.close()


async def test_many_silent_strangers_keep_no_sender_out(server: DirectCallServer) -> None:
    strangers, loop = list[socket.socket](), asyncio.get_running_loop()
    for number in range(3 * direct_calls._MAX_STRANGERS):
        stranger = socket.socket()
        stranger.setblocking(False)
        strangers.append(stranger)
        await loop.sock_connect(stranger, ("127.0.0.1", server.port))
        if number % 50 == 0:
            calls = DirectCalls(await port_of(server))
            assert await deliver(calls, number)
            await calls.close()
    async with asyncio.timeout(20):
        while len(server._strangers) < direct_calls._MAX_STRANGERS:
            await asyncio.sleep(0.01)
    assert len(server._strangers) == direct_calls._MAX_STRANGERS
    for stranger in strangers:
        stranger.close()


async def test_idle_connections_are_bounded(server: DirectCallServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_calls, "_MAX_IDLE", 3)
    senders = [DirectCalls(await port_of(server)) for _ in range(6)]
    for round_number in range(2):  # those whose connection was closed open another one
        for number, sender in enumerate(senders):
            assert await deliver(sender, 10 * round_number + number)
        assert len(server._idle) == 3
    for sender in senders:
        await sender.close()


@contextlib.asynccontextmanager
async def connect(server: DirectCallServer) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    async with asyncio.timeout(20):
        yield reader, writer
    writer.close()


@contextlib.asynccontextmanager
async def announce_values(server: DirectCallServer) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A call whose values are to follow."""
    async with connect(server) as (reader, writer):
        writer.write(frame(METADATA) + frame(header_message(HEADER)))
        assert "tcp" in (await answer(reader))["offers"]
        writer.write(frame(placed_message("tcp", HEADER.length)))
        yield reader, writer


async def answer(reader: asyncio.StreamReader) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(await reader.readexactly(int.from_bytes(await reader.readexactly(4), "little")))
    return parsed


async def expect_nothing(tmp_path: Path) -> None:
    async with asyncio.timeout(20):
        while any((tmp_path / "store/.incoming").iterdir()):
            await asyncio.sleep(0.01)
    assert stored(tmp_path) == []


async def test_a_connection_that_ends_midway_completes_nothing(server: DirectCallServer, tmp_path: Path) -> None:
    async with announce_values(server) as (reader, writer):
        writer.write(values_of(HEADER)[:-1])
        writer.write_eof()
        assert (await answer(reader))["error"] == "invalid_request"
        assert await reader.read() == b"", "what is left on the connection is unknown"
    await expect_nothing(tmp_path)


async def test_a_sender_that_stalls_midway_gives_back_budget_and_key(
    server: DirectCallServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server._sink, "_stall_seconds", 0.5)
    async with announce_values(server) as (reader, writer):
        writer.write(values_of(HEADER)[:-1])
        assert (await answer(reader))["error"] == "deadline_exceeded"
        assert await reader.read() == b""
    await expect_nothing(tmp_path)
    monkeypatch.undo()
    calls = DirectCalls(await port_of(server))
    assert await deliver(calls)
    await calls.close()


async def test_after_a_value_that_is_not_finite_the_rest_is_received_and_the_reason_answered(
    server: DirectCallServer, tmp_path: Path
) -> None:
    values = bytearray(values_of(HEADER))
    values[100:104] = b"\xff\xff\xff\xff"
    async with announce_values(server) as (reader, writer):
        for start in range(0, len(values), 1001):
            writer.write(values[start : start + 1001])
            await writer.drain()
        assert (await answer(reader))["error"] == "invalid_request"
    await expect_nothing(tmp_path)


def eager_call(header: Header, values: memoryview | bytes | bytearray, length: int | None = None) -> bytes:
    """The messages of a call whose values come without an offer."""
    metadata = json.dumps([*json.loads(METADATA), [EAGER_KEY, ""]]).encode()
    placed = placed_message("tcp", len(values) if length is None else length)
    return frame(metadata) + frame(header_message(header)) + frame(placed) + bytes(values)


async def test_a_sender_waits_for_no_offer_once_it_knows_the_sink(
    server: DirectCallServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_calls, "_EAGER_BYTES", values_of(header_of(0, 1000)).nbytes)
    answers, send = list[list[str]](), direct_calls._send

    async def record(connection: Any, answer: Any) -> None:
        answers.append(sorted(answer))
        await send(connection, answer)

    monkeypatch.setattr(direct_calls, "_send", record)
    calls = DirectCalls(await port_of(server))
    for number, rows in enumerate((1000, 1000, 1001, 1)):
        assert await deliver(calls, number, rows)
        header = header_of(number, rows)
        assert (tmp_path / "store" / header.key).read_bytes() == header.pack() + values_of(header)
    offer, end = ["offers", "progress"], ["already_here", "eager"]
    assert answers == [offer, end, end, offer, end, end]
    await calls.close()


@pytest.mark.parametrize(("at_once", "turn_seconds", "most"), [(1, 60, 1), (2, 60, 2), (1, 0.001, 5)])
async def test_large_embeddings_are_sent_a_few_at_a_time_unless_they_have_waited(
    server: DirectCallServer, monkeypatch: pytest.MonkeyPatch, at_once: int, turn_seconds: float, most: int
) -> None:
    sending, counts = [0], list[int]()
    send_values = Connection.send_values

    async def count(*arguments: Any) -> None:
        sending[0] += 1
        counts.append(sending[0])
        await asyncio.sleep(0.05)
        await send_values(*arguments)
        sending[0] -= 1

    monkeypatch.setattr(Connection, "send_values", count)
    monkeypatch.setattr(direct_call, "_LARGE_BYTES", 1000)
    monkeypatch.setattr(direct_call, "_LARGE_AT_ONCE", at_once)
    monkeypatch.setattr(direct_call, "_TURN_SECONDS", turn_seconds)
    calls = DirectCalls(await port_of(server))
    assert all(await asyncio.gather(*(deliver(calls, number, 100) for number in range(5))))
    assert max(counts) == most
    await calls.close()


async def test_a_sink_that_offers_what_came_unasked_is_not_understood() -> None:
    offer = frame(json.dumps({"offers": {"tcp": ""}}).encode())
    async with serve_one(offer, then_close=False) as port:
        connection = await port.connect()
        assert connection is not None
        calls = DirectCalls(port)
        calls._idle.append((time.monotonic(), Connection(connection)))
        calls._idle[0][1].eager_bytes = 1 << 20
        assert not await deliver(calls)
        assert not calls._idle


async def test_values_that_are_not_needed_are_read_and_the_connection_goes_on(server: DirectCallServer, tmp_path: Path) -> None:
    larger = header_of(4, 9 * 2048)  # than the sink's budget
    async with connect(server) as (reader, writer):
        writer.write(eager_call(HEADER, values_of(HEADER)) * 2)
        writer.write(eager_call(FOREIGN, bytes(FOREIGN.length)) + eager_call(larger, bytes(4)))
        writer.write(eager_call(header_of(5, 7), values_of(header_of(5, 7))))
        answers = [await answer(reader) for _ in range(5)]
    assert [reply.get("error", reply.get("already_here")) for reply in answers] == [
        False, True, "checkpoint_mismatch", answers[3]["error"], False,
    ]  # fmt: skip
    assert answers[3]["error"] in ("sink_full", "context_length_exceeded")
    assert stored(tmp_path) == sorted([HEADER.key, "n-5-7"])


async def test_an_eager_value_that_is_not_finite_costs_only_its_own_call(server: DirectCallServer, tmp_path: Path) -> None:
    values = bytearray(values_of(HEADER))
    values[100:104] = b"\xff\xff\xff\xff"
    async with connect(server) as (reader, writer):
        writer.write(eager_call(HEADER, values) + eager_call(HEADER, values_of(HEADER)))
        assert (await answer(reader))["error"] == "invalid_request"
        assert (await answer(reader))["already_here"] is False
    assert (tmp_path / "store" / HEADER.key).read_bytes() == HEADER.pack() + values_of(HEADER)


@pytest.mark.parametrize("length", [0, HEADER.length - 4, HEADER.length + 4])
async def test_eager_values_of_another_length_end_the_connection(server: DirectCallServer, tmp_path: Path, length: int) -> None:
    async with connect(server) as (reader, writer):
        writer.write(eager_call(HEADER, b"", length))
        assert (await answer(reader))["error"] == "invalid_request"
        assert await reader.read() == b""
    await expect_nothing(tmp_path)


@pytest.mark.parametrize(
    "rest", [placed_message("tcp", 0), placed_message("tcp", direct_calls._EAGER_BYTES + 1), header_message(HEADER), b"\x12\1x"]
)
async def test_values_that_are_not_needed_are_bounded(server: DirectCallServer, rest: bytes) -> None:
    begin = eager_call(FOREIGN, b"").removesuffix(frame(placed_message("tcp", 0)))
    async with connect(server) as (reader, writer):
        writer.write(begin + frame(rest))
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""


async def test_values_that_are_not_needed_and_do_not_come_end_the_connection(
    server: DirectCallServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_calls, "_DISCARD_SECONDS", 0.2)
    async with connect(server) as (reader, writer):
        writer.write(eager_call(FOREIGN, b"", FOREIGN.length))
        assert await reader.read() == b""


async def test_an_eager_sender_that_stalls_gives_back_budget_and_key(
    server: DirectCallServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server._sink, "_stall_seconds", 0.5)
    async with connect(server) as (reader, writer):
        writer.write(eager_call(HEADER, values_of(HEADER)[:-1], HEADER.length))
        assert (await answer(reader))["error"] == "deadline_exceeded"
        assert await reader.read() == b""
    await expect_nothing(tmp_path)


@pytest.mark.parametrize("length", [0, HEADER.length - 4, HEADER.length + 4])
async def test_values_of_another_length_are_not_received(server: DirectCallServer, tmp_path: Path, length: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(frame(METADATA) + frame(header_message(HEADER)))
    assert "tcp" in (await answer(reader))["offers"]
    writer.write(frame(placed_message("tcp", length)))
    assert (await answer(reader))["error"] == "invalid_request"
    writer.close()
    await expect_nothing(tmp_path)


@pytest.mark.parametrize("offer", ["", "x", "0 1", "70000 1", "80", "80 ", "80:" + "0" * 64, "-1", "٣٣", "9" * 5000])
async def test_what_is_no_port_is_not_used(offer: str) -> None:
    port = TcpPort("127.0.0.1:1")
    assert not await port.place(offer, HEADER, memoryview(b""))
    assert await port.connect() is None


async def test_a_port_that_refuses_is_learned_anew(server: DirectCallServer) -> None:
    port = TcpPort("127.0.0.1:1")
    await port.place(f"{free_port()} {server.sink_id}", HEADER, memoryview(b""))
    calls = DirectCalls(port)
    assert not await deliver(calls)
    await port.place(offer_of(server), HEADER, memoryview(b""))
    assert await deliver(calls)
    await calls.close()


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        frame(b"{"),
        frame(b"[]"),
        frame(b'{"offers": [1]}'),
        frame(b'"text"'),
        b"",
        frame(b'{"already_here": false, "eager": "all"}'),
    ],
)
async def test_another_server_at_the_port_gets_no_embedding_and_is_no_error(reply: bytes) -> None:
    async with serve_one(reply, then_close=True) as port:
        calls = DirectCalls(port)
        assert not await deliver(calls)
        assert not calls._idle


async def test_a_port_that_cannot_be_reached_is_not_tried_again_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = list[float]()

    async def hang(*_: object) -> socket.socket:
        attempts.append(time.monotonic())
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(direct_call, "_connect", hang)
    monkeypatch.setattr(direct_call, "_CONNECT_SECONDS", 0.05)
    port = TcpPort("127.0.0.1:1")
    await port.place("80 1", HEADER, memoryview(b""))
    assert [await port.connect(), await port.connect()] == [None, None]
    assert len(attempts) == 1
    monkeypatch.setattr(direct_call, "_UNREACHABLE_SECONDS", 0.0)
    port._unreachable_until = time.monotonic()
    assert await port.connect() is None
    assert len(attempts) == 2


@contextlib.asynccontextmanager
async def hanging_sink() -> AsyncIterator[TcpPort]:
    """A sink that offers its connection, and takes no more than the socket's buffers do."""
    async with serve_one(frame(json.dumps({"offers": {"tcp": ""}}).encode()), then_close=False) as port:
        yield port


@contextlib.asynccontextmanager
async def serve_one(reply: bytes, then_close: bool) -> AsyncIterator[TcpPort]:
    """A server that answers the first bytes of one connection with a reply."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)

        async def serve() -> None:
            accepted, _ = await loop.sock_accept(listener)
            with accepted:
                await loop.sock_recv(accepted, 1)
                await loop.sock_sendall(accepted, reply)
                if not then_close:
                    await asyncio.Event().wait()

        serving, port = asyncio.create_task(serve()), TcpPort("127.0.0.1:1")
        await port.place(f"{listener.getsockname()[1]} 1", HEADER, memoryview(b""))
        yield port
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


async def test_a_sink_that_takes_no_values_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_call, "_ANSWER_SECONDS", 0.2)
    async with hanging_sink() as port:
        calls, header = DirectCalls(port), header_of(1, 1 << 16)
        with pytest.raises(errors.SinkUnavailable, match="has not answered for"):
            await calls.deliver(header, values_of(header), 600, (), b"", [])
        assert not calls._idle


async def test_a_cancelled_sender_closes_its_connection() -> None:
    async with hanging_sink() as port:
        calls, header = DirectCalls(port), header_of(1, 1 << 16)
        task = asyncio.create_task(calls.deliver(header, values_of(header), 600, (), b"", []))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not calls._idle


def ports_of(options: SinkOptions, credentials: Credentials) -> Sequence[int]:
    if (listener := _listen_for_direct_calls(options, credentials)) is None:
        return ()
    with listener:
        return (listener.getsockname()[1],)


def test_a_sink_has_no_such_port_with_tls_or_if_it_shall_not(tmp_path: Path) -> None:
    tls = Credentials(tls=Authority(tmp_path).issue("sink"))
    assert not ports_of(options(tmp_path, "127.0.0.1:0"), tls)
    assert not ports_of(options(tmp_path, "127.0.0.1:0", -1), OPEN)
    assert ports_of(options(tmp_path, "127.0.0.1:0"), OPEN)


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}: .* choose another --delivery-port"):
            ports_of(options(tmp_path, "127.0.0.1:0", port), OPEN)
