"""URLs of images and videos: what is fetched is what was checked, and messages show no secret."""

import base64
import contextlib
import ipaddress
import re
from urllib.parse import quote_from_bytes, unquote_to_bytes, urlsplit

from hypothesis import example, given
from hypothesis import strategies as st

from common import errors
from server.media.data_urls import decode_data_url
from server.media.urls import is_public, join_url, parse_url, trim

_WORDS = [
    "https", "http", "ftp", "file", "data", "://", ":", "/", "//", "\\", "@", "?", "#", "%", "[", "]", "::1", "127.0.0.1",
    "0x7f.1", "2130706433", "localhost", "example.org", "8.8.8.8", "[2606:4700::1111]", "[::ffff:127.0.0.1]",
    "[fe80::1%25eth0]", "\u3002", "ｅ", "①", "xn--", "user:pw-hidden",
    ":443", ":99999", ":-1", " ", "\t", "\r\n", "\x00", "a" * 70,
    ".", "..", "%2e", "é", "\ud800",
]  # fmt: skip
URLS = st.lists(st.sampled_from(_WORDS) | st.text(max_size=4), max_size=12).map("".join)
LIMIT = 2000


def check_target(url: str, allow_private: bool = False) -> None:
    """Parse a URL; what is accepted is requested from the host that was checked, in printable characters."""
    try:
        target = parse_url(trim(url), ("https",), allow_private)
    except errors.InvalidRequest as error:
        assert len(str(error)) < 1200
        return
    sent = str(target)
    assert target.scheme == "https"
    assert target.user is None
    assert target.password is None
    assert re.fullmatch(r"[!-~]+", sent)
    assert target.raw_path.startswith("/")
    assert urlsplit(sent).hostname == (target.raw_host or "").lower(), "another parser sees another host"
    with contextlib.suppress(ValueError):
        assert allow_private or is_public(str(ipaddress.ip_address(target.host or "")))


@given(URLS | URLS.map("https://".__add__), st.booleans())
@example("https://8.8.8.8:0/", False)
@example("https://1.1.1.1", False)
def test_a_url_is_rejected_or_leads_where_it_was_checked(url: str, allow_private: bool) -> None:
    check_target(url, allow_private)


@given(URLS, URLS)
def test_a_redirect_is_checked_like_a_url(tail: str, location: str) -> None:
    try:
        base = parse_url(f"https://example.org/{tail}", ("https",), False)
        joined = join_url(base, location)
    except errors.InvalidRequest:
        return
    except ValueError:  # MediaFetcher reports it as ImageFetchFailed
        return
    check_target(joined)


@given(st.sampled_from(["https", "ftp", "", "http"]), st.text("abc:@/＠.?#% \\[]é", max_size=12), st.sampled_from("@＠"))
def test_a_message_has_no_password(scheme: str, rest: str, at: str) -> None:
    try:
        parse_url(f"{scheme}://user:hidden{at}{rest}", ("https",), False)
    except errors.InvalidRequest as error:
        assert "hidden" not in str(error)


@given(URLS | st.text("data:,;base64image/png+=%-_\n AZ09", max_size=60).map("data:;base64,".__add__))
def test_a_data_url_is_decoded_within_the_limit_or_rejected(url: str) -> None:
    try:
        data = decode_data_url(url, LIMIT)
    except (errors.InvalidImage, errors.ImageTooLarge) as error:
        assert len(str(error)) < 300
    else:
        assert len(data) <= LIMIT


@given(st.binary(max_size=LIMIT), st.booleans(), st.booleans(), st.booleans(), st.integers(1, 76))
def test_a_file_survives_every_spelling_of_its_data_url(
    data: bytes, url_safe: bool, padded: bool, escaped: bool, width: int
) -> None:
    text = (base64.urlsafe_b64encode if url_safe else base64.b64encode)(data)
    text = text if padded else text.rstrip(b"=")
    spelling = quote_from_bytes(text, safe="") if escaped else "\n".join(
        text[i : i + width].decode() for i in range(0, len(text), width)
    )  # fmt: skip
    assert decode_data_url(f"data:image/png;base64,{spelling}", LIMIT) == data


def decode_slowly(payload: str) -> bytes | None:
    """Decode base64 with Python's own module, as data: URLs are documented; None if it is invalid."""
    try:
        raw = unquote_to_bytes(payload)
        if re.search(rb"[\n\r ]", raw):
            raw = re.sub(rb"\s", b"", raw)
        raw = raw.replace(b"-", b"+").replace(b"_", b"/").rstrip(b"=")
        return base64.b64decode(raw + b"=" * (-len(raw) % 4), validate=True) if b"=" not in raw else None
    except ValueError:
        return None


_BASE64 = st.text(st.sampled_from("AQgwz09+/-_"), max_size=24) | st.binary(max_size=20).map(
    lambda data: base64.b64encode(data).decode()
)
_AROUND = st.text(st.sampled_from("A=\n\r\t %é\0\ud800"), max_size=3) | st.sampled_from(["=", "==", "===", "%3D", "%2B", "%0A"])


@given(st.lists(_BASE64 | _AROUND, max_size=4).map("".join))
@example("AA==AAAA")
@example("AAA=====")
@example("AB")
@example("A===")
def test_base64_is_decoded_as_by_python(payload: str) -> None:
    expected = decode_slowly(payload)
    try:
        assert decode_data_url(f"data:;base64,{payload}", LIMIT) == expected
    except errors.InvalidImage:
        assert expected is None
