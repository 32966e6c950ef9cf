"""The bytes of an embedding on their way through gRPC, copied as seldom as Python allows.

`DeliverChunk.data` could be set and read like any field, but protobuf copies it once more on either side. A message with
that one field is a tag, a length and the bytes: it is written and read here, and stays what `protos/embeddings.proto` says.
"""

from __future__ import annotations  # grpc.aio is generic for type checkers only

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc

from protos import embeddings_pb2 as pb
from protos.embeddings_pb2_grpc import EmbeddingSinkServicer
from wire import errors, messages, rpc
from wire.tensors import Header

if TYPE_CHECKING:
    import grpc.aio

_SERVICE = "dvd.v1.EmbeddingSink"
_DATA = pb.DeliverChunk.DATA_FIELD_NUMBER << 3 | 2  # the tag: a field of that number, with a length


async def chunks(header: Header, data: memoryview) -> AsyncIterator[bytes]:
    """The messages of one delivery, as they go over the wire."""
    first = pb.EmbeddingHeader(
        key=header.key, fingerprint=header.fingerprint, dtype=messages.to_dtype(header.dtype),
        rows=header.rows, width=header.width, length=header.length,
    )  # fmt: skip
    yield pb.DeliverChunk(header=first).SerializeToString()
    for start in range(0, len(data), rpc.CHUNK):
        part = data[start : start + rpc.CHUNK]
        yield b"".join((bytes([_DATA]), _varint(len(part)), part))


def read(message: bytes) -> pb.DeliverChunk | memoryview:
    """A message: its data where it has nothing else, without a copy. Raises `InvalidRequest`."""
    if message[:1] == bytes([_DATA]):
        length, at = _length(message)
        if at + length == len(message):
            return memoryview(message)[at:]
    try:
        return pb.DeliverChunk.FromString(message)
    except Exception:
        raise errors.InvalidRequest("a part of a delivery is no DeliverChunk") from None


def deliver(channel: grpc.aio.Channel) -> Any:
    """`EmbeddingSink.Deliver` for a stream of `chunks`."""
    return channel.stream_unary(
        f"/{_SERVICE}/Deliver", request_serializer=None, response_deserializer=pb.DeliverReply.FromString
    )


def add_sink(sink: EmbeddingSinkServicer, server: grpc.aio.Server) -> None:
    """Serve a sink whose `Deliver` gets what `read` gives."""
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Describe": grpc.unary_unary_rpc_method_handler(
            sink.Describe, pb.DescribeRequest.FromString, pb.LanguageDescription.SerializeToString
        ),
        "Has": grpc.unary_unary_rpc_method_handler(sink.Has, pb.HasRequest.FromString, pb.HasReply.SerializeToString),
        "Deliver": grpc.stream_unary_rpc_method_handler(sink.Deliver, None, pb.DeliverReply.SerializeToString),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _length(message: bytes) -> tuple[int, int]:
    """The number after the tag, and where it ends."""
    number = 0
    for i in range(1, min(len(message), 6)):
        number |= (message[i] & 0x7F) << 7 * (i - 1)
        if message[i] < 0x80:
            return number, i + 1
    return -1, 0
