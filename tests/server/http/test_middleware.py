"""The outermost layer: unexpected errors, and what is recorded of requests without a complete response."""

import asyncio
import logging
from typing import Any

import pytest
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp

from server.http.error_format import ANTHROPIC
from server.http.middleware import RequestStatsMiddleware
from server.metrics import Metrics
from server.shutdown import Shutdown
from tests.server.http.helpers import AppResponse, call_app

START = {"type": "http.response.start", "status": 200, "headers": []}
CHUNK = {"type": "http.response.body", "body": b"a", "more_body": True}


async def serve(app: ASGIApp, metrics: Metrics, *headers: tuple[bytes, bytes]) -> AppResponse:
    return await call_app(RequestStatsMiddleware(app, metrics), headers=headers)


async def test_an_unexpected_error_is_logged_and_answered_with_500(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("/root/x.py")

    metrics = Metrics()
    response = await serve(fail, metrics)
    assert response.status == 500
    error = response.json["error"]
    assert (error["message"], error["code"]) == ("Internal error of the gateway.", "internal_error")
    assert "ValueError: /root/x.py" in caplog.text
    assert metrics.registry.get_sample_value("dvd_errors_total", {"code": "internal_error"}) == 1
    assert metrics.registry.get_sample_value("dvd_requests_total", {"route": "other", "code": "500"}) == 1


async def test_an_unexpected_error_after_the_start_of_a_response_is_raised() -> None:
    async def fail_late(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        raise ValueError("late")

    metrics = Metrics()
    with pytest.raises(ValueError, match="late"):
        await serve(fail_late, metrics)
    assert metrics.registry.get_sample_value("dvd_errors_total", {"code": "internal_error"}) == 1


@pytest.mark.parametrize(("messages", "status"), [([], "499"), ([START, CHUNK], "200")], ids=["no response", "incomplete"])
async def test_a_request_without_a_complete_response_is_recorded_as_a_disconnect(
    messages: list[dict[str, Any]], status: str
) -> None:
    async def send_part(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send({**message})

    metrics = Metrics()
    await serve(send_part, metrics)
    assert metrics.registry.get_sample_value("dvd_requests_total", {"route": "other", "code": status}) == 1
    assert metrics.registry.get_sample_value("dvd_errors_total", {"code": "client_gone"}) == 1


async def test_every_response_has_a_request_id_and_server_timing() -> None:
    headers = (await serve(PlainTextResponse("a"), Metrics(), (b"x-request-id", b"mine"))).headers
    assert headers["x-request-id"] == "mine"
    assert headers["server-timing"].startswith("total;dur=")
    first, second = [(await serve(PlainTextResponse("a"), Metrics())).headers["x-request-id"] for _ in range(2)]
    assert first != second


async def test_health_probes_are_logged_at_level_debug_only(caplog: pytest.LogCaptureFixture) -> None:
    class Route:
        path = "/health/live"

    async def respond(scope: Any, receive: Any, send: Any) -> None:
        scope["route"] = Route
        await PlainTextResponse("a")(scope, receive, send)

    caplog.set_level(logging.DEBUG, "dvd.access")
    await serve(respond, Metrics())
    await serve(PlainTextResponse("a"), Metrics())
    levels = [record.levelno for record in caplog.records if record.name == "dvd.access"]
    assert levels == [logging.DEBUG, logging.INFO]


async def test_a_request_that_waits_at_the_end_of_the_grace_is_answered_503() -> None:
    shutdown, metrics = Shutdown(), Metrics()
    cancelled = asyncio.Event()

    async def wait(scope: Any, receive: Any, send: Any) -> None:
        scope["state"]["error_format"] = ANTHROPIC
        asyncio.get_running_loop().call_soon(shutdown.end_grace)
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    response = await call_app(RequestStatsMiddleware(wait, metrics, shutdown))
    assert cancelled.is_set()
    assert (response.status, response.headers["connection"]) == (503, "close")
    assert int(response.headers["retry-after"]) in range(1, 4)
    assert (response.json["type"], response.json["error"]["type"]) == ("error", "overloaded_error")
    assert metrics.registry.get_sample_value("dvd_errors_total", {"code": "unavailable"}) == 1
    assert metrics.registry.get_sample_value("dvd_requests_total", {"route": "other", "code": "503"}) == 1
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()


async def test_a_response_that_has_started_at_the_end_of_the_grace_is_not_cut_off() -> None:
    shutdown = Shutdown()

    async def respond(scope: Any, receive: Any, send: Any) -> None:
        await send({**START})
        shutdown.end_grace()
        await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b"whole"})

    response = await call_app(RequestStatsMiddleware(respond, Metrics(), shutdown))
    assert (response.status, response.body) == (200, b"whole")


async def test_a_cancellation_by_others_is_passed_on() -> None:
    async def wait(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.Event().wait()

    task = asyncio.create_task(call_app(RequestStatsMiddleware(wait, Metrics(), Shutdown())))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
