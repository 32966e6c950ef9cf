"""HTTP itself: paths, methods, malformed heads, pipelining and request IDs."""

import asyncio
import json

import pytest

from tests.server.fakes.requests import chat
from tests.server.fakes.stack import Stack
from tests.server.gateway.helpers import assert_serves_images, read_to_end


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404), ("GET", "/v1", 404), ("POST", "//v1/chat/completions", 404), ("POST", "/v1/chat/completions/", 404),
        ("POST", "/V1/chat/completions", 404), ("POST", "/v1/embeddings", 404), ("GET", "/docs", 404),
        ("POST", "/v1/load_lora_adapter", 404), ("GET", "/" + "x" * 5000, 404),
        ("GET", "/v1/chat/completions", 405), ("PUT", "/v1/chat/completions", 405), ("DELETE", "/v1/models", 405),
        ("OPTIONS", "/v1/chat/completions", 405), ("POST", "/metrics", 405), ("PATCH", "/health/live", 405),
    ],
)  # fmt: skip
async def test_other_paths_and_methods_are_rejected(shared_stack: Stack, method: str, path: str, status: int) -> None:
    response = await shared_stack.request(method, path, headers={"Origin": "https://evil.example"})
    assert response.status == status
    assert response.error["type"] == "invalid_request_error"
    assert len(response.body) < 1000
    assert response.headers["X-Request-Id"]
    assert "Access-Control-Allow-Origin" not in response.headers


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready", "/metrics", "/v1/models", "/version"])
async def test_load_balancers_may_probe_with_head(shared_stack: Stack, path: str) -> None:
    response = await shared_stack.request("HEAD", path)
    assert (response.status, response.body) == (200, b"")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/%2e%2e/metrics",
        "/v1/../metrics",
        "/metrics%00",
        "/%ff",
        "/v1/models%2f",
        "/metrics%0a",
        "/v1/models%0a",
        "/v1/models%0a%0a",
        "/version%0d",
        "/health/live%0a",
        "/openapi.json%0a",
        "/v1/models/internvl%0a",
    ],
)
async def test_alternative_spellings_of_a_path_are_not_found(shared_stack: Stack, path: str) -> None:
    reader, writer = await shared_stack.send_raw(f"GET {path} HTTP/1.1\nHost: a\nConnection: close\n\n")
    assert (await read_to_end(reader)).startswith(b"HTTP/1.1 404 ")
    writer.close()


MALFORMED_HEADERS = {
    "two lengths": "Host: a\nContent-Length: 5\nContent-Length: 6\n",
    "negative length": "Host: a\nContent-Length: -5\n",
    "length is not a number": "Host: a\nContent-Length: five\n",
    "length and chunks": "Host: a\nContent-Length: 5\nTransfer-Encoding: gzip, chunked\n",
    "unknown transfer": "Host: a\nTransfer-Encoding: gzip\n",
    "two hosts": "Host: a\nHost: b\n",
    "no host": "",
    "space before colon": "Host : a\n",
    "endless header": "Host: a\nX: " + "x" * 200_000 + "\n",
    "folded": "Host: a\nX-Request-Id: a\n b\n",
}


@pytest.mark.parametrize("headers", MALFORMED_HEADERS.values(), ids=MALFORMED_HEADERS)
async def test_a_malformed_head_ends_only_its_connection(shared_stack: Stack, headers: str) -> None:
    before = len(shared_stack.engine.requests)
    reader, writer = await shared_stack.send_raw(f"POST /v1/chat/completions HTTP/1.1\n{headers}Connection: close\n\n", b"{}")
    try:
        first = (await read_to_end(reader)).split(b"\r\n")[0]
        assert first == b"" or first.split()[1].startswith(b"4") or first.split()[1] == b"501"
    except ConnectionResetError:
        pass
    writer.close()
    assert len(shared_stack.engine.requests) == before
    await assert_serves_images(shared_stack)


@pytest.mark.parametrize("host", ["a/v1/load_lora_adapter?x=", "a/?x=", "a#", "", "a b", "[", "a@b/metrics?", "a/../../sleep?"])
async def test_the_host_header_does_not_change_the_engines_path(shared_stack: Stack, host: str) -> None:
    before = len(shared_stack.engine.requests)
    body = json.dumps(chat("a")).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\nHost: {host}\nContent-Length: {len(body)}\nConnection: close\n\n"
    reader, writer = await shared_stack.send_raw(head, body)
    first = (await read_to_end(reader)).split(b"\r\n")[0]
    writer.close()
    assert first.split()[1] in (b"200", b"400")
    assert {request.path for request in shared_stack.engine.requests[before:]} <= {"/v1/chat/completions"}
    await assert_serves_images(shared_stack)


async def test_a_request_that_offers_http_2_is_answered_over_http_1(shared_stack: Stack) -> None:
    """Java's HttpClient offers it with every request to a plain port."""
    body = json.dumps(chat("a", note="x" * 70_000)).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\nConnection: Upgrade, HTTP2-Settings\nContent-Length: {len(body)}\nHost: a\n"
        "HTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAAAAYABgAA\nUpgrade: h2c\nContent-Type: application/json\n\n"
    )
    reader, writer = await shared_stack.send_raw(head, body)
    head_of_next = "GET /health/live HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    writer.write(head_of_next.encode())
    response = await read_to_end(reader)
    writer.close()
    assert response.count(b"HTTP/1.1 200 ") == 2
    assert shared_stack.engine.requests[-1].unsalted == body


async def test_pipelined_requests_are_answered_in_order(shared_stack: Stack) -> None:
    body = json.dumps(chat("a")).encode()
    one = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nX-Request-Id: one\r\nContent-Length: {len(body)}\r\n\r\n"
    two = "GET /health/live HTTP/1.1\r\nHost: a\r\nX-Request-Id: two\r\nConnection: close\r\n\r\n"
    reader, writer = await shared_stack.send_raw("", one.encode() + body + two.encode())
    response = await read_to_end(reader)
    writer.close()
    assert response.count(b"HTTP/1.1 200 ") == 2
    assert response.index(b"x-request-id: one") < response.index(b"x-request-id: two")


@pytest.mark.parametrize("name", ["abc", "A.b_c-9", "x" * 128])
async def test_a_request_id_is_forwarded_and_returned(shared_stack: Stack, name: str) -> None:
    response = await shared_stack.chat("a", headers={"X-Request-Id": name})
    assert response.headers["X-Request-Id"] == name
    assert shared_stack.engine.requests[-1].headers["X-Request-Id"] == name


@pytest.mark.parametrize("name", ["", "x" * 129, "x" * 60_000, "a b", "a\tb", "a;b", "é", "../a", "a/b", "\xff", "<script>"])
async def test_an_invalid_request_id_is_replaced(shared_stack: Stack, name: str) -> None:
    reader, writer = await shared_stack.send_raw(
        f"GET /health/live HTTP/1.1\nHost: a\nX-Request-Id: {name}\nConnection: close\n\n"
    )
    response = await read_to_end(reader)
    writer.close()
    assert response.startswith(b"HTTP/1.1 200 ")
    (request_id,) = [line.split(b": ")[1] for line in response.split(b"\r\n") if line.lower().startswith(b"x-request-id: ")]
    assert len(request_id) == 32
    assert request_id.isalnum()


async def test_a_request_id_may_be_used_twice(shared_stack: Stack) -> None:
    responses = await asyncio.gather(*(shared_stack.chat("a", headers={"X-Request-Id": "same"}) for _ in range(5)))
    assert {(response.status, response.headers["X-Request-Id"]) for response in responses} == {(200, "same")}
