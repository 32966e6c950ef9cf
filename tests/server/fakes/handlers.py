"""What a fake HTTP server responds with: handlers for aiohttp."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def respond_with(body: bytes, status: int = 200, **headers: str) -> Handler:
    """Responds with this body. An underscore in a header's name stands for a hyphen."""

    async def respond(_request: web.Request) -> web.StreamResponse:
        return web.Response(body=body, status=status, headers={k.replace("_", "-"): v for k, v in headers.items()})

    return respond


def event_stream(*chunks: bytes, then: Handler | None = None) -> Handler:
    """Responds with server-sent events, one write a chunk, and then runs `then` instead of ending the response."""

    async def respond(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        for chunk in chunks:
            await response.write(chunk)
            await asyncio.sleep(0.01)  # so that the receiver gets the same chunks
        if then is not None:
            await then(request)
        return response

    return respond


def error_response(status: int, message: str = "/root/model.py line 7 failed", **fields: Any) -> Handler:
    """Responds with an error in vLLM's format, in which `code` is a number."""

    async def respond(_request: web.Request) -> web.StreamResponse:
        error = {"message": message, "type": "InternalServerError", "param": None, "code": status, **fields}
        return web.json_response({"error": error}, status=status)

    return respond


async def hang(_request: web.Request) -> web.StreamResponse:
    """Never responds."""
    await asyncio.Event().wait()
    raise AssertionError


async def abort_connection(request: web.Request) -> web.StreamResponse:
    """Breaks the connection, as a process that dies does."""
    assert request.transport is not None
    request.transport.abort()
    return await hang(request)


async def partial_body(request: web.Request) -> web.StreamResponse:
    """Sends the header of a response and a part of its body, and breaks the connection."""
    response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": "1000"})
    await response.prepare(request)
    await response.write(b'{"id": ')
    await asyncio.sleep(0.01)
    return await abort_connection(request)


def in_turn(*handlers: Handler) -> Handler:
    """Uses one handler a request, in this order, and the last one for all that follow."""
    remaining = list(handlers)

    async def respond(request: web.Request) -> web.StreamResponse:
        return await (remaining.pop(0) if len(remaining) > 1 else remaining[0])(request)

    return respond
