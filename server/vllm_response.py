"""Answers of the language worker's engine on their way to the caller: bytes untouched, errors in OpenAI's shape."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from common import errors
from server.http.error_format import CHAT, Shape
from server.metrics import Listener

_KEEP_ALIVE = b": keep-alive\n\n"
_ERROR_EVENTS = (b'data: {"error"', b"event: error\n")
_USAGE = b'"usage":{'
_MOST_OF_USAGE = 4096
"""Bytes; a real one has some hundred."""
_DECODER = json.JSONDecoder()
_END = b"\n\n"
_SAME_BREATH = 0.05
"""Seconds."""
_TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "invalid_request_error", 429: "rate_limit_error"}
_CODES = {400: "invalid_request", 401: "invalid_api_key", 404: "model_not_found", 422: "invalid_request", 429: "overloaded"}
LOST = "the engine failed on this request; try again"


def normalised(status: int, body: bytes) -> dict[str, Any]:
    """The engine's error as OpenAI's error object: a string code, and nothing of its inside where the fault is ours."""
    try:
        said = json.loads(body)
        error = said.get("error", said)
        message, param = str(error.get("message") or error.get("detail") or error), error.get("param")
    except (ValueError, AttributeError):
        message, param = body.decode(errors="replace")[:500], None
    if status >= 500:
        message, param = LOST, None
    code = "context_length_exceeded" if _is_context(message) else _CODES.get(status, "invalid_request")
    kind = _TYPES.get(status, "invalid_request_error")
    if status >= 500:
        code, kind = "engine_error", "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _is_context(message: str) -> bool:
    return "maximum context length" in message or "longer than the maximum model length" in message


def with_image_tokens(said: bytes, image_tokens: int) -> bytes:
    """Every count of a prompt's tokens in an answer or in events, with how many of them are visual. All else stays as it is.

    Inside a text the quotes of `"usage":{` would be escaped; where it is the name of something else, no number of tokens is
    in it.
    """
    parts, done = [], 0
    while (at := said.find(_USAGE, done)) >= 0:
        start = at + len(_USAGE) - 1
        usage, end = _object(said, start)
        parts += [said[done:start], _detailed(usage, image_tokens) or said[start:end]]
        done = end
    return b"".join([*parts, said[done:]]) if parts else said


def _object(said: bytes, start: int) -> tuple[Any, int]:
    """The JSON value that begins there, and where it ends; what is none ends at once."""
    text = said[start : start + _MOST_OF_USAGE].decode(errors="surrogateescape")
    try:
        value, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return None, start + 1
    return value, start + len(text[:end].encode(errors="surrogateescape"))


def _detailed(usage: Any, image_tokens: int) -> bytes | None:
    """None where it is no count of a prompt's tokens, or one of an API that has no place for details."""
    if not isinstance(usage, dict):
        return None
    if type(usage.get("prompt_tokens")) is int:
        name = "prompt_tokens_details"
    elif type(usage.get("input_tokens")) is int and "input_tokens_details" in usage:  # Anthropic's has none
        name = "input_tokens_details"
    else:
        return None
    changed = {**usage, name: {**(usage.get(name) or {}), "image_tokens": image_tokens}}
    return json.dumps(changed, separators=(",", ":")).encode()


class Stream:
    """The events of a streamed answer. The first ones are looked at before anything goes to the caller.

    `image_tokens`: how many visual tokens the prompt has; 0: none, and nothing is said of them. `keep_alive`: seconds of
    silence, after the first events, until a comment is sent, which clients pass over and proxies take for life; 0: never.
    """

    def __init__(
        self,
        answer: aiohttp.ClientResponse,
        listener: Listener,
        shape: Shape = CHAT,
        image_tokens: int = 0,
        keep_alive: float = 0,
    ) -> None:
        self._content, self._listener, self._shape = answer.content, listener, shape
        self._image_tokens, self._keep_alive = image_tokens, keep_alive or None
        self._first = self._held = b""

    async def begin(self) -> tuple[int, dict[str, Any]] | None:
        """Wait for the first event. Status and body where it is an error; raises `Unavailable` where none comes.

        The engine says who speaks before it says what went wrong, in one breath: so after a lone first event, look once more.
        """
        try:
            self._first = await self._next()
            if self._first.count(_END) == 1:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_SAME_BREATH):
                        self._first += await self._next()
        except aiohttp.ClientError:
            self._first = b""  # nothing has gone to the caller: the request can begin anew
        if not self._first:
            raise errors.Unavailable("the language worker went away before its answer began; try again")
        return next((_failure(event) for event in self._first.split(_END) if event.startswith(_ERROR_EVENTS)), None)

    async def events(self) -> AsyncIterator[bytes]:
        """Everything, from the first event on. A broken connection ends it with an error event."""
        yield self._counted(self._first)
        try:
            while (chunk := await self._next_or_silence()) != b"":
                yield _KEEP_ALIVE if chunk is None else self._counted(self._passed(chunk))
        except TimeoutError:
            yield self._broken(errors.DeadlineExceeded("the request's time is up"))
        except aiohttp.ClientError:
            yield self._broken(errors.Unavailable("the language worker went away in the middle of its answer"))

    async def _next_or_silence(self) -> bytes | None:
        """As `_next`; None where nothing came for a while."""
        waiting = asyncio.timeout(self._keep_alive)
        try:
            async with waiting:
                return await self._next()
        except TimeoutError:
            if waiting.expired():
                return None
            raise  # the request's own time

    def _counted(self, chunk: bytes) -> bytes:
        return with_image_tokens(chunk, self._image_tokens) if self._image_tokens else chunk

    def _passed(self, chunk: bytes) -> bytes:
        if not any(mark in chunk for mark in _ERROR_EVENTS):
            return chunk
        return _END.join(self._normalised(e) if e.startswith(_ERROR_EVENTS) else e for e in chunk.split(_END))

    def _normalised(self, event: bytes) -> bytes:
        body = _failure(event)[1]
        self._listener.failed(body["error"]["code"])
        return self._shape.event(body)

    def _broken(self, error: errors.DvdError) -> bytes:
        self._listener.failed(error.code)
        return self._shape.event(error.body()) + _END + self._shape.end

    async def _next(self) -> bytes:
        """The bytes that have come, cut only between events; empty at the end. May be cancelled: nothing read is lost."""
        while chunk := await self._content.readany():
            whole, end, self._held = (self._held + chunk).rpartition(_END)
            if end:
                self._listener.saw(whole)
                return whole + end
        last, self._held = self._held, b""
        return last


def _failure(event: bytes) -> tuple[int, dict[str, Any]]:
    said = event.partition(b"data: ")[2]
    try:
        status = int(json.loads(said)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        status = 500
    status = status if 400 <= status < 600 else 500
    return status, normalised(status, said)
