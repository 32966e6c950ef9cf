"""Addresses and URLs from which images are not fetched, whether a request, a name or a redirect leads there."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from common import errors
from server.media.fetch import ThreadedResolver
from server.media.urls import is_public
from tests.server.media.helpers import StaticResolver, open_fetcher

PUBLIC = ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "2a00:1450:4001::1"]
NOT_PUBLIC = [
    "127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1",
    "169.254.169.254", "100.64.0.1", "192.0.0.1", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1",
    "239.1.1.1", "240.0.0.1", "255.255.255.255", "::", "::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1",
    "64:ff9b::7f00:1", "64:ff9b::8.8.8.8", "64:ff9b:1::1", "2002:7f00:1::", "2002:0808:0808::", "2001:0:7f00:1::",
    "2001:db8::1", "fc00::1", "fd12:3456::1", "fe80::1", "fe80::1%eth0", "2606:4700::1111%1", "fec0::1", "ff02::1", "100::1",
    "", "localhost", "127.1", "2130706433", "0x7f000001", "017700000001", "8.8.8.8.", "8.8.8.8/32",
]  # fmt: skip


def test_only_global_unicast_addresses_are_public() -> None:
    assert [address for address in PUBLIC if not is_public(address)] == []
    assert [address for address in NOT_PUBLIC if is_public(address)] == []


REJECTED_URLS = [
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
    "https://exa\tmple.org/", "https://exa\nmple.org/", "https://exa\rmple.org/",
    "https://exa mple.org/",
    "https:/example.org/a.png", "https:example.org", "https://", "https:///a.png", "https://:443/", "https://?a", "https://#@a",
    "http://example.org/a.png", "HTTP://example.org/", "file:///etc/passwd", "FILE:///etc/passwd", "/etc/passwd", "etc/passwd",
    "ftp://example.org/a.png", "gopher://127.0.0.1:6379/_INFO", "javascript:alert(1)", "unix:/run/docker.sock",
    "//example.org/a.png", "blob:https://example.org/1", "s3://bucket/a.png", "about:blank", "https", "https://[", "https://]/",
    "https://[::1/", "https://example.org:99999/", "https://example.org:x/", "https://example.org:-1/", "x" * 10_000,
    "https://example.org/" + "x" * 10_000,
]  # fmt: skip


@pytest.mark.parametrize("url", REJECTED_URLS, ids=lambda url: ascii(url)[:60])
async def test_invalid_and_private_urls_are_rejected_without_a_lookup(url: str) -> None:
    resolver = StaticResolver("127.0.0.1")
    async with open_fetcher(resolver) as fetcher:
        with pytest.raises(errors.InvalidRequest) as error_info:
            await fetcher.load(url)
    assert error_info.type is errors.InvalidRequest, "rejected by its text: neither resolved nor connected to"
    assert resolver.resolved_names == []
    assert len(str(error_info.value)) < 500


@pytest.mark.parametrize(
    "url", ["https://localhost/", "https://localhost./", "https://metadata.google.internal/", "https://a/"]
)
@pytest.mark.parametrize(
    "addresses",
    [("127.0.0.1",), ("8.8.8.8", "10.0.0.1"), ("::1",), ("8.8.8.8", "fe80::1%2"), ("2606:4700::1111", "::ffff:10.0.0.1")],
)
async def test_a_name_with_an_address_that_is_not_public_is_rejected(url: str, addresses: tuple[str, ...]) -> None:
    async with open_fetcher(StaticResolver(*addresses)) as fetcher:
        with pytest.raises(errors.InvalidRequest, match="not a public address") as error_info:
            await fetcher.load(url)
    assert not any(address in str(error_info.value) for address in addresses), "the caller does not learn the address"


async def test_names_of_this_machine_are_rejected() -> None:
    async with open_fetcher() as fetcher:
        with pytest.raises(errors.InvalidRequest, match="not a public address"):
            await fetcher.load("https://localhost:1/a.png")


async def test_lookups_that_hang_do_not_block_other_lookups(monkeypatch: pytest.MonkeyPatch) -> None:
    release, getaddrinfo = threading.Event(), socket.getaddrinfo

    def lookup(host: Any, *arguments: Any, **options: Any) -> Any:
        if host == "silent.example":
            release.wait(30)
        return getaddrinfo("127.0.0.1", *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    resolver, loop = ThreadedResolver(), asyncio.get_running_loop()
    waiting = [asyncio.create_task(resolver.resolve("silent.example", 80)) for _ in range(256)]
    try:
        await asyncio.sleep(0)
        with pytest.raises(OSError, match="too many pending DNS lookups"):
            await resolver.resolve("other.example", 80)
        for task in waiting[:200]:
            task.cancel()  # a lookup that waits for a thread is cancelled at once
        async with asyncio.timeout(10):
            assert await loop.getaddrinfo("worker.example", 80)
            assert await asyncio.to_thread(lambda: 5) == 5
    finally:
        release.set()
    await asyncio.gather(*waiting, return_exceptions=True)
    (result,) = await resolver.resolve("other.example", 80)
    assert (result["host"], result["port"]) == ("127.0.0.1", 80)
    await resolver.close()


class RedirectingSession:
    """A session that responds to each request with a redirect to the next location, and records the URLs."""

    def __init__(self, *locations: str) -> None:
        self.locations, self.requested_urls = list(locations), list[str]()

    @contextlib.asynccontextmanager
    async def get(self, url: Any, **_: Any) -> AsyncIterator[Any]:
        self.requested_urls.append(str(url))
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
async def test_a_redirect_to_a_private_or_invalid_url_is_rejected(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_fetcher(StaticResolver("8.8.8.8")) as fetcher:
        session = RedirectingSession("https://example.com/b", location)
        await fetcher._session.close()
        monkeypatch.setattr(fetcher, "_session", session)
        with pytest.raises(errors.InvalidRequest) as error_info:
            await fetcher.load("https://example.org/a")
    assert error_info.type is errors.InvalidRequest
    assert session.requested_urls == ["https://example.org/a", "https://example.com/b"]
