"""Messages encoded by hand are those of protobuf, in both directions."""

import pytest

from common import errors, rpc
from common.embedding import Header
from common.embedding_stream import data_messages, header_message, parse_message, placed_message
from protos import embeddings_pb2 as pb

HEADER = Header("key", "f" * 64, "bfloat16", 3, 4)


@pytest.mark.parametrize(
    "size", [1, 127, 128, 16_383, 16_384, rpc.CHUNK_BYTES - 1, rpc.CHUNK_BYTES, rpc.CHUNK_BYTES + 1, 3 * rpc.CHUNK_BYTES]
)
def test_messages_are_those_that_protobuf_writes(size: int) -> None:
    data = bytes(i % 251 for i in range(1000)) * (size // 1000 + 1)
    data = data[:size]
    header = pb.DeliverChunk.FromString(header_message(HEADER)).header
    chunks = list(data_messages(memoryview(data)))
    assert (header.key, header.fingerprint, header.rows, header.width, header.length) == ("key", "f" * 64, 3, 4, 24)
    assert header.dtype == pb.BFLOAT16
    pieces = [data[at : at + rpc.CHUNK_BYTES] for at in range(0, size, rpc.CHUNK_BYTES)]
    assert chunks == [pb.DeliverChunk(data=piece).SerializeToString() for piece in pieces]
    parsed = [parse_message(message) for message in chunks]
    assert all(isinstance(part, memoryview) for part in parsed)
    assert b"".join(part for part in parsed if isinstance(part, memoryview)) == data


def test_a_header_message_is_parsed() -> None:
    message = pb.DeliverChunk(header=pb.EmbeddingHeader(key="k", rows=2))
    assert parse_message(message.SerializeToString()) == message


def test_a_placed_message_is_parsed() -> None:
    message = pb.DeliverChunk(placed=pb.Placed(transport="shm", length=24))
    assert parse_message(placed_message("shm", 24)) == message


def test_data_is_not_copied() -> None:
    message = pb.DeliverChunk(data=b"x" * 1000).SerializeToString()
    part = parse_message(message)
    assert isinstance(part, memoryview)
    assert part.obj is message


TAG = pb.DeliverChunk(data=b"x").SerializeToString()[:1]

UNUSUAL = {
    "empty": (b"", b""),
    "length with more bytes than needed": (TAG + b"\x83\x00abc", b"abc"),
    "the field twice: the last counts": (TAG + b"\x01a" + TAG + b"\x02bc", b"bc"),
    "data and an unknown field": (TAG + b"\x01a" + b"\x28\x01", b"a"),
}


@pytest.mark.parametrize(("message", "data"), UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_but_valid_encodings_are_parsed(message: bytes, data: bytes) -> None:
    assert pb.DeliverChunk.FromString(message).data == data
    part = parse_message(message)
    assert bytes(part if isinstance(part, memoryview) else part.data) == data


@pytest.mark.parametrize(
    "message",
    [
        TAG,
        TAG + b"\x05abc",
        TAG + b"\xff",
        TAG + b"\xff" * 20,
        TAG + b"\xff\xff\xff\xff\x7fabc",
        b"\xff\xff",
        b"\x0a\x05abc",
        b"text",
    ],
)  # fmt: skip
def test_an_invalid_message_is_rejected(message: bytes) -> None:
    with pytest.raises(errors.InvalidRequest, match="expected a DeliverChunk"):
        parse_message(message)
