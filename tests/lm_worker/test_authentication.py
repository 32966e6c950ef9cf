"""The cluster token at vLLM's port: over a real socket, in front of an application that answers everything."""

from collections.abc import AsyncIterator

import aiohttp
import pytest
import uvicorn
from multidict import CIMultiDict
from yarl import URL

from common.security import OPEN, Credentials
from lm_worker.authentication import RequireToken
from tests.lm_worker.uvicorn_server import running

CLUSTER = Credentials("a-token-of-this-cluster")
OPEN_PATHS = ["/health", "/metrics", "/metrics/", "/metrics?name[]=a"]
GUARDED_PATHS = [
    "/v1/models", "/v1/chat/completions", "/version", "/load", "/tokenize", "/invocations", "/openapi.json", "/docs", "/",
    "//health", "/health/", "/health/../v1/models", "/healthz", "/metrics/x", "/v1%2fmodels", "/inference/v1/generate",
]  # fmt: skip


async def answer(scope: object, receive: object, send: object) -> None:
    """Answer every request with 204."""
    await send({"type": "http.response.start", "status": 204, "headers": []})  # type: ignore[operator]
    await send({"type": "http.response.body", "body": b""})  # type: ignore[operator]


@pytest.fixture
async def port(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[int]:
    monkeypatch.setattr(RequireToken, "credentials", CLUSTER)
    async with running(uvicorn.Config(RequireToken(answer), port=0, log_config=None, lifespan="off", ws="none")) as port:
        yield port


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "HEAD"])
async def test_every_path_but_health_and_metrics_needs_the_token(port: int, method: str) -> None:
    async with aiohttp.ClientSession() as session:
        base = f"http://127.0.0.1:{port}"
        for path in OPEN_PATHS:
            assert (await session.request(method, base + path)).status == 204
        for path in GUARDED_PATHS:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"X-Api-Key": CLUSTER.token or ""}):
                response = await session.request(method, URL(base + path, encoded=True), headers=headers)
                assert response.status == 401, (path, headers)
                assert method == "HEAD" or "cluster token" in (await response.json())["error"]["message"]
            assert (await session.request(method, URL(base + path, encoded=True), headers=CLUSTER.headers)).status == 204


async def test_two_tokens_in_a_request_are_refused(port: int) -> None:
    headers = CIMultiDict([("Authorization", "x"), *CLUSTER.headers.items()])
    async with aiohttp.ClientSession() as session:
        assert (await session.get(f"http://127.0.0.1:{port}/v1/models", headers=headers)).status == 401


async def test_without_a_token_everything_is_open(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RequireToken, "credentials", OPEN)
    async with aiohttp.ClientSession() as session:
        assert (await session.get(f"http://127.0.0.1:{port}/v1/models")).status == 204
