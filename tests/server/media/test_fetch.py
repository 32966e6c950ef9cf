"""Images fetched over HTTP: servers that misbehave, limits of size and time, redirects, and what a request reveals."""

import asyncio
import gzip
import importlib.metadata
from typing import Any

import pytest
from aiohttp import web

from common import errors
from tests.server.fakes.file_server import file_server
from tests.server.fakes.handlers import Handler, hang, respond_with
from tests.server.media.helpers import PNG, open_fetcher


def redirect_to(location: str, status: int = 302) -> Handler:
    return respond_with(b"", status, Location=location)


async def assert_fetch_fails(
    handler: Handler, error: type[Exception] = errors.ImageFetchFailed, match: str | None = None, **options: Any
) -> None:
    """Assert that an image from this handler cannot be fetched, and that the message does not contain the URL's query."""
    async with file_server(a=handler) as url, open_fetcher(allow_private_images=True, **options) as fetcher:
        with pytest.raises(error, match=match) as error_info:
            await fetcher.load(f"{url}/a?signature=secret#part")
    assert "secret" not in str(error_info.value)
    assert len(str(error_info.value)) < 400


@pytest.mark.parametrize("status", [201, 204, 206, 304, 400, 401, 403, 404, 410, 418, 429, 500, 502, 503])
async def test_a_status_other_than_200_is_rejected(status: int) -> None:
    await assert_fetch_fails(respond_with(b"" if status in (204, 304) else PNG, status), match=f"answered with status {status}")


async def test_a_body_that_is_not_an_image_is_rejected() -> None:
    await assert_fetch_fails(respond_with(b"<html>not found</html>", Content_Type="image/png"), errors.InvalidImage)
    await assert_fetch_fails(respond_with(b""), errors.InvalidImage, "0 bytes")


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "gzip, identity"])
async def test_compressed_bodies_are_not_decompressed(encoding: str) -> None:
    await assert_fetch_fails(respond_with(gzip.compress(bytes(1 << 20)), Content_Encoding=encoding), match="compressed")


async def test_a_body_over_the_limit_is_not_read_completely() -> None:
    await assert_fetch_fails(respond_with(bytes(3000)), errors.ImageTooLarge, "exceeds 2000 bytes", max_image_bytes=2000)

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(bytes(500))

    await assert_fetch_fails(endless, errors.ImageTooLarge, max_image_bytes=2000)


async def test_a_server_that_never_responds_or_never_ends_is_abandoned() -> None:
    async def trickling(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"x")
            await asyncio.sleep(0.05)

    await assert_fetch_fails(hang, match="did not send the file within 0.2 s", fetch_timeout=0.2)
    await assert_fetch_fails(trickling, match="within 0.3 s", fetch_timeout=0.3)


async def test_the_timeout_includes_redirects() -> None:
    async def slow(_request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.2)
        return web.Response(status=302, headers={"Location": "/a"})

    await assert_fetch_fails(slow, match="within 0.3 s", fetch_timeout=0.3)


async def test_a_connection_that_breaks_is_reported() -> None:
    async def partial_body(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b"x")
        assert request.transport is not None
        request.transport.close()
        return response

    await assert_fetch_fails(partial_body, match="Cannot fetch .*: incomplete file")


async def test_connection_errors_are_described_without_addresses() -> None:
    async def send_ssh_banner(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(send_ssh_banner, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with open_fetcher(allow_private_images=True) as fetcher:
        for scheme, reason in (("http", "invalid HTTP response"), ("https", "TLS handshake failed")):
            with pytest.raises(errors.ImageFetchFailed, match=f"Cannot fetch .*: .*{reason}"):
                await fetcher.load(f"{scheme}://127.0.0.1:{port}/a")
        server.close()
        await server.wait_closed()
        with pytest.raises(errors.ImageFetchFailed, match="connection refused or timed out"):
            await fetcher.load(f"http://127.0.0.1:{port}/a")
        with pytest.raises(errors.ImageFetchFailed, match="host name not found"):
            await fetcher.load("http://no-such-name.invalid/a")
        with pytest.raises(errors.InvalidRequest, match=r"character 317 is .\\ud800."):
            await fetcher.load("http://" + "a" * 300 + ".invalid/\ud800")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_at_most_three_redirects_are_followed(status: int) -> None:
    chain = {str(i): redirect_to(f"/{i + 1}", status) for i in range(4)}
    async with file_server(**chain, **{"4": respond_with(PNG)}) as url, open_fetcher(allow_private_images=True) as fetcher:
        assert (await fetcher.load(f"{url}/1")).data == PNG, "three redirects"
        with pytest.raises(errors.ImageFetchFailed, match="redirects more than 3 times"):
            await fetcher.load(f"{url}/0")
    await assert_fetch_fails(redirect_to("/a", status), match="more than 3 times")
    await assert_fetch_fails(respond_with(b"", status), match="more than 3 times")


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://a/", "http://u@a/", "data:,", "http://[", "http://a:99999/"])
async def test_a_redirect_to_an_invalid_url_is_rejected(location: str) -> None:
    await assert_fetch_fails(redirect_to(location), errors.InvalidRequest)


async def test_http_and_private_addresses_require_the_operators_permission() -> None:
    async with file_server(a=respond_with(PNG)) as url:
        async with open_fetcher(allow_private_images=True) as fetcher:
            assert (await fetcher.load(f"{url}/a")).data == PNG
            assert (await fetcher.load(f"{url.replace('127.0.0.1', 'localhost')}/a?b=c#d")).data == PNG
        for rejected in (f"{url}/a", f"{url.replace('http', 'https')}/a"):
            async with open_fetcher() as fetcher:
                with pytest.raises(errors.InvalidRequest):
                    await fetcher.load(rejected)


@pytest.mark.parametrize("configured", [None, "Example/1.0 (+https://example.org; crawler@example.org)"])
async def test_requests_name_the_server(configured: str | None) -> None:
    received = []

    async def record(request: web.Request) -> web.StreamResponse:
        received.append(request.headers["User-Agent"])
        return web.Response(body=PNG)

    async with file_server(a=record) as url, open_fetcher(allow_private_images=True, fetch_user_agent=configured) as fetcher:
        await fetcher.load(f"{url}/a")
    version = importlib.metadata.version("dvd-serve")
    assert received == [configured or f"dvd-serve/{version} (+https://github.com/dvd-serve/dvd-serve)"]


async def test_requests_have_no_cookies_credentials_or_referer() -> None:
    received_headers = []

    async def set_cookie(request: web.Request) -> web.StreamResponse:
        received_headers.append(request.headers)
        return web.Response(body=PNG, headers={"Set-Cookie": "a=b"})

    async with file_server(a=set_cookie) as url, open_fetcher(allow_private_images=True) as fetcher:
        await fetcher.load(f"{url}/a")
        await fetcher.load(f"{url}/a")
    assert not [headers for headers in received_headers if {"Cookie", "Authorization", "Referer"} & set(headers)]
    assert {headers["Accept-Encoding"] for headers in received_headers} == {"identity"}


TARGETS = {
    "user and password": "https://user:secret@example.org/secret?token=secret",
    "user and password, relative": "//user:secret@example.org/secret",
    "other scheme": "ftp://user:secret@example.org/secret",
    "no host": "javascript:secret",
    "control character": "https://example.org/secret\x7f?token=secret",
    "backslash": "https://example.org\\secret",
    "bad port": "https://example.org:99999/secret",
    "loopback": "https://127.0.0.1/secret?token=secret",
    "too long": "https://example.org/" + "secret" * 2000,
}


@pytest.mark.parametrize("location", TARGETS.values(), ids=TARGETS)
async def test_the_message_about_a_redirect_shows_only_scheme_and_host_of_its_target(location: str) -> None:
    async with file_server(a=redirect_to(location)) as url, open_fetcher(allow_private_images=True) as fetcher:
        with pytest.raises((errors.InvalidRequest, errors.ImageFetchFailed)) as error_info:
            await fetcher.load(f"{url}/a")
    assert "secret" not in str(error_info.value)
    assert url in str(error_info.value)


async def test_the_message_about_a_file_behind_a_redirect_names_the_url_that_the_caller_knows() -> None:
    handlers = {"a": redirect_to("/secret"), "secret": respond_with(b"", 404)}
    async with file_server(**handlers) as url, open_fetcher(allow_private_images=True) as fetcher:
        with pytest.raises(errors.ImageFetchFailed, match="answered with status 404") as error_info:
            await fetcher.load(f"{url}/a")
    assert f"{url}/a" in str(error_info.value)
    assert "secret" not in str(error_info.value)


async def test_memory_is_reserved_for_what_is_fetched_as_it_arrives() -> None:
    reserved: list[int] = []

    def reserve(size: int) -> None:
        reserved.append(size)
        if sum(reserved) > len(PNG):
            raise errors.Overloaded("full")

    async with file_server(a=respond_with(PNG)) as url, open_fetcher(allow_private_images=True) as fetcher:
        assert (await fetcher.load(f"{url}/a", reserve)).data == PNG
        assert sum(reserved) == len(PNG)
        with pytest.raises(errors.Overloaded):
            await fetcher.load(f"{url}/a", reserve)
