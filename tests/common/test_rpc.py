"""Errors over a real socket, and socket files that a killed process left."""

import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from common import errors, rpc
from protos import embeddings_pb2 as pb
from protos import embeddings_pb2_grpc


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
