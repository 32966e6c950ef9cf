"""Errors as responses: status, headers, and the format of the API."""

import pytest
from fastapi import FastAPI, Request

from common import errors
from server.http.error_format import ANTHROPIC
from server.http.exception_handlers import add_exception_handlers
from server.http.middleware import RequestStatsMiddleware
from server.metrics import Metrics
from tests.server.http.helpers import AppResponse, call_app


async def call(error: errors.DvdError, path: str = "/", method: str = "GET", metrics: Metrics | None = None) -> AppResponse:
    """Call an application that raises `error` at `GET /` and at `GET /anthropic`."""
    app = FastAPI()

    @app.get("/")
    async def fail() -> None:
        raise error

    @app.get("/anthropic")
    async def fail_in_anthropics_format(request: Request) -> None:
        request.state.error_format = ANTHROPIC
        raise error

    app.add_middleware(RequestStatsMiddleware, metrics=metrics or Metrics())
    add_exception_handlers(app)
    return await call_app(app, path, method)


@pytest.mark.parametrize(
    ("error", "retry_after"),
    [
        (errors.Unavailable("no worker", retry_after=2.1), range(3, 6)),
        (errors.Unavailable("no worker", retry_after=100), range(100, 111)),
        (errors.SinkFull("no room"), range(1, 4)),
        (errors.Overloaded("full"), range(1, 4)),
        (errors.InvalidRequest("bad"), None),
        (errors.DeadlineExceeded("late"), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
async def test_retryable_errors_have_a_retry_after_header(error: errors.DvdError, retry_after: range | None) -> None:
    response = await call(error)
    assert response.status == error.status
    assert ("retry-after" in response.headers) == (retry_after is not None)
    assert retry_after is None or int(response.headers["retry-after"]) in retry_after
    assert response.json == error.body()


async def test_callers_that_are_refused_at_once_do_not_return_at_once() -> None:
    responses = [await call(errors.Overloaded("full", retry_after=10)) for _ in range(50)]
    seconds = [int(response.headers["retry-after"]) for response in responses]
    assert len(set(seconds)) > 1
    assert 10 <= min(seconds) <= max(seconds) <= 15


async def test_only_an_exceeded_deadline_should_not_be_retried() -> None:
    assert (await call(errors.DeadlineExceeded("late"))).headers["x-should-retry"] == "false"
    assert "x-should-retry" not in (await call(errors.SinkFull("no room"))).headers


async def test_an_error_has_the_format_of_its_api_and_is_counted_by_code() -> None:
    metrics, error = Metrics(), errors.ModelNotFound("unknown model", param="model")
    assert (await call(error, "/anthropic", metrics=metrics)).json == ANTHROPIC.body(error.body())
    assert metrics.registry.get_sample_value("dvd_errors_total", {"code": "model_not_found"}) == 1


async def test_unknown_paths_and_methods_have_the_error_object() -> None:
    error = errors.InvalidRequest("bad")
    response = await call(error, "/" + "x" * 1000)
    assert (response.status, response.json["error"]["code"]) == (404, "invalid_request")
    assert len(response.json["error"]["message"]) < 300
    response = await call(error, method="POST")
    assert (response.status, response.headers["allow"]) == (405, "GET")
    assert response.json["error"]["message"] == "Method POST is not allowed for this path."
