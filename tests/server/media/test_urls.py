"""URLs are requested byte for byte, and an invalid one is rejected with the character that is wrong."""

import asyncio

import pytest
from yarl import URL

from common import errors
from server.media.urls import join_url, parse_url, printable, trim
from tests.server.media.helpers import PNG, open_fetcher

SIGNED = "/a%2Fb%2fc%7e~!$&'()*+,;=:@%c3%A9/?X-Sig=a%2Bb+c%3d&d=%20&e=<\"^`{|}>&f[]=1&g=?/"


def parse(url: str, allow_private: bool = False) -> URL:
    return parse_url(url, ("https", "http") if allow_private else ("https",), allow_private)


@pytest.mark.parametrize(
    ("given", "requested"),
    [
        (SIGNED, SIGNED),
        ("/%7Ea/./b/../c//d", "/%7Ea/./b/../c//d"),
        ("", "/"),
        ("?a=b", "/?a=b"),
        ("/a#part", "/a"),
        ("/a?b#c?d", "/a?b"),
        ("/a b/c?d=e f", "/a%20b/c?d=e%20f"),
        ("/é?ü=😀", "/%C3%A9?%C3%BC=%F0%9F%98%80"),
        ("/100%", "/100%"),
        ("/a?", "/a?"),
    ],
)
def test_path_and_query_are_kept(given: str, requested: str) -> None:
    assert parse(f"https://example.org{given}").raw_path_qs == requested.removesuffix("?")
    assert str(parse(f"https://example.org{given}")).startswith(f"https://example.org{requested.removesuffix('?')}")


async def serve_raw(replies: list[bytes], requests: list[bytes]) -> asyncio.Server:
    """Starts a server that answers with these bytes in turn and records the first line of each request."""

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append((await reader.readuntil(b"\r\n\r\n")).splitlines()[0])
        writer.write(replies.pop(0))
        await writer.drain()
        writer.close()

    return await asyncio.start_server(respond, "127.0.0.1", 0)


async def test_the_request_line_has_the_bytes_of_the_url_and_of_a_redirect() -> None:
    moved = b"HTTP/1.1 302 Found\r\nLocation: %s\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    found = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(PNG), PNG)
    requests: list[bytes] = []
    target = b"/x%2fy%2F?s=%7e+%3d\xc3\xa9"
    replies: list[bytes] = []
    server = await serve_raw(replies, requests)
    origin = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    replies += [moved % target, moved % (origin.encode() + SIGNED.encode()), found]
    async with server, open_fetcher(allow_private_images=True) as fetcher:
        assert (await fetcher.load(f"  {origin}{SIGNED}#part\n")).data == PNG
    targets = [line.split(b" ")[1] for line in requests]
    assert targets == [SIGNED.encode(), b"/x%2fy%2F?s=%7e+%3d%C3%A9", SIGNED.encode()]


@pytest.mark.parametrize(
    ("host", "punycode"),
    [
        ("münchen.de", "xn--mnchen-3ya.de"),
        ("MÜNCHEN.DE", "xn--mnchen-3ya.de"),
        ("mu\u0308nchen.de:8443", "xn--mnchen-3ya.de:8443"),
        ("例え.テスト", "xn--r8jz45g.xn--zckzah"),
        ("faß.de", "xn--fa-hia.de"),
        ("EXAMPLE.org", "example.org"),
        ("a_b.example.org", "a_b.example.org"),
    ],
)
def test_international_hosts_become_punycode(host: str, punycode: str) -> None:
    assert str(parse(f"https://{host}/a%2f")) == f"https://{punycode}/a%2f"


INVALID: dict[str, tuple[str, str]] = {
    "backslash": ("https://example.org/a\\b", r"character 22 is '\\\\'; write %5C"),
    "backslash in the host": ("https://exam\\ple.org/", r"character 13 is '\\\\'"),
    "tab": ("https://example.org/a\tb", r"character 22 is '\\t'; control characters are not accepted"),
    "NUL": ("https://example.org/\0", r"character 21 is '\\x00'; control"),
    "delete": ("https://example.org/\x7f", r"character 21 is '\\x7f'; control"),
    "space in the host": ("https://exa mple.org/", "character 12 is ' '; a host name has no spaces"),
    "user name": ("https://me@example.org/", "character 11 is '@'; a user name or password is not accepted"),
    "escape in the host": ("https://example%2eorg/", "character 16 is '%'; a host name has no percent escapes"),
    "other character in the host": ("https://exa<mple.org/", "character 12 is '<'; a host name has letters"),
    "full-width digits": ("https://１２７.0.0.1/", "not a valid international host name .*U\\+FF11"),
    "ideographic dot": ("https://127。0。0。1/", "not a valid international host name .*U\\+3002"),
    "too long": ("https://example.org/" + "x" * 9000, "it has 9020 characters; the maximum is 8192"),
    "http": ("http://example.org/a", "expected https://… or data:image/…;base64,…"),
    "no host": ("https:///a", "it names no host"),
    "port": ("https://example.org:99999/", "not a host with an optional port"),
}


@pytest.mark.parametrize(("url", "message"), INVALID.values(), ids=INVALID)
def test_an_invalid_url_is_rejected_with_what_is_wrong(url: str, message: str) -> None:
    with pytest.raises(errors.InvalidRequest, match=message) as error_info:
        parse(url)
    assert len(str(error_info.value)) < 500


def test_white_space_around_a_url_is_ignored() -> None:
    assert trim(" \t\r\nhttps://example.org/a b\n ") == "https://example.org/a b"


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("/b%2f", "https://example.org/b%2f"),
        ("b?c=%7e", "https://example.org/p%2fq/b?c=%7e"),
        ("?x", "https://example.org/p%2fq/r?x"),
        ("//cdn.example/a%2F", "https://cdn.example/a%2F"),
        ("https://cdn.example/./a?", "https://cdn.example/./a?"),
        (" /b ", "https://example.org/b"),
        ("", "https://example.org/p%2fq/r?s=%2F"),
        ("javascript:alert(1)", "javascript:alert(1)"),
    ],
)
def test_a_location_is_joined_without_changing_its_escapes(location: str, expected: str) -> None:
    assert join_url(URL("https://example.org/p%2fq/r?s=%2F", encoded=True), location) == expected


@pytest.mark.parametrize("location", ["/a\tb", "https://example.org\\a", "\x01//a"])
def test_a_location_with_a_control_character_is_rejected(location: str) -> None:
    with pytest.raises(errors.InvalidRequest, match="character"):
        join_url(URL("https://example.org/"), location)


def test_a_url_is_printed_without_its_query() -> None:
    assert printable("https://example.org/a?signature=secret#b") == "'https://example.org/a'"
    assert len(printable("https://example.org/" + "x" * 1000)) == 202
