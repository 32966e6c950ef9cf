"""Compressed bodies: what is decoded, what is rejected, and that a bomb does not expand."""

import gzip
import random
import tracemalloc
import zlib

import pytest
from backports import zstd

from common import errors
from server.http.content_encoding import decode, parse

TEXT = b'{"model": "a"}' * 20
NOISE = random.Random(0).randbytes(1 << 20)
LIMIT = 4 << 20
LONG_WINDOW: dict[int, int] = {zstd.CompressionParameter.window_log: 27, zstd.CompressionParameter.content_size_flag: 0}


def raw_deflate(data: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return stream.compress(data) + stream.flush()


@pytest.mark.parametrize(
    ("headers", "encoding"),
    [
        ([], None), ([""], None), (["identity"], None), (["gzip"], "gzip"), (["GZip "], "gzip"), (["x-gzip"], "gzip"),
        (["deflate"], "deflate"), (["gzip, identity"], "gzip"), (["identity", "deflate"], "deflate"), ([",gzip,"], "gzip"),
    ],
)  # fmt: skip
def test_the_supported_encodings_are_recognised(headers: list[str], encoding: str | None) -> None:
    assert parse(headers) == encoding


@pytest.mark.parametrize("headers", [["br"], ["gzip, gzip"], ["gzip", "deflate"], ["aes128gcm"], ["é"], ["x" * 9000]])
def test_other_encodings_are_rejected_with_the_supported_ones(headers: list[str]) -> None:
    with pytest.raises(errors.UnsupportedEncoding, match="gzip, deflate, zstd") as error_info:
        parse(headers)
    assert len(str(error_info.value)) < 300


@pytest.mark.parametrize("data", [b"", b"a", TEXT, NOISE, NOISE * 4, bytes(LIMIT)], ids=len)
def test_every_format_is_decoded(data: bytes) -> None:
    half = len(data) // 2
    assert decode(gzip.compress(data), "gzip", LIMIT) == data
    assert decode(gzip.compress(data[:half]) + gzip.compress(data[half:]) + bytes(9), "gzip", LIMIT) == data
    assert decode(zlib.compress(data), "deflate", LIMIT) == data
    assert decode(raw_deflate(data), "deflate", LIMIT) == data
    assert decode(zstd.compress(data), "zstd", LIMIT) == data
    assert decode(zstd.compress(data[:half]) + zstd.compress(data[half:]), "zstd", LIMIT) == data


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "zstd"])
@pytest.mark.parametrize("keep", [0, 1, 5, 0.5, -9, -1])
def test_a_truncated_body_is_rejected(encoding: str, keep: float) -> None:
    whole = {"gzip": gzip, "deflate": zlib, "zstd": zstd}[encoding].compress(NOISE)
    cut = whole[: int(len(whole) * keep) if 0 < keep < 1 else int(keep)]
    with pytest.raises(errors.InvalidRequest, match=f"not valid {encoding}"):
        decode(cut, encoding, LIMIT)


DAMAGED = {
    "plain": (TEXT, "gzip"),
    "plain deflate": (b"\xff" + TEXT, "deflate"),
    "zlib as gzip": (zlib.compress(TEXT), "gzip"),
    "wrong checksum": (gzip.compress(TEXT)[:-8] + bytes(8), "gzip"),
    "garbage behind gzip": (gzip.compress(TEXT) + b"garbage", "gzip"),
    "garbage behind deflate": (zlib.compress(TEXT) + b"garbage", "deflate"),
    "plain zstd": (TEXT, "zstd"),
    "garbage behind zstd": (zstd.compress(TEXT) + b"garbage", "zstd"),
    "endless empty frames": (zstd.compress(b"") * 5000, "zstd"),
    "window of 128 MiB": (zstd.compress(NOISE * 12, options=LONG_WINDOW), "zstd"),
    "endless empty members": (gzip.compress(b"") * 5000, "gzip"),
}


@pytest.mark.parametrize(("body", "encoding"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_body_is_rejected(body: bytes, encoding: str) -> None:
    with pytest.raises(errors.InvalidRequest, match=f"not valid {encoding}"):
        decode(body, encoding, LIMIT)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "zstd"])
def test_a_bomb_is_rejected_before_it_expands(encoding: str) -> None:
    expanded = bytes(64 << 20)
    bomb = {"gzip": gzip, "deflate": zlib, "zstd": zstd}[encoding].compress(expanded)
    tracemalloc.start()
    try:
        with pytest.raises(errors.BodyTooLarge, match="exceeds 1000 bytes"):
            decode(bomb, encoding, 1000)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


def test_the_limit_is_exact() -> None:
    assert len(decode(gzip.compress(bytes(1000)), "gzip", 1000)) == 1000
    with pytest.raises(errors.BodyTooLarge):
        decode(gzip.compress(bytes(1001)), "gzip", 1000)
