"""Written by hand, read by protobuf, and the other way round: the wire format is the contract's."""

from pathlib import Path

import pytest

from common import errors, rpc
from common.embedding import HEADER_SIZE, Header
from common.embedding_stream import _write_to_sink_file, data_messages, header_message, parse_message
from protos import embeddings_pb2 as pb

HEADER = Header("key", "f" * 64, "bfloat16", 3, 4)


@pytest.mark.parametrize(
    "size", [1, 127, 128, 16_383, 16_384, rpc.CHUNK_BYTES - 1, rpc.CHUNK_BYTES, rpc.CHUNK_BYTES + 1, 3 * rpc.CHUNK_BYTES]
)
def test_a_delivery_is_what_protobuf_would_write(size: int) -> None:
    data = bytes(i % 251 for i in range(1000)) * (size // 1000 + 1)
    data = data[:size]
    said = pb.DeliverChunk.FromString(header_message(HEADER)).header
    rest = list(data_messages(memoryview(data)))
    assert (said.key, said.fingerprint, said.rows, said.width, said.length) == ("key", "f" * 64, 3, 4, 24)
    assert said.dtype == pb.BFLOAT16
    pieces = [data[at : at + rpc.CHUNK_BYTES] for at in range(0, size, rpc.CHUNK_BYTES)]
    assert rest == [pb.DeliverChunk(data=piece).SerializeToString() for piece in pieces]
    read_again = [parse_message(message) for message in rest]
    assert all(isinstance(part, memoryview) for part in read_again)
    assert b"".join(part for part in read_again if isinstance(part, memoryview)) == data


def test_a_header_is_read_by_protobuf() -> None:
    message = pb.DeliverChunk(header=pb.EmbeddingHeader(key="k", rows=2))
    assert parse_message(message.SerializeToString()) == message


def test_data_is_not_copied() -> None:
    message = pb.DeliverChunk(data=b"x" * 1000).SerializeToString()
    part = parse_message(message)
    assert isinstance(part, memoryview)
    assert part.obj is message


TAG = pb.DeliverChunk(data=b"x").SerializeToString()[:1]

ODD = {
    "nothing": (b"", b""),
    "a longer length than needed": (TAG + b"\x83\x00abc", b"abc"),
    "twice, the last counts": (TAG + b"\x01a" + TAG + b"\x02bc", b"bc"),
    "data and what nobody knows": (TAG + b"\x01a" + b"\x28\x01", b"a"),
}


@pytest.mark.parametrize(("message", "data"), ODD.values(), ids=ODD)
def test_what_protobuf_allows_is_understood(message: bytes, data: bytes) -> None:
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
def test_what_is_no_chunk_is_refused(message: bytes) -> None:
    with pytest.raises(errors.InvalidRequest, match="no DeliverChunk"):
        parse_message(message)


def test_no_file_but_the_sinks_is_written_to(tmp_path: Path) -> None:
    ours, other, link = tmp_path / "ours", tmp_path / "other", tmp_path / "link"
    ours.write_bytes(HEADER.pack())
    other.write_bytes(Header("another", "f" * 64, "bfloat16", 3, 4).pack())
    link.symlink_to(ours)
    data = memoryview(bytes(range(24)))
    assert [_write_to_sink_file(str(file), HEADER, data) for file in (other, link, tmp_path / "none", tmp_path)] == 4 * [False]
    assert (other.stat().st_size, ours.stat().st_size) == (HEADER_SIZE, HEADER_SIZE)
    assert _write_to_sink_file(str(ours), HEADER, data)
    assert ours.read_bytes() == HEADER.pack() + data
