"""Errors over a real socket, socket files that a killed process left, and strangers at a port."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from common import errors, rpc
from common.security import OPEN, Credentials
from protos import embeddings_pb2 as pb
from protos import embeddings_pb2_grpc
from tests.ports import free_port
from tests.server.fakes.waiting import wait_until


class Failing(embeddings_pb2_grpc.EmbeddingSinkServicer):
    error: Exception

    async def Has(self, request: pb.HasRequest, context: Any) -> pb.HasReply:  # noqa: N802
        raise self.error

    async def Deliver(self, request: AsyncIterator[pb.DeliverChunk], context: Any) -> pb.DeliverReply:  # noqa: N802
        raise self.error


@pytest.fixture
async def failing(tmp_path: Path) -> AsyncIterator[tuple[Failing, embeddings_pb2_grpc.EmbeddingSinkStub]]:
    service, server = Failing(), rpc.create_server(f"unix:{tmp_path}/s")
    embeddings_pb2_grpc.add_EmbeddingSinkServicer_to_server(service, server)
    await server.start()
    channel = rpc.open_channel(f"unix:{tmp_path}/s")
    yield service, embeddings_pb2_grpc.EmbeddingSinkStub(channel)
    await channel.close()
    await server.stop(0)


Pair = tuple[Failing, embeddings_pb2_grpc.EmbeddingSinkStub]


@pytest.mark.parametrize("error", errors.all_errors(), ids=lambda e: e.__name__)
async def test_an_error_keeps_its_class_and_message(failing: Pair, error: type[errors.DvdError]) -> None:
    service, stub = failing
    service.error = error("image 3 is 5 bytes: too few")
    calls: tuple[Callable[[], Any], ...] = (lambda: stub.Has(pb.HasRequest()), lambda: stub.Deliver(iter([])))
    for call in calls:
        with pytest.raises(errors.DvdError) as caught, rpc.translate_errors("sink"):
            await call()
        assert caught.type.code == error.code
        assert caught.type.status == error.status
        assert str(caught.value) == "image 3 is 5 bytes: too few"


async def test_an_error_keeps_its_param(failing: Pair) -> None:
    service, stub = failing
    for param in ("images[3]", None):
        service.error = errors.InvalidImage("it is damaged", param=param)
        with pytest.raises(errors.InvalidImage) as caught, rpc.translate_errors("sink"):
            await stub.Has(pb.HasRequest())
        assert caught.value.param == param


async def test_an_unexpected_error_reveals_nothing(failing: Pair) -> None:
    service, stub = failing
    service.error = KeyError("/secret/path")
    with pytest.raises(errors.InternalError) as caught, rpc.translate_errors("sink"):
        await stub.Has(pb.HasRequest())
    assert "secret" not in str(caught.value)


async def test_an_absent_peer_is_unavailable(tmp_path: Path) -> None:
    channel = rpc.open_channel(f"unix:{tmp_path}/absent")
    with pytest.raises(errors.Unavailable) as caught, rpc.translate_errors("vision worker"):
        await embeddings_pb2_grpc.EmbeddingSinkStub(channel).Has(pb.HasRequest(), timeout=5)
    assert "vision worker" in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
    await channel.close()


def test_an_abandoned_socket_is_removed_and_one_in_use_is_not(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        with pytest.raises(OSError, match="another process"):
            rpc.ensure_free(f"unix:{path}")
    rpc.ensure_free(f"unix:{path}")
    assert not path.exists()
    rpc.ensure_free("127.0.0.1:0")


async def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(OSError, match=address):
            rpc.create_server(address)


class Serving(embeddings_pb2_grpc.EmbeddingSinkServicer):
    async def Has(self, request: pb.HasRequest, context: Any) -> pb.HasReply:  # noqa: N802
        return pb.HasReply()

    async def Deliver(self, request: AsyncIterator[pb.DeliverChunk], context: Any) -> pb.DeliverReply:  # noqa: N802
        return pb.DeliverReply()


@contextlib.asynccontextmanager
async def serving(credentials: Credentials = OPEN) -> AsyncIterator[str]:
    """Serve over TCP, and yield the address."""
    address = f"127.0.0.1:{free_port()}"
    server = rpc.create_server(address, credentials=credentials)
    embeddings_pb2_grpc.add_EmbeddingSinkServicer_to_server(Serving(), server)
    await server.start()
    yield address
    await server.stop(0)


async def assert_serves(address: str, credentials: Credentials = OPEN) -> None:
    """Assert that a good call on a new channel is served, once a stranger has given way."""
    async with rpc.open_channel(address, credentials) as channel:
        stub = embeddings_pb2_grpc.EmbeddingSinkStub(channel)
        await stub.Has(pb.HasRequest(), timeout=60, wait_for_ready=True, metadata=credentials.metadata)


async def ended(reader: asyncio.StreamReader) -> None:
    """Wait until the server has closed a connection. What it sends before, such as HTTP/2's settings, is ignored."""
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(60):
            await reader.read()


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


@pytest.mark.parametrize(
    ("option", "data"),
    [
        ("grpc.server_handshake_timeout_ms", b""),
        ("grpc.server_handshake_timeout_ms", PREFACE[:9]),
        ("grpc.server_handshake_timeout_ms", PREFACE),
        ("grpc.max_connection_idle_ms", PREFACE + SETTINGS),
    ],
    ids=["nothing", "half a preface", "no settings", "no call"],
)
async def test_a_connection_that_does_nothing_is_closed(monkeypatch: pytest.MonkeyPatch, option: str, data: bytes) -> None:
    monkeypatch.setitem(rpc._SERVER_OPTIONS, option, 1000)
    async with serving() as address:
        await assert_serves(address)
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(data)
        await assert_serves(address)
        await ended(reader)
        writer.close()
        await assert_serves(address)


async def test_the_number_of_connections_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rpc._SERVER_OPTIONS, "grpc.server_handshake_timeout_ms", 2000)
    monkeypatch.setitem(rpc._SERVER_OPTIONS, "grpc.max_allowed_incoming_connections", 10)
    async with serving() as address:
        await assert_serves(address)
        host, _, port = address.rpartition(":")
        descriptors = len(os.listdir("/proc/self/fd"))
        strangers = [await asyncio.open_connection(host, int(port)) for _ in range(50)]
        refused = [asyncio.create_task(ended(reader)) for reader, _ in strangers]
        await assert_serves(address)
        await asyncio.gather(*refused)
        for _, writer in strangers:
            writer.close()
        await wait_until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors + 3, "no descriptor is left behind")


@pytest.mark.parametrize("method", ["Has", "Deliver"])
@pytest.mark.parametrize("token", [(), (("authorization", "Bearer wrong-token-0123456789"),)])
async def test_a_stranger_is_refused_before_a_message_is_received(method: str, token: Any) -> None:
    """Else messages of 256 MiB would be, of any number of strangers."""
    credentials = Credentials("right-token-0123456789")
    async with serving(credentials) as address, rpc.open_channel(address) as channel:

        async def never() -> AsyncIterator[bytes]:
            await asyncio.Event().wait()
            yield b""

        stub: Any = channel.stream_unary(f"/dvd.v1.EmbeddingSink/{method}")
        call = stub(never(), metadata=token, timeout=60)
        assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
        assert "cluster token" in (await call.details() or "")
        await assert_serves(address, credentials)
