"""A gateway and its workers over TCP, with a token and TLS."""

import asyncio
import contextlib
import socket
import ssl
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.grants import GrantSigner
from common.security import Credentials
from server.config import GatewayOptions
from server.processes import _tls_options, create_server
from tests.certificates import Authority
from tests.ports import free_port
from tests.server.fakes.language_worker import FakeLanguageWorker
from tests.server.fakes.requests import image_part
from tests.server.fakes.stack import start_stack
from tests.server.fakes.vision_worker import FakeVisionWorker
from tests.server.gateway.helpers import A

TOKEN = "a-token-of-this-cluster"


async def test_requests_are_served_with_a_token_and_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    worker = replace(authority.credentials("worker"), token=TOKEN)
    language = FakeLanguageWorker(tmp_path, 0, f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}", worker)
    vision = FakeVisionWorker(f"127.0.0.1:{free_port()}", worker)
    tls = authority.issue("gateway")
    options: dict[str, Any] = {"cluster_token": TOKEN, "tls_cert": tls.cert, "tls_key": tls.key, "tls_ca": tls.ca}
    async with start_stack(tmp_path, [vision], [language], **options) as stack:
        response = await stack.chat(image_part(A))
        assert response.status == 200, response.body
        assert stack.engine.requests[-1].headers["Authorization"] == f"Bearer {TOKEN}"
        image = stack.vision.calls[-1].images[0]
        terms = GrantSigner(Credentials(TOKEN)).verify(image.grant, image.key)
        assert (terms.address, terms.key) == (language.sink.address, image.key)
        assert terms.max_bytes == 13 * 256 * 4 * 4
        assert TOKEN not in response.body.decode() + str(response.headers)


async def test_a_worker_with_another_token_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vision = FakeVisionWorker(f"unix:{tmp_path}/guarded", Credentials(TOKEN))
    language = FakeLanguageWorker(tmp_path, 0)
    async with start_stack(tmp_path, [vision], [language], cluster_token=TOKEN) as stack:
        assert (await stack.chat(image_part(A))).status == 200
        stack.vision_workers[0]._credentials = Credentials("another-token-entirely")
        await stack.vision.stop()
        await stack.vision.start()
        await stack.wait_until_not_ready()
        assert "missing or wrong cluster token" in caplog.text
        assert TOKEN not in caplog.text
        assert (await stack.chat("text")).status == 200, "text needs no vision worker"
        assert (await stack.chat(image_part(bytes([*A, 0])))).status == 503


async def test_without_a_token_there_are_no_grants(tmp_path: Path) -> None:
    async with start_stack(tmp_path) as stack:
        await stack.chat(image_part(A))
        assert stack.vision.calls[-1].images[0].grant == b""


async def test_the_gateway_itself_serves_https_and_replaces_its_certificate(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("common.security._CHECK_INTERVAL_SECONDS", 0.0)
    authority = Authority(tmp_path)
    tls = authority.issue("gateway")
    paths: dict[str, Any] = {"tls_cert": tls.cert, "tls_key": tls.key, "tls_ca": tls.ca}
    options = GatewayOptions(vision_workers=["127.0.0.1:9"], language_workers=["127.0.0.1:9"], **paths)
    assert set(_tls_options(options)) == {"ssl_certfile", "ssl_keyfile"}
    server = create_server(options)
    server.config.load()
    serials = []
    for _ in range(2):
        assert server.config.ssl is not None
        await server.on_tick(1)
        serials.append(await _serial(server.config.ssl, authority))
        authority.issue("gateway")
    assert serials[0] != serials[1]


async def test_errors_of_the_protocol_reach_a_client_over_tls(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A connection with TLS cannot be closed in one direction only."""
    authority = Authority(tmp_path)
    tls = authority.issue("gateway")
    options = GatewayOptions(
        vision_workers=["127.0.0.1:9"], language_workers=["127.0.0.1:9"], head_timeout=1.0, shutdown_delay=0.0,
        tls_cert=tls.cert, tls_key=tls.key, tls_ca=tls.ca,
    )  # fmt: skip
    server, listener = create_server(options), socket.create_server(("127.0.0.1", 0))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    context = ssl.create_default_context(cafile=str(authority.file))
    for data, status in ((b"no HTTP\r\n\r\n", b"400"), (b"GET / HTTP/1.1\r\n", b"408")):
        reader, writer = await asyncio.open_connection(*listener.getsockname(), ssl=context)
        writer.write(data)
        async with asyncio.timeout(30):
            assert (await reader.readline()).startswith(b"HTTP/1.1 " + status)
            await reader.read()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    server.end_now()
    await serving
    assert "Traceback" not in caplog.text


async def _serial(server: ssl.SSLContext, authority: Authority) -> Any:
    """Handshake with a server's context in memory, and return the serial number of its certificate."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.create_default_context(cafile=str(authority.file))
    ours = client.wrap_bio(to_client, to_server, server_hostname="127.0.0.1")
    theirs = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for side in (ours, theirs):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    certificate = ours.getpeercert()
    assert certificate
    return certificate["serialNumber"]
