"""Errors in the format of each API."""

import json

import pytest

from common import errors
from server.http import error_format

SINK_FULL = errors.SinkFull("no room", param="x").body()


def test_the_openai_format_is_the_error_object() -> None:
    openai = error_format.OPENAI
    assert openai.body(SINK_FULL) is SINK_FULL
    assert json.loads(openai.event(SINK_FULL).removeprefix(b"data: ")) == SINK_FULL
    assert openai.stream_end == b"data: [DONE]\n\n"


def test_events_of_responses_have_the_error_twice() -> None:
    responses = error_format.OPENAI_RESPONSES
    assert responses.body(SINK_FULL) is SINK_FULL
    name, data = responses.event(SINK_FULL).split(b"\n")
    assert name == b"event: error"
    assert json.loads(data.removeprefix(b"data: ")) == {
        "type": "error", "code": "sink_full", "message": "no room", "param": "x", **SINK_FULL,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("error", "error_type"),
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
def test_the_anthropic_format_has_anthropics_types(error: type[errors.DvdError], error_type: str) -> None:
    body = error_format.ANTHROPIC.body(error("reason", param="p").body())
    expected = {"type": error_type, "message": "reason", "param": "p", "code": error.code}
    assert body == {"type": "error", "error": expected}
    name, data = error_format.ANTHROPIC.event(error("reason", param="p").body()).split(b"\n")
    assert (name, json.loads(data.removeprefix(b"data: "))) == (b"event: error", body)
