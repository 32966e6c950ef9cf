"""The bytes of an embedding on their way through gRPC, copied as seldom as Python allows.

`DeliverChunk.data` could be set and read like any field, but protobuf copies it once more on either side. A message with
that one field is a tag, a length and the bytes: it is written and read here, and stays what `protos/embeddings.proto` says.
"""

from __future__ import annotations  # grpc.aio is generic for type checkers only

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from common import errors, messages, rpc
from common.embedding import HEADER_SIZE, Header, write_all
from protos import embeddings_pb2 as pb
from protos.embeddings_pb2_grpc import EmbeddingSinkServicer

if TYPE_CHECKING:
    import grpc.aio

_SERVICE = "dvd.v1.EmbeddingSink"
_WANTED = "dvd-wanted"
_DATA = pb.DeliverChunk.DATA_FIELD_NUMBER << 3 | 2  # the tag: a field of that number, with a length


def header_message(header: Header) -> bytes:
    """The first message of a delivery."""
    first = pb.EmbeddingHeader(
        key=header.key, fingerprint=header.fingerprint, dtype=messages.dtype_to_proto(header.dtype),
        rows=header.rows, width=header.width, length=header.length,
    )  # fmt: skip
    return pb.DeliverChunk(header=first).SerializeToString()


def data_messages(data: memoryview) -> Iterator[bytes]:
    """All others."""
    for start in range(0, len(data), rpc.CHUNK):
        part = data[start : start + rpc.CHUNK]
        yield b"".join((bytes([_DATA]), _varint(len(part)), part))


def parse_message(message: bytes) -> pb.DeliverChunk | memoryview:
    """A message: its data where it has nothing else, without a copy. Raises `InvalidRequest`."""
    if message[:1] == bytes([_DATA]):
        length, at = _length(message)
        if at + length == len(message):
            return memoryview(message)[at:]
    try:
        return pb.DeliverChunk.FromString(message)
    except Exception:
        raise errors.InvalidRequest("a part of a delivery is no DeliverChunk") from None


async def deliver(
    channel: grpc.aio.Channel, header: Header, data: memoryview, seconds: float | None = None, metadata: Any = None
) -> pb.DeliverReply:
    """`EmbeddingSink.Deliver`: the header, and, once the sink has said that it wants them (`accept`), the values.

    A sink that has them already, or no room, answers instead: nothing is shipped in vain, and nothing is written to a call
    that has just ended, of which grpc.aio would say "internal error" and no more. A sink on this machine names the file
    that they are to be in, and they are written there. Raises `grpc.aio.AioRpcError`.
    """
    start: Any = channel.stream_unary(
        f"/{_SERVICE}/Deliver", request_serializer=None, response_deserializer=pb.DeliverReply.FromString
    )
    call = start(timeout=seconds, metadata=metadata)
    try:
        await call.write(header_message(header))
        wanted = dict(await call.initial_metadata()).get(_WANTED)
        if wanted is not None:
            if not (wanted and await asyncio.to_thread(_written, wanted, header, data)):
                for part in data_messages(data):
                    await call.write(part)
            await call.done_writing()
    except asyncio.InvalidStateError:  # ended meanwhile
        pass
    except asyncio.CancelledError:
        call.cancel()
        raise
    reply: pb.DeliverReply = await call
    return reply


def _written(file: str, header: Header, data: memoryview) -> bool:
    """Whether the values are now in the sink's file. It is known by the header in it, wherever the name came from."""
    try:
        with open(os.open(file, os.O_RDWR | os.O_NOFOLLOW), "r+b", buffering=0) as opened:
            if opened.read(HEADER_SIZE) != header.pack():
                return False
            write_all(opened, data)
    except OSError:  # the sink sees no such file, or this process may not write it, or there is no room: it says which
        return False
    return True


async def request_values(context: Any, file: Path | None) -> None:
    """Of a sink: the values that belong to the header are wanted; in `file`, after its header, of a sender that can."""
    said = str(file) if file is not None and str(file).isascii() else ""
    await context.send_initial_metadata(((_WANTED, said),))


def add_sink_to_server(sink: EmbeddingSinkServicer, server: grpc.aio.Server) -> None:
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
