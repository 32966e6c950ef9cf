"""Connections over TCP: what a stranger on the sink's port can do, and what happens to a sender without a usable port."""

import asyncio
import contextlib
import mmap
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from common import errors
from common.embedding import HEADER_SIZE, Header
from common.security import OPEN, Credentials
from common.transport import tcp, tcp_receiver
from common.transport.tcp import TcpTransport
from common.transport.tcp_receiver import TcpReceiver
from lm_worker.sink import SinkOptions, _listen_for_values
from tests.certificates import Authority
from tests.common.transport.sinks import CHECKPOINT, header_of, values_of

HEADER = header_of(3, 1000)
VALUES = values_of(HEADER)


@dataclass
class FileSlot:
    """A slot as the sink prepares it."""

    header: Header
    path: Path

    def __post_init__(self) -> None:
        self.path.write_bytes(self.header.pack() + bytes(self.header.length))

    def map(self) -> mmap.mmap:
        with self.path.open("r+b") as file:
            return mmap.mmap(file.fileno(), 0)

    def values(self) -> bytes:
        return self.path.read_bytes()[HEADER_SIZE:]


@pytest.fixture
async def receiver() -> AsyncIterator[TcpReceiver]:
    receiver = TcpReceiver("127.0.0.1")
    await receiver.start()
    yield receiver
    await receiver.close()


@pytest.fixture
async def sender(receiver: TcpReceiver) -> AsyncIterator[TcpTransport]:
    sender = TcpTransport("127.0.0.1:1")
    yield sender
    await sender.close()


def slot(tmp_path: Path, name: str = "slot") -> FileSlot:
    return FileSlot(HEADER, tmp_path / name)


def nothing() -> None:
    """Progress that nobody follows."""


async def test_values_come_into_the_slot(receiver: TcpReceiver, sender: TcpTransport, tmp_path: Path) -> None:
    progress = list[int]()
    for name in "abc":
        with receiver.offer(slot(tmp_path, name), lambda: progress.append(1)) as offer:
            assert await sender.place(offer.text, HEADER, VALUES)
            await offer.received()
        assert (tmp_path / name).read_bytes()[HEADER_SIZE:] == VALUES
    assert len(progress) >= 3
    assert len(sender._idle) == 1, "one connection after another"


async def test_offers_at_the_same_time_get_their_own_values(
    receiver: TcpReceiver, sender: TcpTransport, tmp_path: Path
) -> None:
    with contextlib.ExitStack() as stack:
        slots = [slot(tmp_path, str(i)) for i in range(5)]
        offers = [stack.enter_context(receiver.offer(each, nothing)) for each in slots]
        data = [memoryview(bytes([i]) * HEADER.length) for i in range(5)]
        placed = await asyncio.gather(
            *(sender.place(offer.text, HEADER, each) for offer, each in zip(offers, data, strict=True))
        )
        assert all(placed)
    assert [each.values() for each in slots] == data


@pytest.mark.parametrize("offer", ["", "1", "x:y", "0:" + "0" * 64, "70000:" + "0" * 64, "80:" + "0" * 62, "-1:" + "0" * 64])
async def test_what_is_no_offer_is_not_used(sender: TcpTransport, offer: str) -> None:
    assert not await sender.place(offer, HEADER, VALUES)


async def test_a_token_is_good_for_one_use_and_while_it_is_offered(
    receiver: TcpReceiver, sender: TcpTransport, tmp_path: Path
) -> None:
    with receiver.offer(first := slot(tmp_path, "a"), nothing) as offer:
        assert await sender.place(offer.text, HEADER, VALUES)
        assert not await sender.place(offer.text, HEADER, memoryview(bytes(HEADER.length)))
    with receiver.offer(second := slot(tmp_path, "b"), nothing) as withdrawn:
        pass
    assert not await sender.place(withdrawn.text, HEADER, VALUES)
    assert first.values() == VALUES
    assert second.values() == bytes(HEADER.length)


async def test_nothing_is_written_after_an_offer_ends(receiver: TcpReceiver, tmp_path: Path) -> None:
    target = slot(tmp_path)
    with receiver.offer(target, nothing) as offer:
        port, token = tcp.parse_offer(offer.text) or (0, b"")
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(token + VALUES[:1000])
        async with asyncio.timeout(20):
            while target.values()[:1000] != VALUES[:1000]:
                await asyncio.sleep(0.01)
        with pytest.raises(errors.InvalidRequest, match="not arrived"):
            await offer.received()
    target.path.write_bytes(b"another embedding")
    with contextlib.suppress(ConnectionError):
        for _ in range(20):
            writer.write(VALUES[1000:])
            await writer.drain()
            await asyncio.sleep(0.01)
    assert target.path.read_bytes() == b"another embedding"
    writer.close()


async def test_a_connection_that_ends_midway_completes_nothing(receiver: TcpReceiver, tmp_path: Path) -> None:
    with receiver.offer(slot(tmp_path), nothing) as offer:
        port, token = tcp.parse_offer(offer.text) or (0, b"")
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(token + VALUES[:-1])
        writer.write_eof()
        assert await reader.read() == b"", "it is not confirmed"
        with pytest.raises(errors.InvalidRequest, match="not arrived"):
            await offer.received()
        writer.close()


@pytest.mark.parametrize("first", [b"", b"GET / HTTP/1.1\r\n", bytes(31)], ids=["silent", "HTTP", "torn token"])
async def test_a_stranger_is_disconnected_and_gets_no_byte(
    receiver: TcpReceiver, first: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp_receiver, "_TOKEN_SECONDS", 0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", receiver.port)
    writer.write(first)
    async with asyncio.timeout(20):
        assert await reader.read() == b""
        while receiver._strangers:
            await asyncio.sleep(0.01)
    writer.close()


async def test_a_wrong_token_ends_the_connection_at_once(receiver: TcpReceiver, tmp_path: Path) -> None:
    with receiver.offer(target := slot(tmp_path), nothing):
        reader, writer = await asyncio.open_connection("127.0.0.1", receiver.port)
        writer.write(tcp.create_token() + VALUES)
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
    assert target.values() == bytes(HEADER.length)


async def test_many_silent_strangers_keep_no_sender_out(receiver: TcpReceiver, sender: TcpTransport, tmp_path: Path) -> None:
    strangers = list[socket.socket]()
    for number in range(3 * tcp_receiver._MAX_STRANGERS):
        stranger = socket.socket()
        stranger.setblocking(False)
        strangers.append(stranger)
        await asyncio.get_running_loop().sock_connect(stranger, ("127.0.0.1", receiver.port))
        if number % 50 == 0:
            with receiver.offer(target := slot(tmp_path, str(number)), nothing) as offer:
                assert await sender.place(offer.text, HEADER, VALUES)
            assert target.values() == VALUES
    async with asyncio.timeout(20):
        while len(receiver._strangers) < tcp_receiver._MAX_STRANGERS:
            await asyncio.sleep(0.01)
    assert len(receiver._strangers) == tcp_receiver._MAX_STRANGERS
    for stranger in strangers:
        stranger.close()


async def test_idle_connections_are_bounded(receiver: TcpReceiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_receiver, "_MAX_IDLE", 3)
    senders = [TcpTransport("127.0.0.1:1") for _ in range(6)]
    for round_number in range(2):  # those whose connection was closed open another one
        for number, sender in enumerate(senders):
            with receiver.offer(slot(tmp_path, f"{round_number}-{number}"), nothing) as offer:
                assert await sender.place(offer.text, HEADER, VALUES)
        assert len(receiver._idle) == 3
    for sender in senders:
        await sender.close()


async def test_a_port_that_cannot_be_reached_is_not_tried_again_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    sender, offer = TcpTransport("127.0.0.1:1"), tcp.format_offer(port, tcp.create_token())
    assert not await sender.place(offer, HEADER, VALUES)
    monkeypatch.setattr(tcp, "_connect", lambda *_: pytest.fail("it is tried again"))
    assert not await sender.place(offer, HEADER, VALUES)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + tcp._UNREACHABLE_SECONDS + 1)
    with pytest.raises(pytest.fail.Exception, match="tried again"):
        await sender.place(offer, HEADER, VALUES)


async def test_a_cancelled_sender_closes_its_connection(receiver: TcpReceiver, tmp_path: Path) -> None:
    sender = TcpTransport("127.0.0.1:1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        offer = tcp.format_offer(silent.getsockname()[1], tcp.create_token())
        task = asyncio.create_task(sender.place(offer, HEADER, VALUES))
        connection, _ = await asyncio.to_thread(silent.accept)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        with connection:
            connection.settimeout(20)
            while connection.recv(1 << 16):
                pass
    assert not sender._idle


def options(tmp_path: Path, listen: str, port: int = 0) -> SinkOptions:
    folder = tmp_path / "store"
    return SinkOptions(
        model=str(CHECKPOINT), listen=listen, http="unix:/nowhere", dtype="float32", folder=str(folder), budget=1 << 20,
        lease=0.0, delivery_port=port,
    )  # fmt: skip


def test_a_sink_has_no_such_port_with_tls_on_unix_sockets_or_if_it_shall_not(tmp_path: Path) -> None:
    tls = Credentials(tls=Authority(tmp_path).issue("sink"))
    assert _listen_for_values(options(tmp_path, "127.0.0.1:0"), tls) is None
    assert _listen_for_values(options(tmp_path, f"unix:{tmp_path}/sink"), OPEN) is None
    assert _listen_for_values(options(tmp_path, "127.0.0.1:0", -1), OPEN) is None


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}: .* choose another --delivery-port"):
            TcpReceiver("127.0.0.1", port)
