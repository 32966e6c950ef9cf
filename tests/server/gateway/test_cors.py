"""Requests of browsers from other origins: off by default, and allowed for the origins of an option."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from common.options import ConfigError, read_options
from server.config import GatewayOptions
from tests.server.fakes.requests import chat, image_part
from tests.server.fakes.stack import Stack, start_stack
from tests.server.gateway.helpers import A

ORIGIN = "https://chat.example.org"
PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
}


@pytest.fixture(scope="module")
async def cors_stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    origins = [ORIGIN, "http://localhost:3000"]
    async with start_stack(tmp_path_factory.mktemp("cors"), cors_origins=origins, api_key="secret") as running:
        yield running


async def test_a_preflight_needs_no_api_key(cors_stack: Stack) -> None:
    response = await cors_stack.request("OPTIONS", "/v1/chat/completions", headers=PREFLIGHT)
    assert response.status == 200
    assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert response.headers["Access-Control-Allow-Headers"] == PREFLIGHT["Access-Control-Request-Headers"]
    assert "POST" in response.headers["Access-Control-Allow-Methods"]
    assert "Access-Control-Allow-Credentials" not in response.headers


@pytest.mark.parametrize("stream", [False, True])
async def test_a_response_names_the_origin_and_the_headers_that_scripts_may_read(cors_stack: Stack, stream: bool) -> None:
    headers = {"Origin": ORIGIN, "Authorization": "Bearer secret"}
    response = await cors_stack.post(chat(image_part(A), stream=stream), headers)
    assert response.status == 200
    assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert response.headers["Vary"] == "Origin"
    exposed = response.headers["Access-Control-Expose-Headers"].split(", ")
    assert {"X-Request-Id", "X-DvD-Images", "X-DvD-Degraded", "Retry-After"} <= set(exposed)


@pytest.mark.parametrize(
    ("method", "path", "body", "key", "status"),
    [
        ("POST", "/v1/chat/completions", b"{}", "wrong", 401),
        ("POST", "/v1/chat/completions", b"{}", "secret", 400),
        ("GET", "/v1/models/absent", None, "secret", 404),
        ("GET", "/absent", None, "secret", 404),
        ("DELETE", "/v1/models", None, "secret", 405),
    ],
)
async def test_errors_name_the_origin_too(
    cors_stack: Stack, method: str, path: str, body: bytes | None, key: str, status: int
) -> None:
    headers = {"Origin": "http://localhost:3000", "Authorization": f"Bearer {key}"}
    response = await cors_stack.request(method, path, data=body, headers=headers)
    assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (status, "http://localhost:3000")
    assert response.error["message"]


@pytest.mark.parametrize("origin", ["https://evil.example", "http://chat.example.org", "https://chat.example.org:444", "null"])
async def test_another_origin_is_not_allowed(cors_stack: Stack, origin: str) -> None:
    response = await cors_stack.request("OPTIONS", "/v1/chat/completions", headers={**PREFLIGHT, "Origin": origin})
    assert response.status == 400
    assert "Access-Control-Allow-Origin" not in response.headers
    response = await cors_stack.get("/v1/models", headers={"Origin": origin, "Authorization": "Bearer secret"})
    assert response.status == 200
    assert "Access-Control-Allow-Origin" not in response.headers


async def test_every_origin_may_be_allowed(tmp_path: Path) -> None:
    async with start_stack(tmp_path, cors_origins=["*"]) as stack:
        response = await stack.post(chat("a"), {"Origin": ORIGIN})
        assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (200, "*")


async def test_no_origin_is_allowed_by_default(shared_stack: Stack) -> None:
    response = await shared_stack.request("OPTIONS", "/v1/chat/completions", headers=PREFLIGHT)
    assert response.status == 405
    response = await shared_stack.post(chat("a"), {"Origin": ORIGIN})
    assert not [name for name in response.headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize("origin", ["a.org", "https://a.org/", "https://a.org/b", "https://*.a.org", "null"])
def test_an_option_that_is_no_origin_is_an_error(origin: str) -> None:
    with pytest.raises(ConfigError, match="--cors-origins"):
        read_options(GatewayOptions, ["--vision-workers=a:1", "--language-workers=a:2", f"--cors-origins={origin}"], {})


def test_origins_are_comma_separated() -> None:
    arguments = ["--vision-workers=a:1", "--language-workers=a:2", "--cors-origins=https://a.org, http://localhost:3000"]
    assert read_options(GatewayOptions, arguments, {}).cors_origins == ["https://a.org", "http://localhost:3000"]
    assert read_options(GatewayOptions, arguments[:2], {}).cors_origins == []
