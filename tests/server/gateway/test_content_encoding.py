"""Compressed requests, and what is answered to encodings that are not supported, broken bodies and bombs."""

import gzip
import json
import zlib

import pytest
from backports import zstd

from tests.server.fakes.requests import chat
from tests.server.fakes.stack import Stack
from tests.server.fakes.vllm import COMPLETION
from tests.server.gateway.helpers import assert_serves_images

BODY = json.dumps(chat("a", note="x" * 5000)).encode()
COMPRESSED = {
    "gzip": gzip.compress(BODY),
    "x-gzip": gzip.compress(BODY),
    "deflate": zlib.compress(BODY),
    "GZIP, identity": gzip.compress(BODY),
    "zstd": zstd.compress(BODY),
    "identity": BODY,
}


@pytest.mark.parametrize(("encoding", "data"), COMPRESSED.items(), ids=COMPRESSED)
async def test_a_compressed_request_is_served(shared_stack: Stack, encoding: str, data: bytes) -> None:
    response = await shared_stack.post(data, {"Content-Encoding": encoding})
    assert (response.status, response.body) == (200, COMPLETION)
    assert shared_stack.engine.requests[-1].unsalted == BODY
    assert "Content-Encoding" not in shared_stack.engine.requests[-1].headers


@pytest.mark.parametrize("encoding", ["br", "compress", "gzip, gzip"])
async def test_another_encoding_is_answered_with_the_supported_ones(shared_stack: Stack, encoding: str) -> None:
    response = await shared_stack.post(BODY, {"Content-Encoding": encoding})
    assert (response.status, response.error["code"]) == (415, "unsupported_encoding")
    assert "gzip, deflate, zstd" in response.error["message"]
    assert response.headers["Accept-Encoding"] == "gzip, deflate, zstd"
    await assert_serves_images(shared_stack)


@pytest.mark.parametrize(
    ("status", "data"),
    [(400, BODY), (400, COMPRESSED["gzip"][:-9]), (413, gzip.compress(bytes(1 << 26)))],
    ids=["not compressed", "cut", "bomb"],
)
async def test_broken_bodies_and_bombs_are_rejected(shared_stack: Stack, status: int, data: bytes) -> None:
    response = await shared_stack.post(data, {"Content-Encoding": "gzip"})
    assert (response.status, response.error["code"]) == (status, {400: "invalid_request", 413: "body_too_large"}[status])
    await assert_serves_images(shared_stack)
