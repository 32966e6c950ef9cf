"""TLS between processes, over TCP: who is let in, and what happens when certificates are replaced."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from common import errors, rpc
from common.http_get import http_get
from common.security import OPEN, Credentials, TlsFiles
from protos import embeddings_pb2 as pb
from protos import embeddings_pb2_grpc
from tests.certificates import Authority
from tests.ports import free_port
from tests.redis_server import redis_server
from tests.server.fakes.language_worker import FakeLanguageWorker
from tests.vision_worker.cache.embeddings import EXPECTED, HEADER, IMAGE, VALUES
from vision_worker.cache.base import open_cache
from vision_worker.cache.embedding_cache import EmbeddingCache


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
async def worker(authority: Authority, tmp_path: Path) -> AsyncIterator[FakeLanguageWorker]:
    sink, http = (f"127.0.0.1:{free_port()}" for _ in range(2))
    worker = FakeLanguageWorker(tmp_path, 0, sink, http, authority.credentials("worker"))
    await worker.start()
    yield worker
    await worker.stop()


async def describe(worker: FakeLanguageWorker, credentials: Credentials) -> None:
    """Call the worker's sink once, and its HTTP server. Raises: `Unavailable` if one of them does not let it in."""
    async with rpc.open_channel(worker.sink.address, credentials) as channel:
        with rpc.translate_errors("sink", quiet=True):
            await embeddings_pb2_grpc.EmbeddingSinkStub(channel).Describe(pb.DescribeRequest(), timeout=10)
    status, _ = await http_get(worker.engine.address, "/health", 10, credentials)
    assert status == 200


def strangers(authority: Authority, folder: Path) -> dict[str, Credentials]:
    """Credentials that must not work, by what is wrong with them."""
    foreign = Authority(folder, "foreign authority")
    wrong_name = authority.issue("wrong-name")
    return {
        "plaintext": OPEN,
        "foreign client certificate": foreign.credentials("foreign", ca=authority.file),
        "expired client certificate": authority.credentials("expired", expired=True),
        "foreign authority": Credentials(None, TlsFiles(wrong_name.cert, wrong_name.key, foreign.file)),
        "another name expected": Credentials(None, TlsFiles(wrong_name.cert, wrong_name.key, authority.file, "example.org")),
    }


@pytest.mark.parametrize(
    "kind",
    ["plaintext", "foreign client certificate", "expired client certificate", "foreign authority", "another name expected"],
)
async def test_a_stranger_is_not_let_in(authority: Authority, worker: FakeLanguageWorker, tmp_path: Path, kind: str) -> None:
    stranger = strangers(authority, tmp_path)[kind]
    async with rpc.open_channel(worker.sink.address, stranger) as channel:
        with pytest.raises(errors.Unavailable), rpc.translate_errors("sink", quiet=True):
            await embeddings_pb2_grpc.EmbeddingSinkStub(channel).Describe(pb.DescribeRequest(), timeout=10)
    with pytest.raises(errors.Unavailable):
        await http_get(worker.engine.address, "/health", 10, stranger)
    await describe(worker, authority.credentials("friend"))


async def test_a_client_without_a_certificate_is_not_let_in(authority: Authority, worker: FakeLanguageWorker) -> None:
    context = ssl.create_default_context(cafile=str(authority.file))
    for address in (worker.sink.address, worker.engine.address):
        with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
            await _read_one_byte(address, context)


async def _read_one_byte(address: str, context: ssl.SSLContext) -> None:
    """Send a request over TLS and read one byte. With TLS 1.3 a server rejects a client after the client's handshake."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
    try:
        writer.write(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        await reader.readexactly(1)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def test_a_server_whose_certificate_is_expired_or_of_another_name_is_not_used(
    authority: Authority, tmp_path: Path
) -> None:
    friend = authority.credentials("friend")
    for changes in ({"expired": True}, {"host": "127.0.0.2"}, {"host": "worker.example"}):
        options: dict[str, Any] = dict(changes)
        credentials = authority.credentials("server", **options)
        bad = FakeLanguageWorker(tmp_path, 0, f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}", credentials)
        await bad.start()
        try:
            with pytest.raises(errors.Unavailable):
                await describe(bad, friend)
            with pytest.raises(errors.Unavailable):
                await http_get(bad.engine.address, "/health", 10, friend)
            if changes.get("host") == "worker.example":  # --tls-name
                assert friend.tls
                await describe(
                    bad, Credentials(None, TlsFiles(friend.tls.cert, friend.tls.key, friend.tls.ca, "worker.example"))
                )
        finally:
            await bad.stop()


async def test_replaced_certificates_are_used_without_a_restart(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Server and client get certificates of a new authority, at the same paths."""
    monkeypatch.setattr("common.security._CHECK_INTERVAL_SECONDS", 0.0)
    shared = tmp_path / "shared-authority.pem"
    shared.write_bytes(authority.file.read_bytes())
    server, client = (authority.credentials(name, ca=shared) for name in ("server", "client"))
    worker = FakeLanguageWorker(tmp_path, 0, f"127.0.0.1:{free_port()}", credentials=server)
    await worker.start()
    connection = rpc.Connection(worker.sink.address, client)

    async def call() -> None:
        stub = connection.stub(embeddings_pb2_grpc.EmbeddingSinkStub)
        await stub.Describe(pb.DescribeRequest(), timeout=20, wait_for_ready=True)

    try:
        await call()
        new = Authority(tmp_path, "new authority")
        (tmp_path / "shared-authority.pem").write_bytes(new.file.read_bytes())
        for name in ("server", "client"):
            new.issue(name, ca=shared)
        await call()
        async with rpc.open_channel(worker.sink.address, authority.credentials("old")) as old:
            with pytest.raises(errors.Unavailable), rpc.translate_errors("sink", quiet=True):
                await embeddings_pb2_grpc.EmbeddingSinkStub(old).Describe(pb.DescribeRequest(), timeout=10)
        await call()
    finally:
        await connection.close()
        await worker.stop()


async def test_a_cache_in_redis_is_reached_over_tls(authority: Authority, tmp_path: Path) -> None:
    """The redis is real; TLS ends in front of it, since the redis-server of the tests is built without."""
    tls = authority.issue("redis")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(tls.ca))
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(tls.cert, tls.key)
    with redis_server(tmp_path) as redis:

        async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await reader.read(1 << 16):
                    writer.write(data)
                    await writer.drain()
            writer.close()

        async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            to_redis = await asyncio.open_unix_connection(redis.socket)
            await asyncio.gather(copy(reader, to_redis[1]), copy(to_redis[0], writer))

        server = await asyncio.start_server(forward, "127.0.0.1", 0, ssl=context)
        url = f"rediss://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
        async with EmbeddingCache(open_cache(url, authority.issue("vision"))) as cache:
            cache.put(HEADER, IMAGE, VALUES)
        async with EmbeddingCache(open_cache(url, authority.issue("vision"))) as cache:
            assert await cache.get(EXPECTED) is not None
        for stranger in (None, Authority(tmp_path, "foreign").issue("stranger", ca=authority.file)):
            async with EmbeddingCache(open_cache(url, stranger)) as cache:
                assert await cache.get(EXPECTED) is None
                assert cache.counts["errors"] == 1
        server.close()
