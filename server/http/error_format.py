"""How an API says that something went wrong: OpenAI's error object everywhere, in the clothes that a route's clients know."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Body = dict[str, Any]

_ANTHROPICS = {
    "model_not_found": "not_found_error",
    "body_too_large": "request_too_large",
    "deadline_exceeded": "timeout_error",
    "unavailable": "overloaded_error",
}
"""Anthropic's types of errors by our codes; where there is none, `server_error` is their `api_error`, and others are alike."""


@dataclass(frozen=True)
class Shape:
    """`body` makes an answer of OpenAI's error object, `event` what is said in a stream; `end` ends one that broke."""

    body: Callable[[Body], Body]
    event: Callable[[Body], bytes]
    end: bytes = b""


def _plain(body: Body) -> Body:
    return body


def _plain_event(body: Body) -> bytes:
    return b"data: " + json.dumps(body).encode()


def _response_event(body: Body) -> bytes:
    error = body["error"]
    said = {"type": "error", "code": error["code"], "message": error["message"], "param": error["param"], **body}
    return b"event: error\ndata: " + json.dumps(said).encode()


def _message(body: Body) -> Body:
    error = body["error"]
    kind = _ANTHROPICS.get(error["code"], "api_error" if error["type"] == "server_error" else error["type"])
    return {"type": "error", "error": {**error, "type": kind}}


def _message_event(body: Body) -> bytes:
    return b"event: error\ndata: " + json.dumps(_message(body)).encode()


CHAT = Shape(_plain, _plain_event, b"data: [DONE]\n\n")
RESPONSES = Shape(_plain, _response_event)
MESSAGES = Shape(_message, _message_event)


def of(path: str) -> Shape:
    """That of a route."""
    if path.startswith("/v1/messages"):
        return MESSAGES
    return RESPONSES if path == "/v1/responses" else CHAT
