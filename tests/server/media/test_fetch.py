"""Images on their way in: forms of data: URLs, addresses that are not fetched, servers that misbehave, limits."""

import asyncio
import base64
import contextlib
import gzip
import io
import random
import socket
import struct
import threading
import zlib
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from PIL import Image

from common import errors
from common.options import IMAGE_FORMATS
from server.config import ServingOptions
from server.media.fetch import MediaFetcher, ThreadedResolver, inspect_image, is_public
from tests.server.fakes.file_server import file_server
from tests.server.fakes.handlers import Handler, hang, respond_with
from tests.server.fakes.requests import data_url, image_file

PNG = image_file()


class Names(AbstractResolver):
    """Answers every name with these addresses."""

    def __init__(self, *addresses: str) -> None:
        self.addresses, self.asked = addresses, list[str]()

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        self.asked.append(host)
        kinds = {True: socket.AF_INET6, False: socket.AF_INET}
        return [
            ResolveResult(hostname=host, host=a, port=port, family=kinds[":" in a], proto=0, flags=0) for a in self.addresses
        ]

    async def close(self) -> None:
        pass


@contextlib.asynccontextmanager
async def fetching(*addresses: str, **options: Any) -> AsyncIterator[MediaFetcher]:
    async with MediaFetcher(ServingOptions(**options), Names(*addresses) if addresses else None) as fetcher:
        yield fetcher


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


ODD = PNG + b"\xfb\xef\xbe\xff" * 3 + bytes(2 - (len(PNG) + 1) % 3)  # its base64 has all of + / =
assert {"+", "/", "="} <= set(encoded(ODD))
FORMS = {
    "usual": f"data:image/png;base64,{encoded(ODD)}",
    "wrong type": f"data:image/jpeg;base64,{encoded(ODD)}",
    "no image's type": f"data:text/plain;base64,{encoded(ODD)}",
    "no type": f"data:;base64,{encoded(ODD)}",
    "parameters": f"data:image/png;name=a.png;charset=utf-8;base64,{encoded(ODD)}",
    "capitals": f"DATA:IMAGE/PNG;BASE64,{encoded(ODD)}",
    "line breaks": "data:image/png;base64," + base64.encodebytes(ODD).decode(),
    "CR and LF": "data:image/png;base64," + base64.encodebytes(ODD).decode().replace("\n", "\r\n"),
    "spaces": "data:image/png;base64, " + " ".join(encoded(ODD)),
    "percent": "data:image/png;base64," + quote(encoded(ODD), safe=""),
    "URL-safe": "data:image/png;base64," + base64.urlsafe_b64encode(ODD).decode(),
    "no padding": f"data:image/png;base64,{encoded(ODD).rstrip('=')}",
    "too much padding": f"data:image/png;base64,{encoded(ODD)}====",
}


@pytest.mark.parametrize("form", ["usual", "line breaks", "URL-safe", "no padding", "percent"])
@pytest.mark.parametrize("more", [0, 1, 2, 3 << 17])
async def test_large_files_are_read_in_these_forms_too(form: str, more: int) -> None:
    file = ODD + bytes(i % 251 for i in range((3 << 17) - len(ODD) + more))  # with 0 more, two whole pieces
    written = {
        "usual": encoded(file), "line breaks": base64.encodebytes(file).decode(), "no padding": encoded(file).rstrip("="),
        "URL-safe": base64.urlsafe_b64encode(file).decode(), "percent": quote(encoded(file), safe=""),
    }  # fmt: skip
    async with fetching() as fetcher:
        assert await fetcher.load(f"data:image/png;base64,{written[form]}") == file


async def test_padding_inside_is_refused_wherever_it_is() -> None:
    large = encoded(ODD + bytes(3 << 18))
    async with fetching() as fetcher:
        for at in (8, 1 << 17, 1 << 18, 1 << 19):
            with pytest.raises(errors.InvalidImage, match="not valid base64"):
                await fetcher.load(f"data:image/png;base64,{large[: at - 2]}=={large[at:]}")


@pytest.mark.parametrize("url", FORMS.values(), ids=FORMS)
async def test_forms_that_clients_send_are_read(url: str) -> None:
    async with fetching() as fetcher:
        assert await fetcher.load(url) == ODD


BAD_FORMS = {
    "no comma": "data:image/png;base64",
    "not base64": "data:image/png," + quote(PNG),
    "base64 elsewhere": f"data:base64;image/png,{encoded(PNG)}",
    "empty": "data:image/png;base64,",
    "only padding": "data:image/png;base64,====",
    "one letter": "data:image/png;base64,A",
    "padding inside": f"data:image/png;base64,{encoded(PNG)[:8]}=={encoded(PNG)[8:]}",
    "no alphabet": "data:image/png;base64,!!!!",
    "other script": "data:image/png;base64,éééé",
    "surrogate": "data:image/png;base64,\ud800",
    "NUL": "data:image/png;base64,\0\0\0\0",
    "encoded twice": f"data:image/png;base64,{encoded(encoded(PNG).encode())}",
    "URL inside": f"data:image/png;base64,{encoded(b'https://example.org/a.png')}",
    "text": f"data:image/png;base64,{encoded(b'hello')}",
}


@pytest.mark.parametrize("url", BAD_FORMS.values(), ids=BAD_FORMS)
async def test_other_forms_are_refused(url: str) -> None:
    async with fetching() as fetcher:
        with pytest.raises(errors.InvalidImage) as caught:
            await fetcher.load(url)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("limit", [len(PNG) - 1, len(PNG) - 2, len(PNG) // 2, 1])
async def test_too_many_bytes_inline_are_refused_to_the_byte(limit: int) -> None:
    async with fetching(max_image_bytes=len(PNG)) as fetcher:
        assert await fetcher.load(data_url(PNG)) == PNG
    async with fetching(max_image_bytes=limit) as fetcher:
        with pytest.raises(errors.ImageTooLarge, match=f"exceeds {limit} bytes"):
            await fetcher.load(data_url(PNG))


PUBLIC = ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "2a00:1450:4001::1"]
NOT_PUBLIC = [
    "127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1",
    "169.254.169.254", "100.64.0.1", "192.0.0.1", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1",
    "239.1.1.1", "240.0.0.1", "255.255.255.255", "::", "::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1",
    "64:ff9b::7f00:1", "64:ff9b::8.8.8.8", "64:ff9b:1::1", "2002:7f00:1::", "2002:0808:0808::", "2001:0:7f00:1::",
    "2001:db8::1", "fc00::1", "fd12:3456::1", "fe80::1", "fe80::1%eth0", "2606:4700::1111%1", "fec0::1", "ff02::1", "100::1",
    "", "localhost", "127.1", "2130706433", "0x7f000001", "017700000001", "8.8.8.8.", "8.8.8.8/32",
]  # fmt: skip


def test_which_addresses_are_public() -> None:
    assert [address for address in PUBLIC if not is_public(address)] == []
    assert [address for address in NOT_PUBLIC if is_public(address)] == []


URLS = [
    *(f"https://[{a.replace('%', '%25')}]/a.png" for a in NOT_PUBLIC if ":" in a),
    *(f"https://{a}/a.png" for a in NOT_PUBLIC if a[:1].isdigit() and not set(a) & set(":/")),
    "https://[::1]/", "https://[::ffff:127.0.0.1]/", "https://[::ffff:7f00:1]:443/", "https://[::]/",
    "https://127.0.0.1:8000/metrics", "https://2130706433/", "https://0x7f000001/", "https://0X7F.0.0.1/",
    "https://0x7f.1/", "https://0177.0.0.1/", "https://017700000001/", "https://127.0.1/", "https://127.1/", "https://0/",
    "https://127.0.0.1./", "https://2130706433./", "https://0x/", "https://127.0.0.0x1/", "https://[fe80::1%25eth0]/",
    "https://①②⑦.0.0.1/", "https://１２７.0.0.1/", "https://127。0。0。1/", "https://127．0．0．1/", "https://ⓔxample.org/",
    "https://%31%32%37.0.0.1/", "https://127.0.0.1%2f@example.org/", "https://example.org%00.a/",
    "https://example.org@127.0.0.1/", "https://user:password@example.org/", "https://@example.org/", "https://:@example.org/",
    "https://example.org:80@127.0.0.1/", "https://exam\\ple.org/", "https:\\\\127.0.0.1\\a", "https://example.org\\@127.0.0.1/",
    "https://exa\tmple.org/", "https://exa\nmple.org/", "https://exa\rmple.org/", " https://example.org/",
    "https://exa mple.org/",
    "https:/example.org/a.png", "https:example.org", "https://", "https:///a.png", "https://:443/", "https://?a", "https://#@a",
    "http://example.org/a.png", "HTTP://example.org/", "file:///etc/passwd", "FILE:///etc/passwd", "/etc/passwd", "etc/passwd",
    "ftp://example.org/a.png", "gopher://127.0.0.1:6379/_INFO", "javascript:alert(1)", "unix:/run/docker.sock",
    "//example.org/a.png", "blob:https://example.org/1", "s3://bucket/a.png", "about:blank", "https", "https://[", "https://]/",
    "https://[::1/", "https://example.org:99999/", "https://example.org:x/", "https://example.org:-1/", "x" * 10_000,
    "https://example.org/" + "x" * 10_000,
]  # fmt: skip


@pytest.mark.parametrize("url", URLS, ids=lambda url: ascii(url)[:60])
async def test_urls_that_are_not_fetched(url: str) -> None:
    names = Names("127.0.0.1")
    async with MediaFetcher(ServingOptions(), names) as fetcher:
        with pytest.raises(errors.InvalidRequest) as caught:
            await fetcher.load(url)
    assert caught.type is errors.InvalidRequest, "refused by its looks: neither resolved nor connected to"
    assert names.asked == []
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "url", ["https://localhost/", "https://localhost./", "https://metadata.google.internal/", "https://a/"]
)
@pytest.mark.parametrize(
    "addresses",
    [("127.0.0.1",), ("8.8.8.8", "10.0.0.1"), ("::1",), ("8.8.8.8", "fe80::1%2"), ("2606:4700::1111", "::ffff:10.0.0.1")],
)
async def test_names_with_an_address_that_is_not_public(url: str, addresses: tuple[str, ...]) -> None:
    async with fetching(*addresses) as fetcher:
        with pytest.raises(errors.InvalidRequest, match="not a public address") as caught:
            await fetcher.load(url)
    assert not any(address in str(caught.value) for address in addresses), "the caller does not learn the address"


async def test_real_names_of_this_machine_are_refused() -> None:
    async with fetching() as fetcher:
        with pytest.raises(errors.InvalidRequest, match="not a public address"):
            await fetcher.load("https://localhost:1/a.png")


async def test_names_whose_servers_never_answer_hold_up_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    silent, real = threading.Event(), socket.getaddrinfo

    def lookup(host: Any, *more: Any, **most: Any) -> Any:
        if host == "silent.example":
            silent.wait(30)
        return real("127.0.0.1", *more, **most)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    resolver, loop = ThreadedResolver(), asyncio.get_running_loop()
    waiting = [asyncio.create_task(resolver.resolve("silent.example", 80)) for _ in range(256)]
    try:
        await asyncio.sleep(0)
        with pytest.raises(OSError, match="too many pending DNS lookups"):
            await resolver.resolve("other.example", 80)
        for task in waiting[:200]:
            task.cancel()  # those that wait for a thread leave at once
        async with asyncio.timeout(10):
            assert await loop.getaddrinfo("worker.example", 80)
            assert await asyncio.to_thread(lambda: 5) == 5
    finally:
        silent.set()
    await asyncio.gather(*waiting, return_exceptions=True)
    (found,) = await resolver.resolve("other.example", 80)
    assert (found["host"], found["port"]) == ("127.0.0.1", 80)
    await resolver.close()


class Answers:
    """A session whose every answer is a redirect to the next of these."""

    def __init__(self, *locations: str) -> None:
        self.locations, self.got = list(locations), list[str]()

    @contextlib.asynccontextmanager
    async def get(self, url: Any, **_: Any) -> AsyncIterator[Any]:
        self.got.append(str(url))
        yield web.Response(status=302, headers={"Location": self.locations.pop(0)})

    async def close(self) -> None:
        pass


@pytest.mark.parametrize(
    "location",
    [
        "https://127.0.0.1/", "https://[::1]/", "http://example.org/", "//169.254.169.254/latest", "file:///etc/passwd",
        "https://2130706433/", "data:image/png;base64,AAAA", "https://a@example.org/", "gopher://example.org/",
    ],
)  # fmt: skip
async def test_a_redirect_leads_nowhere_else(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with fetching("8.8.8.8") as fetcher:
        session = Answers("https://example.com/b", location)
        await fetcher._session.close()
        monkeypatch.setattr(fetcher, "_session", session)
        with pytest.raises(errors.InvalidRequest) as caught:
            await fetcher.load("https://example.org/a")
    assert caught.type is errors.InvalidRequest
    assert session.got == ["https://example.org/a", "https://example.com/b"]


def redirects(location: str, status: int = 302) -> Handler:
    return respond_with(b"", status, Location=location)


async def fails(
    handler: Handler, error: type[Exception] = errors.ImageFetchFailed, says: str | None = None, **options: Any
) -> None:
    async with file_server(a=handler) as url, fetching(allow_private_images=True, **options) as fetcher:
        with pytest.raises(error, match=says) as caught:
            await fetcher.load(f"{url}/a?signature=secret#part")
    assert "secret" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("status", [201, 204, 206, 304, 400, 401, 403, 404, 410, 418, 429, 500, 502, 503])
async def test_an_answer_that_is_no_image(status: int) -> None:
    await fails(respond_with(b"" if status in (204, 304) else PNG, status), says=f"answered with status {status}")


async def test_a_page_in_place_of_an_image() -> None:
    await fails(respond_with(b"<html>not found</html>", Content_Type="image/png"), errors.InvalidImage)
    await fails(respond_with(b""), errors.InvalidImage, "0 bytes")


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "gzip, identity"])
async def test_compressed_bodies_are_not_unfolded(encoding: str) -> None:
    await fails(respond_with(gzip.compress(bytes(1 << 20)), Content_Encoding=encoding), says="compressed")


async def test_a_body_over_the_limit_is_not_read_to_its_end() -> None:
    await fails(respond_with(bytes(3000)), errors.ImageTooLarge, "exceeds 2000 bytes", max_image_bytes=2000)

    async def endless(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        while True:
            await answer.write(bytes(500))

    await fails(endless, errors.ImageTooLarge, max_image_bytes=2000)


async def test_servers_that_never_answer_or_never_end() -> None:
    async def trickling(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        while True:
            await answer.write(b"x")
            await asyncio.sleep(0.05)

    await fails(hang, says="did not send the file within 0.2 s", fetch_timeout=0.2)
    await fails(trickling, says="within 0.3 s", fetch_timeout=0.3)


async def test_the_limit_of_time_is_for_all_redirects_together() -> None:
    async def slow(_request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.2)
        return web.Response(status=302, headers={"Location": "/a"})

    await fails(slow, says="within 0.3 s", fetch_timeout=0.3)


async def test_a_connection_that_breaks() -> None:
    async def half(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Length": "1000"})
        await answer.prepare(request)
        await answer.write(b"x")
        assert request.transport is not None
        request.transport.close()
        return answer

    await fails(half, says="Cannot fetch .*: incomplete file")


async def test_nobody_listens_or_speaks_tls_or_http() -> None:
    async def silent(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with fetching(allow_private_images=True) as fetcher:
        for scheme, why in (("http", "invalid HTTP response"), ("https", "TLS handshake failed")):
            with pytest.raises(errors.ImageFetchFailed, match=f"Cannot fetch .*: .*{why}"):
                await fetcher.load(f"{scheme}://127.0.0.1:{port}/a")
        server.close()
        await server.wait_closed()
        with pytest.raises(errors.ImageFetchFailed, match="connection refused or timed out"):
            await fetcher.load(f"http://127.0.0.1:{port}/a")
        with pytest.raises(errors.ImageFetchFailed, match="host name not found"):
            await fetcher.load("http://no-such-name.invalid/a")
        with pytest.raises(errors.ImageFetchFailed, match="Cannot fetch"):
            await fetcher.load("http://" + "a" * 300 + ".invalid/\ud800")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_followed_but_not_for_ever(status: int) -> None:
    chain = {str(i): redirects(f"/{i + 1}", status) for i in range(4)}
    async with file_server(**chain, **{"4": respond_with(PNG)}) as url, fetching(allow_private_images=True) as fetcher:
        assert await fetcher.load(f"{url}/1") == PNG, "three"
        with pytest.raises(errors.ImageFetchFailed, match="redirects more than 3 times"):
            await fetcher.load(f"{url}/0")
    await fails(redirects("/a", status), says="more than 3 times")
    await fails(respond_with(b"", status), says="more than 3 times")


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://a/", "http://u@a/", "data:,", "http://[", "http://a:99999/"])
async def test_redirects_to_what_is_no_address_of_an_image(location: str) -> None:
    await fails(redirects(location), errors.InvalidRequest)


async def test_http_and_private_addresses_only_where_the_operator_allows_them() -> None:
    async with file_server(a=respond_with(PNG)) as url:
        async with fetching(allow_private_images=True) as fetcher:
            assert await fetcher.load(f"{url}/a") == PNG
            assert await fetcher.load(f"{url.replace('127.0.0.1', 'localhost')}/a?b=c#d") == PNG
        for closed in (f"{url}/a", f"{url.replace('http', 'https')}/a"):
            async with fetching() as fetcher:
                with pytest.raises(errors.InvalidRequest):
                    await fetcher.load(closed)


async def test_neither_cookies_nor_names_go_out() -> None:
    seen = []

    async def setting(request: web.Request) -> web.StreamResponse:
        seen.append(request.headers)
        return web.Response(body=PNG, headers={"Set-Cookie": "a=b"})

    async with file_server(a=setting) as url, fetching(allow_private_images=True) as fetcher:
        await fetcher.load(f"{url}/a")
        await fetcher.load(f"{url}/a")
    assert not [headers for headers in seen if {"Cookie", "Authorization", "Referer"} & set(headers)]
    assert {headers["Accept-Encoding"] for headers in seen} == {"identity"}


@pytest.mark.parametrize("kind", IMAGE_FORMATS)
def test_formats_that_are_served(kind: str) -> None:
    inspect_image(image_file(file_format=kind), 64)
    with pytest.raises(errors.ImageTooLarge, match="8 × 8 pixels; the maximum is 63"):
        inspect_image(image_file(file_format=kind), 63)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def saved(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, kind)
    return file.getvalue()


NO_IMAGES = {
    "one byte": b"\x89",
    "text": b"hello",
    "magic of PNG": b"\x89PNG\r\n\x1a\n",
    "magic of JPEG": b"\xff\xd8\xff",
    "magic of GIF": b"GIF89a",
    "magic of WebP": b"RIFF\xff\xff\xff\xffWEBP",
    "magic of BMP": b"BM",
    "damaged header": PNG[:20] + b"\0\0\0\0" + PNG[24:],
    "compressed text": png(8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(64 << 20)))),
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "PDF": b"%PDF-1.7\n",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "gzip": gzip.compress(PNG),
    "noise": random.Random(0).randbytes(10_000),
    **{kind: saved(kind) for kind in ("TIFF", "ICO", "PPM", "TGA", "PCX", "EPS", "PDF")},
}


@pytest.mark.parametrize("data", NO_IMAGES.values(), ids=NO_IMAGES)
def test_bytes_that_are_no_image_served_here(data: bytes) -> None:
    with pytest.raises(errors.InvalidImage, match=f"{len(data)} bytes"):
        inspect_image(data, 1 << 20)


def test_an_empty_file_is_no_image() -> None:
    with pytest.raises(errors.InvalidImage, match="0 bytes"):
        inspect_image(b"", 1)


@pytest.mark.parametrize(("width", "height"), [(65_535, 65_535), (20_000, 20_000), (2**31 - 1, 1), (1, 2**31 - 1)])
def test_a_header_that_claims_too_much_is_believed_and_refused(width: int, height: int) -> None:
    with pytest.raises(errors.ImageTooLarge):
        inspect_image(png(width, height), 64_000_000)


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_any_mode_will_do(mode: str) -> None:
    inspect_image(image_file(mode=mode), 64)


def test_damaged_files_raise_nothing_else() -> None:
    noise = random.Random(1)
    for kind in IMAGE_FORMATS:
        for _ in range(100):
            data = bytearray(image_file(file_format=kind))
            for _ in range(5):
                data[noise.randrange(len(data))] = noise.randrange(256)
            with contextlib.suppress(errors.InvalidImage, errors.ImageTooLarge):
                inspect_image(bytes(data[: noise.randrange(1, len(data) + 1)]), 64_000_000)
