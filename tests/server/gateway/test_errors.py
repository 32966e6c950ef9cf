"""Errors of the engine and of the vision worker, as the client receives them."""

from typing import Any

import pytest
from aiohttp import web

from common import errors
from server.vllm_response import ENGINE_ERROR_MESSAGE
from tests.server.fakes.handlers import Handler, abort_connection, error_response, event_stream, respond_with
from tests.server.fakes.requests import image_file, image_part
from tests.server.fakes.stack import Stack
from tests.server.fakes.vllm import EVENTS, default_response
from tests.server.gateway.helpers import BROKEN_RESPONSES, ERROR_EVENT, A, assert_serves_images


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("respond", "status", "code"),
    [
        (error_response(500), 500, "engine_error"),
        (error_response(503), 503, "engine_error"),
        (respond_with(b"Internal Server Error in /root/model.py", 500), 500, "engine_error"),
        (event_stream(ERROR_EVENT, b"data: [DONE]\n\n"), 500, "engine_error"),
        (event_stream(EVENTS[0] + ERROR_EVENT), 500, "engine_error"),
    ],
    ids=["500", "503", "not JSON", "first event", "second event"],
)
async def test_an_engine_error_reveals_no_internals(stack: Stack, respond: Any, status: int, code: str, stream: bool) -> None:
    stack.engine.respond = respond
    for content in (["a"], [image_part(A)]):
        response = await stack.chat(*content, stream=stream)
        assert (response.status, response.error["code"], response.error["type"]) == (status, code, "server_error")
        assert response.error["message"] == ENGINE_ERROR_MESSAGE
    assert len(stack.engine.requests) == 2, "an error that would repeat is not retried"
    assert len(stack.vision.calls) == 1
    stack.engine.respond = default_response
    await assert_serves_images(stack)


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "invalid_request", "invalid_request_error"),
        (401, "invalid_api_key", "authentication_error"),
        (404, "model_not_found", "invalid_request_error"),
        (422, "invalid_request", "invalid_request_error"),
        (429, "overloaded", "rate_limit_error"),
    ],
)
async def test_an_engine_rejection_is_converted_to_openais_format(stack: Stack, status: int, code: str, kind: str) -> None:
    stack.engine.respond = error_response(status, "temperature must be at least 0, got -1", param="temperature")
    response = await stack.chat(image_part(A), temperature=-1)
    assert response.status == status
    assert response.error == {
        "message": "temperature must be at least 0, got -1", "type": kind, "param": "temperature", "code": code
    }  # fmt: skip
    assert len(stack.engine.requests) == 1


async def test_a_prompt_that_is_too_long_has_its_own_code(stack: Stack) -> None:
    stack.engine.respond = error_response(400, "This model's maximum context length is 4096 tokens.")
    assert (await stack.chat("a")).error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("respond", BROKEN_RESPONSES.values(), ids=BROKEN_RESPONSES)
async def test_an_engine_that_breaks_the_connection_is_unavailable(stack: Stack, respond: Any) -> None:
    stack.engine.respond = respond
    response = await stack.chat(image_part(A), stream=True)
    assert (response.status, response.error["code"]) == (503, "unavailable")
    assert int(response.headers["Retry-After"]) >= 1
    stack.engine.respond = default_response
    await stack.wait_until_ready()
    await assert_serves_images(stack)


async def test_a_truncated_error_response_is_unavailable(stack: Stack) -> None:
    async def broken(request: Any) -> Any:
        response = web.StreamResponse(status=500, headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b"{")
        return await abort_connection(request)

    stack.engine.respond = broken
    response = await stack.chat("a")
    assert (response.status, response.error["code"]) == (503, "unavailable")


@pytest.mark.parametrize("error", errors.all_errors(), ids=lambda error: error.__name__)
async def test_an_error_of_the_vision_worker_reaches_the_client(shared_stack: Stack, error: type[errors.DvdError]) -> None:
    shared_stack.vision.error = error("image 3 cannot be read")
    try:
        response = await shared_stack.chat(image_part(image_file(200)))
    finally:
        shared_stack.vision.error = None
    assert response.status == error.status
    assert response.error["code"] == error.code
    assert ("Retry-After" in response.headers) == (error.status in (429, 503))
    await shared_stack.wait_until_ready()
    await assert_serves_images(shared_stack)


async def test_an_unexpected_vision_worker_error_reveals_nothing(stack: Stack) -> None:
    stack.vision.error = KeyError("/root/secret")
    response = await stack.chat(image_part(A))
    assert response.status == 500
    assert b"secret" not in response.body
    assert b"unix:" not in response.body
    stack.vision.error = None
    await assert_serves_images(stack)


async def test_one_invalid_image_ends_the_work_on_the_others(stack: Stack) -> None:
    stack.vision.may_encode.clear()
    response = await stack.chat(image_part(A), image_part("data:image/png;base64,AAAA"))
    assert response.error["code"] == "invalid_image"
    await stack.wait_until_idle()
    assert stack.vision.calls == []


@pytest.mark.parametrize("respond", [error_response(500), event_stream(ERROR_EVENT)], ids=["whole", "stream"])
async def test_a_constraint_that_the_engine_cannot_compile_is_the_callers_mistake(stack: Stack, respond: Handler) -> None:
    """vLLM finds out in its engine, and reports an internal error."""
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#"}}}
    stack.engine.respond = respond
    for content in (["a"], [image_part(A)]):
        response = await stack.chat(*content, response_format=schema)
        assert (response.status, response.error["code"], response.error["param"]) == (400, "invalid_request", "response_format")
        assert "schema" in response.error["message"]
        response = await stack.chat(*content)
        assert (response.status, response.error["code"]) == (500, "engine_error")
    await stack.wait_until_idle()
