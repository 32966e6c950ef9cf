"""Errors as the clients of each route know them."""

import json

import pytest

from common import errors
from server.http import error_format

FULL = errors.SinkFull("no room", param="x").body()


def test_chats_have_openais_errors() -> None:
    shape = error_format.OPENAI
    assert shape.body(FULL) is FULL
    assert json.loads(shape.event(FULL).removeprefix(b"data: ")) == FULL
    assert shape.stream_end == b"data: [DONE]\n\n"


def test_responses_have_openais_errors_and_events_that_say_all_twice() -> None:
    shape = error_format.OPENAI_RESPONSES
    assert shape.body(FULL) is FULL
    name, data = shape.event(FULL).split(b"\n")
    assert name == b"event: error"
    assert json.loads(data.removeprefix(b"data: ")) == {
        "type": "error", "code": "sink_full", "message": "no room", "param": "x", **FULL,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errors.InvalidRequest, "invalid_request_error"),
        (errors.InvalidImage, "invalid_request_error"),
        (errors.BodyTooLarge, "request_too_large"),
        (errors.Unauthorized, "authentication_error"),
        (errors.ModelNotFound, "not_found_error"),
        (errors.Overloaded, "rate_limit_error"),
        (errors.DeadlineExceeded, "timeout_error"),
        (errors.Unavailable, "overloaded_error"),
        (errors.SinkFull, "api_error"),
        (errors.InternalError, "api_error"),
    ],
)
def test_messages_have_anthropics_types(error: type[errors.DvdError], kind: str) -> None:
    body = error_format.ANTHROPIC.body(error("why", param="p").body())
    said = {"type": kind, "message": "why", "param": "p", "code": error.code}
    assert body == {"type": "error", "error": said}
    name, data = error_format.ANTHROPIC.event(error("why", param="p").body()).split(b"\n")
    assert (name, json.loads(data.removeprefix(b"data: "))) == (b"event: error", body)
