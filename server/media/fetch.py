"""URLs of images and videos to bytes: `data:` decoded, https fetched, an image's header looked at. Nothing becomes pixels.

An address is checked when the connection is made, not when the name is first looked up, so a name that changes its address
in between gains nothing.
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

_VIDEOS = 2
"""Videos that are decoded at once."""
_LOOKUPS = 32
"""Names that are looked up at once."""
_NAMES = 256
"""Names that are looked up, or wait for it, at most."""
_PIECE = 1 << 18
"""Characters of base64 that are decoded at once, holding the interpreter: a millisecond's. A multiple of four."""
_MAX_REDIRECTS = 3
_MAX_URL = 8192
_REDIRECTS = (301, 302, 303, 307, 308)
_PUBLIC_V6 = ipaddress.ip_network("2000::/3")  # all that is assigned; NAT64 and IPv4-mapped addresses lie outside
_NUMBER = re.compile(r"\d+|0x[0-9a-f]*", re.IGNORECASE)

Image.MAX_IMAGE_PIXELS = None  # Pillow's guard warns from half of its limit on; ours is checked from the header


class ThreadsResolver(AbstractResolver):
    """The system's, in threads of its own: a name whose server never answers holds a thread until the system gives up.

    In those that the event loop uses itself a few such names would keep everybody from finding anything. Raises `OSError`.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_LOOKUPS, "names")
        self._room = threading.Semaphore(_NAMES)

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        if not self._room.acquire(blocking=False):
            raise OSError("too many names wait to be looked up; try again")
        ask = functools.partial(socket.getaddrinfo, host, port, family, socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
        looking = self._threads.submit(ask)
        looking.add_done_callback(lambda _: self._room.release())  # also when nobody waits for it any more
        numeric = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
        return [
            ResolveResult(hostname=host, host=str(address[0]), port=int(address[1]), family=kind, proto=proto, flags=numeric)
            for kind, _, proto, _, address in await asyncio.wrap_future(looking)
        ]

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class PublicResolver(AbstractResolver):
    """Resolves names, and refuses those with an address that is not public."""

    def __init__(self, resolver: AbstractResolver) -> None:
        self._resolver = resolver

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        found = await self._resolver.resolve(host, port, family)
        if not found or not all(is_public(entry["host"]) for entry in found):
            raise _private(host)
        return found

    async def close(self) -> None:
        await self._resolver.close()


def is_public(address: str) -> bool:
    """Whether the address is on the public Internet; one that wraps another (IPv4-mapped, 6to4, NAT64, …) is not."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address) and (
        parsed.scope_id or parsed not in _PUBLIC_V6 or parsed.sixtofour or parsed.teredo
    ):
        return False
    return parsed.is_global and not parsed.is_multicast


class Fetcher:
    """Fetches images and videos. Make it inside the event loop; `close` it."""

    def __init__(self, options: ServingOptions, resolver: AbstractResolver | None = None) -> None:
        self._options = options
        # not the loop's own threads: a few long videos would hold up everybody's images
        self._videos = ThreadPoolExecutor(_VIDEOS, "video")
        plain = resolver or ThreadsResolver()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(resolver=plain if options.allow_private_images else PublicResolver(plain)),
            timeout=aiohttp.ClientTimeout(total=None),
            # a compressed body could unfold to anything; images are compressed already
            headers={"Accept-Encoding": "identity", "User-Agent": "dvd-serve"},
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(self) -> None:
        await self._session.close()
        self._videos.shutdown(wait=False, cancel_futures=True)

    async def load(self, url: str) -> bytes:
        """The bytes of one image part's URL. Raises `InvalidImage`, `ImageTooLarge`, `ImageFetchFailed`."""
        data = await self._load(url, self._options.max_image_bytes)
        await asyncio.to_thread(inspect, data, self._options.max_image_pixels)
        return data

    async def load_frames(self, url: str, count: int) -> list[bytes]:
        """`count` frames of a video, or fewer, as files. Raises `InvalidVideo`, `DeadlineExceeded`, and what `load` raises."""
        data, options = await self._load(url, self._options.max_video_bytes), self._options
        work = functools.partial(video.frames, data, count, options.max_image_pixels, options.fetch_timeout)
        return await asyncio.get_running_loop().run_in_executor(self._videos, work)

    async def _load(self, url: str, limit: int) -> bytes:
        if url[:5].lower() != "data:":
            data = await self._fetch(url, limit)
        elif len(url) < _PIECE:
            data = _inline(url, limit)
        else:
            data = await asyncio.to_thread(_inline, url, limit)
        if len(data) > limit:
            raise _too_large(limit)
        return data

    async def _fetch(self, url: str, limit: int) -> bytes:
        target = self._checked(url)
        try:
            async with asyncio.timeout(self._options.fetch_timeout):
                for _ in range(_MAX_REDIRECTS + 1):
                    async with self._session.get(target, allow_redirects=False) as answer:
                        if answer.status not in _REDIRECTS:
                            return await _body(answer, limit)
                        target = self._checked(str(target.join(URL(answer.headers.get("Location", "")))))
        except TimeoutError:
            raise errors.ImageFetchFailed(f"no file from {_shown(url)} within {self._options.fetch_timeout:g} s") from None
        except (aiohttp.ClientError, ValueError, OSError) as error:
            raise errors.ImageFetchFailed(f"cannot fetch {_shown(url)}: {_reason(error)}") from None
        raise errors.ImageFetchFailed(f"{_shown(url)} redirects more than {_MAX_REDIRECTS} times")

    def _checked(self, url: str) -> URL:
        schemes = ("https", "http") if self._options.allow_private_images else ("https",)
        try:
            parsed = URL(url)
            host = parsed.host
        except ValueError:
            raise errors.InvalidRequest(f"{_shown(url)} is not a URL") from None
        if parsed.scheme not in schemes or not host:
            raise errors.InvalidRequest(f"image URL {_shown(url)}: expected {' or '.join(schemes)}, or data:image/…;base64,…")
        # what readers of URLs disagree about is not read at all: user names, escapes, other scripts' dots
        authority = re.split(r"[/?#]", url.partition("//")[2])[0]
        if len(url) > _MAX_URL or any(c in url for c in "\\\t\r\n ") or not authority.isascii() or set(authority) & set("@%"):
            raise errors.InvalidRequest(f"image URL {_shown(url)} must be short and name a plain host")
        if not self._options.allow_private_images and _is_literal(host) and not is_public(host):
            raise _private(host)
        return parsed


def _inline(url: str, limit: int) -> bytes:
    head, comma, payload = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise errors.InvalidImage("a data: URL must read data:image/png;base64,… with the file in base64")
    if len(payload) // 4 * 3 > limit + 3:
        raise _too_large(limit)
    return _from_base64(payload)


async def _body(answer: aiohttp.ClientResponse, limit: int) -> bytes:
    if answer.status != 200:
        raise errors.ImageFetchFailed(f"{_shown(str(answer.url))} answered {answer.status}")
    if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise errors.ImageFetchFailed(f"{_shown(str(answer.url))} sent a compressed body that was not asked for")
    body = bytearray()
    async for chunk in answer.content.iter_any():
        body += chunk
        if len(body) > limit:
            raise _too_large(limit)
    return bytes(body)


def _too_large(limit: int) -> errors.ImageTooLarge:
    return errors.ImageTooLarge(f"an image or video has more than {limit} bytes: shrink it")


def _from_base64(payload: str) -> bytes:
    """Strict but for what clients really send: percent-escapes, line breaks, the URL-safe alphabet, missing padding."""
    raw = unquote_to_bytes(payload) if "%" in payload else payload.encode("utf-8", "replace")
    if b"\n" in raw or b"\r" in raw or b" " in raw:
        raw = b"".join(raw.split())
    raw = raw.rstrip(b"=")
    altchars = b"-_" if b"-" in raw or b"_" in raw else None
    try:
        if b"=" in raw:
            raise binascii.Error  # padding where a piece may end
        pieces = (raw[at : at + _PIECE] for at in range(0, len(raw), _PIECE))  # between two the interpreter may turn to others
        return b"".join(base64.b64decode(piece + b"=" * (-len(piece) % 4), altchars, validate=True) for piece in pieces)
    except binascii.Error:
        raise errors.InvalidImage(f"a data: URL of {len(payload)} characters is not valid base64") from None


def inspect(data: bytes, max_pixels: int) -> tuple[int, int]:
    """Width and height in pixels, by the file's header alone. Raises `InvalidImage` or `ImageTooLarge`."""
    if not data:
        raise errors.InvalidImage("the image is empty: 0 bytes")
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            width, height = image.size
    except Exception:  # Pillow's parsers raise whatever damaged bytes lead them to
        known = ", ".join(IMAGE_FORMATS)
        raise errors.InvalidImage(f"{len(data)} bytes that are not an image in a format served here: {known}") from None
    if width * height > max_pixels:
        raise errors.ImageTooLarge(f"image of {width} × {height} pixels; at most {max_pixels} are accepted: shrink it")
    if width * height == 0:
        raise errors.InvalidImage(f"image of {width} × {height} pixels")
    return width, height


def _is_literal(host: str) -> bool:
    """Whether a host is an address; 2130706433, 0x7f.1 and 127.1 are names to us and addresses to getaddrinfo."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return bool(_NUMBER.fullmatch(host.rstrip(".").rpartition(".")[2]))
    return True


def _private(host: str) -> errors.InvalidRequest:
    return errors.InvalidRequest(f"images are not fetched from {host[:200]!r}: not a public address")


def _shown(url: str) -> str:
    """A URL as a message may show it: no query (it may hold a signature), not endless."""
    return repr(url.split("?")[0].split("#")[0][:200])


_REASONS: tuple[tuple[type[Exception], str], ...] = (  # the first that fits; aiohttp's own words name addresses
    (aiohttp.ClientConnectorDNSError, "no such host name"),
    (aiohttp.ClientConnectorCertificateError, "its certificate is not valid"),
    (aiohttp.ClientSSLError, "it does not speak TLS"),
    (aiohttp.ClientConnectorError, "nothing answers at that address"),
    (aiohttp.ServerDisconnectedError, "the connection was closed"),
    (aiohttp.ClientPayloadError, "the file ended early"),
    (aiohttp.ClientResponseError, "what answers is no HTTP server"),
    (aiohttp.InvalidURL, "not a valid URL"),
)


def _reason(error: Exception) -> str:
    return next((said for kind, said in _REASONS if isinstance(error, kind)), "the connection failed")
