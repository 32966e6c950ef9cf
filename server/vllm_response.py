"""Responses of vLLM on their way to the caller: errors become OpenAI's error object, visual tokens are added to usage."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import aiohttp

from common import errors
from server import vllm_errors
from server.apis.constraints import constraint_field
from server.http.error_format import OPENAI, ErrorBody, ErrorFormat
from server.metrics import StreamTimer
from server.shutdown import shutting_down

_KEEP_ALIVE = b": keep-alive\n\n"
_ERROR_EVENTS = (b'data: {"error"', b"event: error\n")
_EVENT_END = b"\n\n"

_PREAMBLE = re.compile(
    rb'data: \{[^\n]*"delta":\{"role":"[a-z]+","content":""[,}][^\n]*"finish_reason":null|event: message_start\n'
)
"""Events that vLLM sends at the start of a stream, before the first token: a chat's role, a message's start. An error of the
engine's first step comes after them, so they do not decide the status. tests/e2e/test_vllm_behaviour.py compares them
with the pinned vLLM."""

_USAGE = b'"usage":{'
_MAX_USAGE_BYTES = 4096
"""Upper bound for a usage object, which has a few hundred bytes."""

_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "invalid_request_error",
    429: "rate_limit_error",
}
_ERROR_CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    404: "model_not_found",
    422: "invalid_request",
    429: "overloaded",
}
_CONTEXT_LENGTH_PARAMS = ("input_tokens", "input_text")
_CONTEXT_LENGTH_TEXTS = ("maximum context length", "longer than the maximum model length")
"""How vLLM reports a prompt that is too long: by `param`, but with images, and to Anthropic's clients, by the text only.

tests/e2e/test_vllm_behaviour.py compares them with the pinned vLLM.
"""

_MAX_ERROR_BYTES = 1 << 20

ENGINE_ERROR_MESSAGE = "The engine failed on this request; retry it."

_decoder = json.JSONDecoder()


@dataclass(frozen=True)
class Failure:
    """An error of vLLM: the status and OpenAI's error object for the caller."""

    status: int
    body: ErrorBody

    @property
    def code(self) -> str:
        """The error's string code."""
        return str(self.body["error"]["code"])

    @classmethod
    def parse(cls, status: int, body: bytes) -> "Failure":
        """Convert vLLM's error: a string code, and nothing of vLLM's internals if the fault is the server's."""
        try:
            response = json.loads(body)
            error = response.get("error", response)
            message, param = str(error.get("message") or error.get("detail") or error), error.get("param")
        except (ValueError, AttributeError, RecursionError):
            message, param = body.decode(errors="replace"), None
        if status >= 500:
            return cls(status, _error_body(ENGINE_ERROR_MESSAGE, "server_error", None, "engine_error"))
        code = _ERROR_CODES.get(status, "invalid_request")
        if param in _CONTEXT_LENGTH_PARAMS or any(text in message for text in _CONTEXT_LENGTH_TEXTS):
            code = "context_length_exceeded"
        message, param = vllm_errors.describe(message, str(param) if param else None)
        return cls(status, _error_body(message, _ERROR_TYPES.get(status, "invalid_request_error"), param, code))

    def about(self, request: Mapping[str, Any], length_fields: Sequence[str]) -> "Failure":
        """Return this failure as the request's caller can read it, if the caller is to blame.

        Args:
            request: Body of the request.
            length_fields: What it may call the maximum length of its response.
        """
        if self.status != 400:
            return self
        error = self.body["error"]
        message, param = vllm_errors.in_words_of(request, error["message"], error["param"], length_fields)
        if not param and vllm_errors.is_about_constraint(message):
            param = constraint_field(request)
        return replace(self, body={"error": {**error, "message": message, "param": param}})

    @classmethod
    def parse_event(cls, event: bytes) -> "Failure":
        """Convert an error event of a stream; an error without a valid status in its code counts as an error of the server."""
        data = event.partition(b"data: ")[2]
        try:
            status = int(json.loads(data)["error"]["code"])
        except (ValueError, KeyError, TypeError):
            status = 500
        return cls.parse(status if 400 <= status < 600 else 500, data)


def _error_body(message: str, error_type: str, param: Any, code: str) -> ErrorBody:
    return {"error": {"message": message, "type": error_type, "param": param, "code": code}}


async def read_all(response: aiohttp.ClientResponse) -> bytes:
    """Read a response to its end. Raises `WorkerUnavailable` if the connection breaks."""
    try:
        return await response.read()
    except aiohttp.ClientError:
        raise errors.WorkerUnavailable("The language worker went away before its response was complete; retry.") from None


async def read_error(response: aiohttp.ClientResponse) -> bytes:
    """Read an error's body, at most its beginning: it may repeat the whole request. Raises `WorkerUnavailable`."""
    body = bytearray()
    try:
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > _MAX_ERROR_BYTES:
                break
    except aiohttp.ClientError:
        raise errors.WorkerUnavailable("The language worker went away before its response was complete; retry.") from None
    return bytes(body)


def add_image_tokens(data: bytes, image_tokens: int) -> bytes:
    """Add the number of visual tokens to every prompt token count in a response or in events; change nothing else.

    Inside a JSON string the quotes of `"usage":{` would be escaped. Where `usage` is the name of something else, it has no
    number of prompt tokens.
    """
    parts, position = [], 0
    while (match := data.find(_USAGE, position)) >= 0:
        start = match + len(_USAGE) - 1
        usage, end = _parse_object(data, start)
        parts += [data[position:start], _usage_with_image_tokens(usage, image_tokens) or data[start:end]]
        position = end
    return b"".join([*parts, data[position:]]) if parts else data


def _parse_object(data: bytes, start: int) -> tuple[Any, int]:
    """Return the JSON value at `start` and where it ends; (None, start + 1) if it is not valid JSON."""
    text = data[start : start + _MAX_USAGE_BYTES].decode(errors="surrogateescape")
    try:
        value, end = _decoder.raw_decode(text)
    except (ValueError, RecursionError):
        return None, start + 1
    return value, start + len(text[:end].encode(errors="surrogateescape"))


def _usage_with_image_tokens(usage: Any, image_tokens: int) -> bytes | None:
    """Return the usage object with visual tokens; None if it counts no prompt, or its API has no place for details."""
    if not isinstance(usage, dict):
        return None
    if type(usage.get("prompt_tokens")) is int:
        name = "prompt_tokens_details"
    elif type(usage.get("input_tokens")) is int and "input_tokens_details" in usage:  # absent in Anthropic's usage
        name = "input_tokens_details"
    else:
        return None
    changed = {**usage, name: {**(usage.get(name) or {}), "image_tokens": image_tokens}}
    return json.dumps(changed, separators=(",", ":")).encode()


class EventStream:
    """The events of a streamed response.

    Nothing is sent to the caller until an event decides the status: the first one that is not part of the preamble.

    Args:
        response: vLLM's response.
        timer: Times the events.
        error_format: How the caller's API reports errors.
        image_tokens: Visual tokens of the prompt, added to usage; 0 adds nothing.
        keep_alive: Seconds without an event, once the stream has started, until a comment is sent; 0 sends none. Clients ignore
            comments, and proxies see that the connection is alive.
    """

    def __init__(
        self,
        response: aiohttp.ClientResponse,
        timer: StreamTimer,
        error_format: ErrorFormat = OPENAI,
        image_tokens: int = 0,
        keep_alive: float = 0,
    ) -> None:
        self._content, self._timer, self._error_format = response.content, timer, error_format
        self._image_tokens, self._keep_alive = image_tokens, keep_alive or None
        self._first_events = self._incomplete_event = b""
        self._is_stopped = False
        self._reading: asyncio.Timeout | None = None

    async def start(self) -> Failure | None:
        """Wait until an event decides the status. Returns the failure if that is an error.

        A preamble that nothing follows for `keep_alive` seconds starts the stream too, so that comments can keep it alive: vLLM
        may hold back content that its parser of tool calls or reasoning has not finished.

        Raises:
            WorkerUnavailable: The stream ended before that, so that the request can be retried.
        """
        try:
            while (events := await self._read_first_events()) != b"":
                if events is None:
                    return None
                self._first_events += events
                for event in self._first_events.split(_EVENT_END):
                    if event.startswith(_ERROR_EVENTS):
                        return Failure.parse_event(event)
                if not _is_preamble(self._first_events):
                    return None
        except aiohttp.ClientError:
            pass
        raise errors.WorkerUnavailable("The language worker went away before its response started; retry.")

    async def _read_first_events(self) -> bytes | None:
        """Like `_read_events`, but returns None if only a preamble arrived and nothing followed it for `keep_alive` seconds."""
        return await (self._read_or_time_out() if self._first_events else self._read_events())

    async def events(self) -> AsyncIterator[bytes]:
        """Yield all events. After a broken connection, a passed deadline or `stop`, the last one is an error event."""
        yield self._with_image_tokens(self._first_events)
        try:
            while (events := await self._read_or_time_out()) != b"":
                if events is None and self._is_stopped:
                    yield self._final_error(shutting_down())
                    return
                yield _KEEP_ALIVE if events is None else self._with_image_tokens(self._convert_errors(events))
        except TimeoutError:
            yield self._final_error(errors.DeadlineExceeded("Deadline exceeded (X-Request-Timeout / --request-timeout)."))
        except aiohttp.ClientError:
            yield self._final_error(errors.WorkerUnavailable("The language worker went away during its response."))

    def stop(self) -> None:
        """End `events` with an error event after the events that have arrived."""
        self._is_stopped = True
        if self._reading is not None and not self._reading.expired():
            self._reading.reschedule(0)

    async def _read_or_time_out(self) -> bytes | None:
        """Like `_read_events`, but returns None after `keep_alive` seconds without an event, or at once after `stop`."""
        waiting = asyncio.timeout(0 if self._is_stopped else self._keep_alive)
        try:
            async with waiting:
                self._reading = waiting
                return await self._read_events()
        except TimeoutError:
            if waiting.expired():
                return None
            raise  # the deadline of the request
        finally:
            self._reading = None

    async def _read_events(self) -> bytes:
        """Return the next complete events, or what is left at the end; empty after that. Cancellation loses no bytes."""
        while chunk := await self._content.readany():
            complete, end, self._incomplete_event = (self._incomplete_event + chunk).rpartition(_EVENT_END)
            if end:
                self._timer.record(complete)
                return complete + end
        last, self._incomplete_event = self._incomplete_event, b""
        return last

    def _with_image_tokens(self, events: bytes) -> bytes:
        return add_image_tokens(events, self._image_tokens) if self._image_tokens else events

    def _convert_errors(self, events: bytes) -> bytes:
        if not any(mark in events for mark in _ERROR_EVENTS):
            return events
        return _EVENT_END.join(
            self._convert_error(event) if event.startswith(_ERROR_EVENTS) else event for event in events.split(_EVENT_END)
        )

    def _convert_error(self, event: bytes) -> bytes:
        failure = Failure.parse_event(event)
        self._timer.record_error(failure.code)
        return self._error_format.event(failure.body)

    def _final_error(self, error: errors.DvdError) -> bytes:
        self._timer.record_error(error.code)
        return self._error_format.event(error.body()) + _EVENT_END + self._error_format.stream_end


def _is_preamble(events: bytes) -> bool:
    return all(_PREAMBLE.match(event) for event in events.removesuffix(_EVENT_END).split(_EVENT_END))
