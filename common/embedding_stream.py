"""Streams embeddings through gRPC with as few copies as Python allows.

Setting and reading `DeliverChunk.data` through protobuf copies the bytes once more on either side. A message with only that
field is a tag, a length and the bytes: this module encodes and decodes it by hand, in the format of
`protos/embeddings.proto`.
"""

from __future__ import annotations  # grpc.aio is generic for type checkers only

import asyncio
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import grpc

from common import errors, messages, rpc
from common.embedding import Header
from common.transport import base
from protos import embeddings_pb2 as pb
from protos.embeddings_pb2_grpc import EmbeddingSinkServicer

if TYPE_CHECKING:
    import grpc.aio

_SERVICE = "dvd.v1.EmbeddingSink"
_WANTED_KEY = "dvd-wanted"  # of the initial metadata by which a sink requests the values
_DATA_TAG = bytes([pb.DeliverChunk.DATA_FIELD_NUMBER << 3 | 2])  # field number and wire type 2: length-delimited


def header_message(header: Header, grant: bytes = b"") -> bytes:
    """Return the first message of a delivery: the header, with the grant that allows it."""
    first = pb.EmbeddingHeader(
        key=header.key, fingerprint=header.fingerprint, dtype=messages.dtype_to_proto(header.dtype),
        rows=header.rows, width=header.width, length=header.length, grant=grant,
    )  # fmt: skip
    return pb.DeliverChunk(header=first).SerializeToString()


def data_messages(data: memoryview) -> Iterator[bytes]:
    """Yield the messages after the first: the values, in chunks."""
    for start in range(0, len(data), rpc.CHUNK_BYTES):
        part = data[start : start + rpc.CHUNK_BYTES]
        yield b"".join((_DATA_TAG, _encode_varint(len(part)), part))


def placed_message(transport: str, length: int, partial: bool = False) -> bytes:
    """Return the message instead of values, after so many bytes of them, or of a part of them, were written by a transport."""
    return pb.DeliverChunk(placed=pb.Placed(transport=transport, length=length, partial=partial)).SerializeToString()


def parse_message(message: bytes) -> pb.DeliverChunk | memoryview:
    """Return a message's data without a copy if it has nothing else, or the parsed message. Raises: `InvalidRequest`."""
    if message[:1] == _DATA_TAG:
        length, start = _decode_length(message)
        if start + length == len(message):
            return memoryview(message)[start:]
    try:
        return pb.DeliverChunk.FromString(message)
    except Exception:
        raise errors.InvalidRequest("invalid message in a delivery: expected a DeliverChunk") from None


async def deliver(
    channel: grpc.aio.Channel,
    header: Header,
    data: memoryview,
    timeout: float | None = None,
    metadata: Any = None,
    grant: bytes = b"",
    transports: Sequence[base.Transport] = (),
) -> pb.DeliverReply:
    """Call `EmbeddingSink.Deliver`: send the header and, once the sink requests them (`request_values`), the values.

    A sink that has the embedding already, or no room for it, replies instead of requesting the values: no values
    are sent needlessly, and none to a call that has ended, which grpc.aio reports as a bare "Internal error".

    Args:
        channel: channel to the sink.
        header: header of the embedding.
        data: its values, `header.length` bytes.
        timeout: deadline of the call in seconds.
        metadata: gRPC metadata of the call.
        grant: allows the delivery; empty in a cluster without a token.
        transports: those to use if the sink offers them, the best first. Without, the values are sent through gRPC.

    Raises:
        grpc.aio.AioRpcError: the call failed.
    """
    method: Any = channel.stream_unary(
        f"/{_SERVICE}/Deliver", request_serializer=None, response_deserializer=pb.DeliverReply.FromString
    )
    call = method(
        timeout=timeout, metadata=(*(metadata or ()), *base.supported_metadata(transport.name for transport in transports))
    )
    try:
        await call.write(header_message(header, grant))
        answer = tuple(await call.initial_metadata())
        if _WANTED_KEY in dict(answer):
            offers = base.parse_offers(answer)
            if name := await _until_call_ends(call, base.place(transports, offers, header, data)):
                await call.write(placed_message(name, len(data)))
            else:
                for message in data_messages(data):
                    await call.write(message)
                await call.done_writing()
    except asyncio.InvalidStateError:  # the sink has replied meanwhile
        pass
    except asyncio.CancelledError:
        call.cancel()
        raise
    reply: pb.DeliverReply = await call
    return reply


async def _until_call_ends(call: Any, placing: Coroutine[Any, Any, str | None]) -> str | None:
    """Return the result of `placing`, which is cancelled once the call has ended: nobody receives the values then."""
    place, ended = asyncio.ensure_future(placing), asyncio.ensure_future(call.code())
    try:
        await asyncio.wait([place, ended], return_when=asyncio.FIRST_COMPLETED)
        if not place.done():
            raise asyncio.InvalidStateError  # as a write raises after the end
        return place.result()
    finally:
        place.cancel()
        ended.cancel()
        await asyncio.gather(place, ended, return_exceptions=True)


async def request_values(context: Any, offers: Mapping[str, str]) -> None:
    """Request, as a sink, the values of the embedding whose header arrived.

    Args:
        context: context of the `Deliver` call.
        offers: by name, the transports of the sender by which it may write them instead of sending them.
    """
    # its value is empty: senders that know no transports expect the path of a file there
    await context.send_initial_metadata(((_WANTED_KEY, ""), *base.offer_metadata(offers)))


def add_sink_to_server(sink: EmbeddingSinkServicer, server: grpc.aio.Server) -> None:
    """Add a sink to a server. Its `Deliver` receives serialized messages, for `parse_message`."""
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Describe": grpc.unary_unary_rpc_method_handler(
            sink.Describe, pb.DescribeRequest.FromString, pb.LanguageDescription.SerializeToString
        ),
        "Has": grpc.unary_unary_rpc_method_handler(sink.Has, pb.HasRequest.FromString, pb.HasReply.SerializeToString),
        "Deliver": grpc.stream_unary_rpc_method_handler(sink.Deliver, None, pb.DeliverReply.SerializeToString),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))


def _encode_varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _decode_length(message: bytes) -> tuple[int, int]:
    """Return the varint after the tag and the index of the byte after it; (-1, 0) if there is none."""
    number = 0
    for i in range(1, min(len(message), 6)):
        number |= (message[i] & 0x7F) << 7 * (i - 1)
        if message[i] < 0x80:
            return number, i + 1
    return -1, 0
