"""Gateways for the tests of client libraries; they share the workers of flash-qwen3."""

import contextlib
import functools
import http.server
import threading
from collections.abc import Iterator

import anthropic
import pytest
from openai import OpenAI

from tests.e2e.clients.content import KEY
from tests.e2e.conftest import Golden
from tests.e2e.serving import IMAGES, Served, start, stop, wait_ready
from tests.ports import free_port


@contextlib.contextmanager
def gateway(servers: Golden, *flags: str) -> Iterator[Served]:
    """Runs another gateway for the same workers, with the API key `KEY`."""
    port = free_port()
    arguments = (*servers.workers, f"--port={port}", *flags)
    served = start("gateway", *arguments, url=f"http://127.0.0.1:{port}", environment={"DVD_API_KEY": KEY})
    try:
        wait_ready(served)
        yield served
    finally:
        stop(served)


@pytest.fixture(scope="session")
def limited(flash: Golden) -> Iterator[Served]:
    """A gateway with an API key and a limit of one concurrent request."""
    with gateway(flash, "--max-in-flight=1") as served:
        yield served


@pytest.fixture(scope="session")
def private(flash: Golden) -> Iterator[Served]:
    """A gateway with an API key that fetches images over http and from private addresses."""
    with gateway(flash, "--allow-private-images", "--router-scope=request") as served:
        yield served


@pytest.fixture(scope="session")
def client(served: Served) -> Iterator[OpenAI]:
    """OpenAI's client."""
    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def private_client(private: Served) -> Iterator[OpenAI]:
    """OpenAI's client of the gateway that fetches images from private addresses."""
    with OpenAI(base_url=f"{private.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def claude(served: Served) -> Iterator[anthropic.Anthropic]:
    """Anthropic's client."""
    with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def private_claude(private: Served) -> Iterator[anthropic.Anthropic]:
    """Anthropic's client of the gateway that fetches images from private addresses."""
    with anthropic.Anthropic(base_url=private.url, api_key=KEY, max_retries=0) as client:
        yield client


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="session")
def images_url() -> Iterator[str]:
    """The URL of a server on this machine with the golden images."""
    handler = functools.partial(_QuietHandler, directory=str(IMAGES))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
