"""Which URLs may be fetched, and the exact bytes that are requested.

A URL is fetched as it was given: escapes are neither added nor removed nor changed, since a signature may cover them. Only
characters that no request line may contain are escaped: spaces, and those outside ASCII.
"""

import ipaddress
import re
import unicodedata
from collections.abc import Collection
from urllib.parse import quote, urljoin

import idna
from yarl import URL

from common import errors, secrets

_MAX_URL_LENGTH = 8192
_SURROUNDING = " \t\r\n"
"""Characters around a URL that are ignored: callers read URLs from files and tables."""
_PUBLIC_V6 = ipaddress.ip_network("2000::/3")  # all assigned global unicast; excludes NAT64 and IPv4-mapped addresses
_NUMBER = re.compile(r"\d+|0x[0-9a-f]*", re.IGNORECASE)
_NOT_IN_URL = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udc7f\udd00-\udfff]")
"""Control characters, backslashes, and surrogates other than those that stand for bytes of a header which are not UTF-8."""
_NOT_IN_HOST = re.compile(r"[^A-Za-z0-9._:\[\]\x80-\U0010ffff-]")
_TO_ESCAPE = re.compile(r"[^!-~]+")
_AUTHORITY_END = re.compile(r"[/?#\\]")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_CONTROL_HINT = "control characters are not accepted"
_HINTS = {
    "@": "a user name or password is not accepted",
    "%": "a host name has no percent escapes",
    " ": "a host name has no spaces",
    "\\": "write %5C, or / for a separator",
    "\x7f": _CONTROL_HINT,
}


def trim(url: str) -> str:
    """Return a URL without the white space around it."""
    return url.strip(_SURROUNDING)


def parse_url(url: str, schemes: Collection[str], allow_private: bool, shown: str = "") -> URL:
    """Parse the URL of an image or video. Path and query are kept byte for byte; a host name in Unicode becomes punycode.

    Args:
        url: The URL, trimmed.
        schemes: Accepted schemes.
        allow_private: Whether the host may be an address that is not public.
        shown: What messages show of the URL; by default `printable(url)`.

    Raises:
        InvalidRequest: The URL is malformed, or may not be fetched. A bad character is named with its position.
    """
    scheme, separator, rest = url.partition("://")
    shown = shown or printable(url)
    if len(url) > _MAX_URL_LENGTH:
        raise _invalid(shown, f"it has {len(url)} characters; the maximum is {_MAX_URL_LENGTH}")
    if not separator or scheme.lower() not in schemes:
        expected = " or ".join(f"{name}://…" for name in schemes)
        raise _invalid(shown, f"expected {expected} or data:image/…;base64,…")
    if match := _NOT_IN_URL.search(url):
        raise _bad_character(shown, url, match.start())
    authority, target = _split_authority(rest)
    origin = _parse_origin(shown, url, scheme, authority)
    host = origin.host or ""
    if not allow_private and _is_literal(host) and not is_public(host):
        raise not_public(host)
    # yarl would normalise the escapes of path and query
    return URL(f"{origin.scheme}://{origin.raw_authority}{_escape(target)}", encoded=True)


def join_url(base: URL, location: str) -> str:
    """Return the URL that a redirect's `Location` names; an absolute one is returned as it is."""
    location = trim(location)
    if match := _NOT_IN_URL.search(location):  # urljoin would drop some of these
        raise _bad_character(origin_of(location), location, match.start())
    return location if _SCHEME.match(location) else urljoin(str(base), location)


def is_public(address: str) -> bool:
    """Return whether an address is public; one that embeds another (IPv4-mapped, 6to4, NAT64, …) is not."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address) and (
        parsed.scope_id or parsed not in _PUBLIC_V6 or parsed.sixtofour or parsed.teredo
    ):
        return False
    return parsed.is_global and not parsed.is_multicast


def not_public(host: str) -> errors.InvalidRequest:
    """Return the error for a host that is not public or whose name leads to such an address."""
    return errors.InvalidRequest(f"Images are not fetched from {host[:200]!r}: not a public address (--allow-private-images).")


def printable(url: str) -> str:
    """Return a URL for a message: without credentials and query, which may contain a signature, cut to 200 characters."""
    return repr(secrets.redact_url(url.split("?")[0].split("#")[0])[:200])


def origin_of(url: str) -> str:
    """Return scheme and host of a URL for a message: the rest of a redirect's target may be a password or a signature."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return repr(url.partition(":")[0][:20] + ":" if _SCHEME.match(url) else "")
    host = _AUTHORITY_END.split(rest, maxsplit=1)[0].rpartition("@")[2]
    return repr(f"{scheme[:20]}://{host[:200]}")


def _split_authority(rest: str) -> tuple[str, str]:
    """Split what follows `://` into the authority and the target of the request, which has no fragment."""
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    target = rest[len(authority) :].partition("#")[0]
    return authority, target if target.startswith("/") else f"/{target}"


def _parse_origin(shown: str, url: str, scheme: str, authority: str) -> URL:
    """Return scheme, host and port as a URL. Parsers of URLs disagree about much of what is rejected here."""
    if match := _NOT_IN_HOST.search(authority):
        raise _bad_character(shown, url, len(scheme) + len("://") + match.start())
    if not authority.isascii():
        host, colon, port = authority.partition(":")
        authority = f"{_punycode(shown, host)}{colon}{port}"
    try:
        origin = URL(f"{scheme}://{authority}")
        host, _ = origin.host or "", origin.port
    except ValueError:
        host = secrets.redact_url(f"//{authority}")[2:202]
        raise _invalid(shown, f"{host!r} is not a host with an optional port") from None
    if not host:
        raise _invalid(shown, "it names no host")
    return origin


def _punycode(shown: str, host: str) -> str:
    """Return an internationalised host name in ASCII. Look-alikes of digits and dots are not letters, and rejected."""
    try:
        # strict: only "." separates labels
        return idna.encode(unicodedata.normalize("NFC", host).lower(), strict=True).decode("ascii")
    except UnicodeError as error:  # also idna's own errors
        raise _invalid(shown, f"{host[:100]!r} is not a valid international host name ({str(error)[:200]})") from None


def _is_literal(host: str) -> bool:
    """Return whether a host is an address; getaddrinfo also accepts 2130706433, 0x7f.1 and 127.1 as addresses."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return bool(_NUMBER.fullmatch(host.rstrip(".").rpartition(".")[2]))
    return True


def _escape(target: str) -> str:
    """Escape spaces and characters outside ASCII, as UTF-8; bytes of a header that were not UTF-8 keep their value."""
    return _TO_ESCAPE.sub(lambda match: quote(match[0].encode("utf-8", "surrogateescape"), safe=""), target)


def _invalid(shown: str, reason: str) -> errors.InvalidRequest:
    return errors.InvalidRequest(f"The URL {shown} cannot be fetched: {reason}.")


def _bad_character(shown: str, url: str, position: int) -> errors.InvalidRequest:
    character = url[position]
    hint = _HINTS.get(character, "a host name has letters, digits, hyphens and dots" if character > " " else _CONTROL_HINT)
    return _invalid(shown, f"character {position + 1} is {character!r}; {hint}")
