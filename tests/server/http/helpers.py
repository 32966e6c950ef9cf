"""Requests without a server, for the tests of single layers."""

import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp

Receive = Callable[[], Awaitable[dict[str, Any]]]


def receive_messages(*messages: dict[str, Any]) -> Receive:
    """Return an ASGI `receive` that gives these messages in turn, and fails if there is none left."""
    remaining = iter(messages)

    async def receive() -> dict[str, Any]:
        return next(remaining)

    return receive


def body_messages(chunks: Sequence[bytes]) -> list[dict[str, Any]]:
    """Return the ASGI messages of a body that arrives in chunks."""
    last = len(chunks) - 1
    return [{"type": "http.request", "body": chunk, "more_body": i < last} for i, chunk in enumerate(chunks)]


def make_request(receive: Receive, **state: Any) -> Request:
    """Return a POST request with these attributes of `request.state`."""
    scope = {"type": "http", "method": "POST", "path": "/v1/x", "headers": [], "query_string": b"", "state": state}
    return Request(scope, receive)


@dataclass(frozen=True)
class AppResponse:
    """A response of an ASGI application; names of headers are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The parsed body."""
        return json.loads(self.body)


async def call_app(
    app: ASGIApp, path: str = "/", method: str = "GET", headers: Sequence[tuple[bytes, bytes]] = ()
) -> AppResponse:
    """Call an ASGI application with a request without a body. Without a response, the status is 0."""
    status, response_headers, body = 0, {}, b""

    async def send(message: Any) -> None:
        nonlocal status, response_headers, body
        if message["type"] == "http.response.start":
            status = message["status"]
            response_headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
        else:
            body += message["body"]

    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": list(headers)}
    await app(scope, receive_messages(*body_messages([b""])), send)
    return AppResponse(status, response_headers, body)
