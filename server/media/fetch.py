"""Fetching of images and videos: `data:` URLs are decoded, https URLs fetched, headers of images inspected.

Addresses are checked when the connection is made, so that a name which changes its address after a lookup gains nothing (DNS
rebinding). No image is decoded to pixels here.
"""

import asyncio
import base64
import binascii
import functools
import io
import ipaddress
import re
import socket
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import unquote_to_bytes

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from PIL import Image
from yarl import URL

from common import errors
from common.options import IMAGE_FORMATS
from server.config import ServingOptions
from server.media import video

_VIDEO_THREADS = 2
_LOOKUP_THREADS = 32
_MAX_PENDING_LOOKUPS = 256
_BASE64_PIECE = 1 << 18
"""Characters of base64 decoded at once, which holds the GIL for about a millisecond. A multiple of four."""
_MAX_REDIRECTS = 3
_MAX_URL_LENGTH = 8192
_REDIRECT_STATUSES = (301, 302, 303, 307, 308)
_PUBLIC_V6 = ipaddress.ip_network("2000::/3")  # all assigned global unicast; excludes NAT64 and IPv4-mapped addresses
_NUMBER = re.compile(r"\d+|0x[0-9a-f]*", re.IGNORECASE)

Image.MAX_IMAGE_PIXELS = None  # Pillow only warns up to twice its limit; ours is checked from the header


class ThreadedResolver(AbstractResolver):
    """The system's resolver in threads of its own.

    A lookup whose name server never answers occupies a thread until the system gives up; in the event loop's own threads a few
    such names would block all lookups.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_LOOKUP_THREADS, "lookup")
        self._slots = threading.Semaphore(_MAX_PENDING_LOOKUPS)

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        """Resolve a name. Raises `OSError` if it does not resolve or too many lookups are pending."""
        if not self._slots.acquire(blocking=False):
            raise OSError("too many pending DNS lookups; retry later")
        lookup = functools.partial(socket.getaddrinfo, host, port, family, socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
        future = self._threads.submit(lookup)
        future.add_done_callback(lambda _: self._slots.release())  # also if the caller has been cancelled
        numeric = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
        return [
            ResolveResult(hostname=host, host=str(address[0]), port=int(address[1]), family=kind, proto=proto, flags=numeric)
            for kind, _, proto, _, address in await asyncio.wrap_future(future)
        ]

    async def close(self) -> None:
        """Cancel pending lookups."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class PublicResolver(AbstractResolver):
    """Resolves names, and raises `InvalidRequest` for those with an address that is not public."""

    def __init__(self, resolver: AbstractResolver) -> None:
        self._resolver = resolver

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        """Resolve a name. Raises `InvalidRequest` if one of its addresses is not public, `OSError` if it does not resolve."""
        results = await self._resolver.resolve(host, port, family)
        if not results or not all(is_public(result["host"]) for result in results):
            raise _not_public(host)
        return results

    async def close(self) -> None:
        """Close the inner resolver."""
        await self._resolver.close()


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


class MediaFetcher:
    """Fetches images and videos. `async with MediaFetcher(options) as fetcher`."""

    def __init__(self, options: ServingOptions, resolver: AbstractResolver | None = None) -> None:
        self._options = options
        # not the event loop's own threads: a few long videos would delay the images of all requests
        self._video_threads = ThreadPoolExecutor(_VIDEO_THREADS, "video")
        self._resolver = resolver
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> "MediaFetcher":
        resolver = self._resolver or ThreadedResolver()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                resolver=resolver if self._options.allow_private_images else PublicResolver(resolver)
            ),
            timeout=aiohttp.ClientTimeout(total=None),
            # a compressed body could expand without bound, and images are compressed already
            headers={"Accept-Encoding": "identity", "User-Agent": "dvd-serve"},
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()
        self._video_threads.shutdown(wait=False, cancel_futures=True)

    async def load(self, url: str) -> bytes:
        """Load an image file. Raises `InvalidRequest`, `InvalidImage`, `ImageTooLarge`, `ImageFetchFailed`."""
        data = await self._load(url, self._options.max_image_bytes)
        await asyncio.to_thread(inspect_image, data, self._options.max_image_pixels)
        return data

    async def load_frames(self, url: str, count: int) -> list[bytes]:
        """Load at most `count` frames of a video, as PNG files.

        Raises:
            InvalidVideo: The file cannot be decoded.
            DeadlineExceeded: Decoding took longer than `--fetch-timeout`.
            InvalidRequest, ImageTooLarge, ImageFetchFailed: As for `load`.
        """
        data, options = await self._load(url, self._options.max_video_bytes), self._options
        work = functools.partial(video.sample_frames, data, count, options.max_image_pixels, options.fetch_timeout)
        return await asyncio.get_running_loop().run_in_executor(self._video_threads, work)

    async def _load(self, url: str, limit: int) -> bytes:
        if url[:5].lower() != "data:":
            data = await self._fetch(url, limit)
        elif len(url) < _BASE64_PIECE:
            data = _decode_data_url(url, limit)
        else:
            data = await asyncio.to_thread(_decode_data_url, url, limit)
        if len(data) > limit:
            raise _too_large(limit)
        return data

    async def _fetch(self, url: str, limit: int) -> bytes:
        target = self._check_url(url)
        try:
            async with asyncio.timeout(self._options.fetch_timeout):
                for _ in range(_MAX_REDIRECTS + 1):
                    async with self._session.get(target, allow_redirects=False) as response:
                        if response.status not in _REDIRECT_STATUSES:
                            return await _read_body(response, limit)
                        target = self._check_url(str(target.join(URL(response.headers.get("Location", "")))))
        except TimeoutError:
            raise errors.ImageFetchFailed(
                f"{_printable(url)} did not send the file within {self._options.fetch_timeout:g} s (--fetch-timeout)."
            ) from None
        except (aiohttp.ClientError, ValueError, OSError) as error:
            raise errors.ImageFetchFailed(f"Cannot fetch {_printable(url)}: {_reason(error)}.") from None
        raise errors.ImageFetchFailed(f"{_printable(url)} redirects more than {_MAX_REDIRECTS} times.")

    def _check_url(self, url: str) -> URL:
        schemes = ("https", "http") if self._options.allow_private_images else ("https",)
        try:
            parsed = URL(url)
            host = parsed.host
        except ValueError:
            raise errors.InvalidRequest(f"{_printable(url)} is not a URL.") from None
        if parsed.scheme not in schemes or not host:
            raise errors.InvalidRequest(
                f"Image URL {_printable(url)}: expected {' or '.join(schemes)}, or data:image/…;base64,…"
            )
        # parsers of URLs disagree about these, so they are rejected: user names, escapes, dots of other scripts
        authority = re.split(r"[/?#]", url.partition("//")[2])[0]
        if (
            len(url) > _MAX_URL_LENGTH
            or any(c in url for c in "\\\t\r\n ")
            or not authority.isascii()
            or set(authority) & set("@%")
        ):
            raise errors.InvalidRequest(
                f"Image URL {_printable(url)} must have a plain host, no spaces or backslashes, and at most "
                f"{_MAX_URL_LENGTH} characters."
            )
        if not self._options.allow_private_images and _is_literal(host) and not is_public(host):
            raise _not_public(host)
        return parsed


def _decode_data_url(url: str, limit: int) -> bytes:
    head, comma, payload = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise errors.InvalidImage("A data: URL must have the form data:image/png;base64,… with the file in base64.")
    if len(payload) // 4 * 3 > limit + 3:
        raise _too_large(limit)
    return _decode_base64(payload)


async def _read_body(response: aiohttp.ClientResponse, limit: int) -> bytes:
    if response.status != 200:
        raise errors.ImageFetchFailed(f"{_printable(str(response.url))} answered with status {response.status}.")
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise errors.ImageFetchFailed(f"{_printable(str(response.url))} sent a compressed body, which was not requested.")
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > limit:
            raise _too_large(limit)
    return bytes(body)


def _too_large(limit: int) -> errors.ImageTooLarge:
    return errors.ImageTooLarge(f"An image or video exceeds {limit} bytes: send a smaller one.")


def _decode_base64(payload: str) -> bytes:
    """Decode base64 strictly, except for what clients send: percent-escapes, line breaks, the URL-safe alphabet, no padding."""
    raw = unquote_to_bytes(payload) if "%" in payload else payload.encode("utf-8", "replace")
    if b"\n" in raw or b"\r" in raw or b" " in raw:
        raw = b"".join(raw.split())
    raw = raw.rstrip(b"=")
    altchars = b"-_" if b"-" in raw or b"_" in raw else None
    try:
        if b"=" in raw:
            raise binascii.Error  # padding inside the data
        # in pieces, so that other threads run in between
        pieces = (raw[start : start + _BASE64_PIECE] for start in range(0, len(raw), _BASE64_PIECE))
        return b"".join(base64.b64decode(piece + b"=" * (-len(piece) % 4), altchars, validate=True) for piece in pieces)
    except binascii.Error:
        raise errors.InvalidImage(f"A data: URL of {len(payload)} characters is not valid base64.") from None


def inspect_image(data: bytes, max_pixels: int) -> tuple[int, int]:
    """Return width and height in pixels, from the file's header. Raises `InvalidImage` or `ImageTooLarge`."""
    if not data:
        raise errors.InvalidImage("The image is empty (0 bytes).")
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            width, height = image.size
    except Exception:  # Pillow's parsers raise all kinds of errors on damaged files
        known = ", ".join(IMAGE_FORMATS)
        raise errors.InvalidImage(f"The file ({len(data)} bytes) is not an image in a supported format: {known}.") from None
    if width * height > max_pixels:
        raise errors.ImageTooLarge(
            f"The image has {width} × {height} pixels; the maximum is {max_pixels} (--max-image-pixels)."
        )
    if width * height == 0:
        raise errors.InvalidImage(f"The image has {width} × {height} pixels.")
    return width, height


def _is_literal(host: str) -> bool:
    """Return whether a host is an address; getaddrinfo also accepts 2130706433, 0x7f.1 and 127.1 as addresses."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return bool(_NUMBER.fullmatch(host.rstrip(".").rpartition(".")[2]))
    return True


def _not_public(host: str) -> errors.InvalidRequest:
    return errors.InvalidRequest(f"Images are not fetched from {host[:200]!r}: not a public address (--allow-private-images).")


def _printable(url: str) -> str:
    """Return a URL for a message: without query, which may contain a signature, and cut to 200 characters."""
    return repr(url.split("?")[0].split("#")[0][:200])


_REASONS: tuple[tuple[type[Exception], str], ...] = (  # the first match wins; aiohttp's own texts name addresses
    (aiohttp.ClientConnectorDNSError, "host name not found"),
    (aiohttp.ClientConnectorCertificateError, "invalid TLS certificate"),
    (aiohttp.ClientSSLError, "TLS handshake failed"),
    (aiohttp.ClientConnectorError, "connection refused or timed out"),
    (aiohttp.ServerDisconnectedError, "connection closed"),
    (aiohttp.ClientPayloadError, "incomplete file"),
    (aiohttp.ClientResponseError, "invalid HTTP response"),
    (aiohttp.InvalidURL, "invalid URL"),
)


def _reason(error: Exception) -> str:
    return next((reason for kind, reason in _REASONS if isinstance(error, kind)), "connection failed")
