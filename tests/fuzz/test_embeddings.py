"""Bytes from other processes: headers of embeddings, messages of deliveries, cached values, URLs of embeddings."""

import struct
from dataclasses import replace

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from common import errors
from common.embedding import DTYPE_SIZES, HEADER_SIZE, LARGEST_CODES, Header, parse_header
from common.embedding_ref import EmbeddingRef, parse_embedding_url
from common.embedding_stream import data_messages, header_message, parse_message
from protos import embeddings_pb2 as pb
from tests.fuzz.strategies import damaged
from tests.vision_worker.cache.embeddings import EXPECTED, HEADER, IMAGE, VALUES
from vision_worker.cache.base import CorruptCacheEntry
from vision_worker.cache.embedding_cache import _parse_entry

KEYS = st.text("abcdef0123456789-_", min_size=1, max_size=128)
HEADERS = st.builds(
    Header, KEYS, st.text("0123456789abcdef", max_size=64), st.sampled_from(sorted(DTYPE_SIZES)), st.integers(0, 2**32 - 1),
    st.integers(0, 2**30),
)  # fmt: skip
ENTRY = HEADER.pack() + VALUES + IMAGE.SerializeToString()
DELIVERY = [header_message(HEADER), *data_messages(memoryview(VALUES))]


@given(HEADERS)
def test_a_header_survives_its_bytes(header: Header) -> None:
    assert parse_header(header.pack()) == header


@given(damaged([HEADER.pack(), b""]) | st.binary(max_size=2 * HEADER_SIZE))
@example(HEADER.pack().replace(b"key", b"k\xffy"))
@example(HEADER.pack().replace(b"ffff", b"f\x80ff"))
def test_any_bytes_are_a_header_or_an_invalid_request(data: bytes) -> None:
    try:
        header = parse_header(data)
    except errors.InvalidRequest as error:
        assert len(str(error)) < 300
    else:
        assert parse_header(header.pack()) == header


@given(damaged(DELIVERY) | st.binary(max_size=100))
def test_a_message_is_read_as_protobuf_reads_it(message: bytes) -> None:
    """Data alone is decoded by hand."""
    try:
        expected = pb.DeliverChunk.FromString(message)
    except Exception:
        expected = None
    try:
        parsed = parse_message(message)
    except errors.InvalidRequest:
        assert expected is None
        return
    if isinstance(parsed, memoryview):
        assert expected is None or (expected.data == bytes(parsed) and expected.WhichOneof("part") == "data")
    else:
        assert parsed == expected


@given(st.binary(max_size=5000))
def test_data_survives_its_messages(data: bytes) -> None:
    assert b"".join(bytes(parse_message(message)) for message in data_messages(memoryview(data))) == data  # type: ignore[arg-type]


@given(damaged([ENTRY, ENTRY + b"\0" * 10, HEADER.pack()]) | st.binary(max_size=600))
def test_a_cached_value_is_the_expected_embedding_or_corrupt(entry: bytes) -> None:
    try:
        image, values = _parse_entry(memoryview(entry), EXPECTED)
    except CorruptCacheEntry:
        return
    assert (image.key, len(values)) == (EXPECTED.key, image.tokens * EXPECTED.width * 4)


NARROW = {dtype: replace(HEADER, dtype=dtype) for dtype in LARGEST_CODES}
NARROW_ENTRIES = [
    header.pack() + struct.pack("<3f", 0, 1, 2) + bytes(6) + IMAGE.SerializeToString() for header in NARROW.values()
]


@given(st.sampled_from(sorted(NARROW)), damaged([*NARROW_ENTRIES, ENTRY]))
def test_a_cached_narrow_value_is_finite_or_corrupt(dtype: str, entry: bytes) -> None:
    try:
        _, values = _parse_entry(memoryview(entry), replace(EXPECTED, dtype=dtype))
    except CorruptCacheEntry:
        return
    header = parse_header(entry)
    scales = np.frombuffer(values[: header.scales_length], "<f4")
    assert (len(values), header.dtype) == (header.length, dtype)
    assert np.isfinite(scales * np.float32(LARGEST_CODES[dtype])).all()


@given(st.from_regex(r"\A(dvd:)?[0-9a-fx]{62,66}/[-+0-9]{0,12}\s?\Z") | st.text(max_size=100))
def test_a_url_of_an_embedding_is_unambiguous(url: str) -> None:
    ref = parse_embedding_url(url)
    assert ref is None or (ref.url == url and 0 < ref.tokens < 10**8)


@given(st.text("0123456789abcdef", min_size=64, max_size=64), st.integers(1, 10**8 - 1))
def test_an_embedding_survives_its_url(key: str, tokens: int) -> None:
    assert parse_embedding_url(EmbeddingRef(key, tokens).url) == EmbeddingRef(key, tokens)
