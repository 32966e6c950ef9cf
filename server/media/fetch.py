"""Fetching of images and videos: `data:` URLs are decoded, https URLs fetched, files of images examined.

`urls.py` decides which URLs may be fetched.
Addresses are checked when the connection is made, so that a name which changes its address after a lookup gains nothing (DNS
rebinding). No image is decoded to pixels here.
"""

import asyncio
import functools
import importlib.metadata
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from common import errors
from server.config import ServingOptions
from server.media.data_urls import decode_data_url, too_large
from server.media.image_file import ImageFile, examine
from server.media.urls import is_public, join_url, not_public, origin_of, parse_url, printable, trim
from server.media.video_decoder import VideoDecoder
from server.request_context import unbounded

_LOOKUP_THREADS = 32
_MAX_PENDING_LOOKUPS = 256
_MAX_REDIRECTS = 3
_REDIRECT_STATUSES = (301, 302, 303, 307, 308)


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
            raise not_public(host)
        return results

    async def close(self) -> None:
        """Close the inner resolver."""
        await self._resolver.close()


class MediaFetcher:
    """Fetches images and videos. `async with MediaFetcher(options, videos) as fetcher`."""

    def __init__(self, options: ServingOptions, videos: VideoDecoder, resolver: AbstractResolver | None = None) -> None:
        self._options, self._videos = options, videos
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
            headers={"Accept-Encoding": "identity", "User-Agent": self._options.fetch_user_agent or default_user_agent()},
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def load(self, url: str, reserve: Callable[[int], None] = unbounded, among: int = 1) -> ImageFile:
        """Load an image file.

        Args:
            url: Its URL.
            reserve: Reserves memory for the bytes that are fetched, as they arrive.
            among: Number of images that are loaded at once.

        Raises:
            InvalidRequest, InvalidImage, ImageTooLarge, ImageFetchFailed: The image cannot be loaded.
            Overloaded: The memory is not left.
        """
        url, limit, max_pixels = trim(url), self._options.max_image_bytes, self._options.max_image_pixels
        if _is_data_url(url):
            return await examine(among * len(url), lambda: ImageFile.examine(decode_data_url(url, limit), max_pixels))
        data = await self._fetch(url, limit, reserve)
        return await examine(among * len(data), lambda: ImageFile.examine(data, max_pixels))

    async def load_frames(self, url: str, count: int, reserve: Callable[[int], None] = unbounded) -> list[ImageFile]:
        """Load at most `count` frames of a video, as PNG files.

        Raises:
            InvalidVideo: The file cannot be decoded, or exceeds a limit of CPU time or memory.
            InvalidRequest, ImageTooLarge, ImageFetchFailed, Overloaded: As for `load`.
        """
        url, limit, max_pixels = trim(url), self._options.max_video_bytes, self._options.max_image_pixels
        if _is_data_url(url):
            video = await examine(len(url), lambda: decode_data_url(url, limit))
        else:
            video = await self._fetch(url, limit, reserve)
        frames = await self._videos.sample_frames(video, count)
        size = sum(map(len, frames))
        reserve(size)
        return await examine(size, lambda: [ImageFile.examine(frame, max_pixels) for frame in frames])

    async def _fetch(self, url: str, limit: int, reserve: Callable[[int], None]) -> bytes:
        try:
            target = self._parse_url(url)
            async with asyncio.timeout(self._options.fetch_timeout):
                for _ in range(_MAX_REDIRECTS + 1):
                    async with self._session.get(target, allow_redirects=False) as response:
                        if response.status not in _REDIRECT_STATUSES:
                            return await _read_body(response, limit, url, reserve)
                        target = self._redirect(url, target, response.headers.get("Location", ""))
        except TimeoutError:
            raise errors.ImageFetchFailed(
                f"{printable(url)} did not send the file within {self._options.fetch_timeout:g} s (--fetch-timeout)."
            ) from None
        except (aiohttp.ClientError, ValueError, OSError) as error:
            raise errors.ImageFetchFailed(f"Cannot fetch {printable(url)}: {_reason(error)}.") from None
        raise errors.ImageFetchFailed(f"{printable(url)} redirects more than {_MAX_REDIRECTS} times.")

    def _redirect(self, url: str, target: URL, location: str) -> URL:
        """Return where `target` redirects to. Raises `InvalidRequest`, which names `url`: the caller knows no other one."""
        try:
            joined = join_url(target, location)
            return self._parse_url(joined, origin_of(joined))
        except errors.InvalidRequest as error:
            raise errors.InvalidRequest(f"{printable(url)} redirects elsewhere. {error}") from None

    def _parse_url(self, url: str, shown: str = "") -> URL:
        allow_private = self._options.allow_private_images
        return parse_url(url, ("https", "http") if allow_private else ("https",), allow_private, shown)


def _is_data_url(url: str) -> bool:
    return url[:5].lower() == "data:"


async def _read_body(response: aiohttp.ClientResponse, limit: int, url: str, reserve: Callable[[int], None]) -> bytes:
    """Read a file. Errors name `url`, which the caller knows, also after redirects."""
    if response.status != 200:
        raise errors.ImageFetchFailed(f"{printable(url)} answered with status {response.status}.")
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise errors.ImageFetchFailed(f"{printable(url)} sent a compressed body, which was not requested.")
    body = bytearray()
    async for chunk in response.content.iter_any():
        if len(body) + len(chunk) > limit:
            raise too_large(limit)
        reserve(len(chunk))
        body += chunk
    return bytes(body)


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


def default_user_agent() -> str:
    """Return the name and version of this server with the project's URL, so that owners of files know who fetches them."""
    metadata = importlib.metadata.metadata("dvd-serve")
    urls = dict(entry.split(", ", 1) for entry in metadata.get_all("Project-URL", []))
    return f"dvd-serve/{metadata['Version']} (+{urls['Homepage']})"


def _reason(error: Exception) -> str:
    return next((reason for kind, reason in _REASONS if isinstance(error, kind)), "connection failed")
