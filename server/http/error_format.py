"""Error formats of the APIs: every error is OpenAI's error object, converted to the format that an API's clients parse."""

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ErrorBody = dict[str, Any]

_ANTHROPIC_TYPES = {
    "model_not_found": "not_found_error",
    "body_too_large": "request_too_large",
    "deadline_exceeded": "timeout_error",
    "unavailable": "overloaded_error",
}
"""Anthropic's error type by our error code. Without an entry, `server_error` becomes `api_error`; other types are equal."""

_MIN_JITTER_SECONDS, _MAX_JITTER_SECONDS = 2, 10


@dataclass(frozen=True)
class ErrorFormat:
    """How an API reports an error.

    Attributes:
        body: Converts OpenAI's error object to the body of a response.
        event: Converts OpenAI's error object to a server-sent event, without the blank line that ends it.
        stream_end: What follows an error event in a stream.
    """

    body: Callable[[ErrorBody], ErrorBody]
    event: Callable[[ErrorBody], bytes]
    stream_end: bytes = b""


def _openai_body(body: ErrorBody) -> ErrorBody:
    return body


def _openai_event(body: ErrorBody) -> bytes:
    return b"data: " + json.dumps(body).encode()


def _responses_event(body: ErrorBody) -> bytes:
    error = body["error"]
    event = {"type": "error", "code": error["code"], "message": error["message"], "param": error["param"], **body}
    return b"event: error\ndata: " + json.dumps(event).encode()


def _anthropic_body(body: ErrorBody) -> ErrorBody:
    error = body["error"]
    error_type = _ANTHROPIC_TYPES.get(error["code"], "api_error" if error["type"] == "server_error" else error["type"])
    return {"type": "error", "error": {**error, "type": error_type}}


def _anthropic_event(body: ErrorBody) -> bytes:
    return b"event: error\ndata: " + json.dumps(_anthropic_body(body)).encode()


OPENAI = ErrorFormat(_openai_body, _openai_event, b"data: [DONE]\n\n")
OPENAI_RESPONSES = ErrorFormat(_openai_body, _responses_event)
ANTHROPIC = ErrorFormat(_anthropic_body, _anthropic_event)


def retry_after_header(seconds: float) -> str:
    """Return a `Retry-After` of at least these seconds and up to half more: refused callers must not return all at once."""
    least = math.ceil(seconds)
    return str(least + random.randint(0, min(max(least // 2, _MIN_JITTER_SECONDS), _MAX_JITTER_SECONDS)))
