"""Fetchers and files that several test modules use."""

import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult
from prometheus_client import CollectorRegistry

from common.metrics import DecoderMetrics
from server.config import ServingOptions
from server.media.fetch import MediaFetcher
from server.media.video_decoder import VideoDecoder
from tests.server.fakes.requests import image_file

PNG = image_file()


class StaticResolver(AbstractResolver):
    """Resolves every name to the same addresses, and records the names."""

    def __init__(self, *addresses: str) -> None:
        self.addresses, self.resolved_names = addresses, list[str]()

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        self.resolved_names.append(host)
        return [
            ResolveResult(hostname=host, host=address, port=port, family=_family(address), proto=0, flags=0)
            for address in self.addresses
        ]

    async def close(self) -> None:
        pass


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


@contextlib.asynccontextmanager
async def open_fetcher(resolver: AbstractResolver | None = None, **options: Any) -> AsyncIterator[MediaFetcher]:
    """Yield a fetcher with these options; without a resolver, the system resolves names."""
    serving = ServingOptions(**options)
    with VideoDecoder(serving, DecoderMetrics(CollectorRegistry())) as videos:
        async with MediaFetcher(serving, videos, resolver) as fetcher:
            yield fetcher
