"""The outermost layer of the gateway: statistics of each request, its headers, its log line, and errors that nothing else sees.

These are unexpected errors, and the end of the process while a request waits.
"""

import asyncio
import logging
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common import errors, logs
from server.http.error_format import OPENAI, ErrorFormat, retry_after_header
from server.metrics import Metrics
from server.request_stats import RequestStats
from server.shutdown import Shutdown, shutting_down

log = logging.getLogger(__name__)
access_log = logging.getLogger("dvd.access")

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a request whose caller disconnected before the response. It appears in metrics and logs only."""
OTHER_ROUTE = "other"
"""Route of requests for paths that do not exist, and of those that never reach the application."""
_DISCONNECTED = "client_gone"
"""Error code of such a request, and of one whose caller disconnected during the response."""


class RequestStatsMiddleware:
    """Creates the statistics of each request, adds them to its response's headers, and records them at its end."""

    def __init__(self, app: ASGIApp, metrics: Metrics, shutdown: Shutdown | None = None) -> None:
        self._app, self._metrics, self._shutdown = app, metrics, shutdown or Shutdown()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        stats = RequestStats(_request_id(scope))
        scope.setdefault("state", {}).update(stats=stats, shutdown=self._shutdown)
        logs.request_id.set(stats.request_id)  # uvicorn runs each request in a task, and so in a context, of its own
        status, complete = CLIENT_CLOSED_REQUEST, False

        async def send_with_headers(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"], headers["Server-Timing"] = stats.request_id, stats.server_timing()
                if self._shutdown.is_draining:
                    headers["Connection"] = "close"
            else:
                complete = not message.get("more_body", False)
            await send(message)

        try:
            await self._serve(scope, receive, send_with_headers, lambda: status != CLIENT_CLOSED_REQUEST)
        except _CutOff:
            error, error_format = shutting_down(), scope["state"].get("error_format", OPENAI)
            stats.error_code = error.code
            response = _error_response(error, error_format)
            response.headers["Retry-After"] = retry_after_header(error.retry_after or 1)
            await response(scope, receive, send_with_headers)
        except Exception:
            log.exception("unexpected error while serving a request")
            stats.error_code = errors.InternalError.code
            if status != CLIENT_CLOSED_REQUEST:  # the response has started: it can only be cut off
                raise
            await _error_response(errors.InternalError("Internal error of the gateway."))(scope, receive, send_with_headers)
        finally:
            if status == CLIENT_CLOSED_REQUEST or not complete:
                stats.error_code = stats.error_code or _DISCONNECTED
            route = getattr(scope.get("route"), "path", OTHER_ROUTE)
            self._metrics.record_request(stats, route, status)
            log_request(stats, route, status)
        return None

    async def _serve(self, scope: Scope, receive: Receive, send: Send, has_started: Callable[[], bool]) -> None:
        """Run the application. Raises `_CutOff` if the grace of the process ends before the response has started."""
        task, is_cut_off = asyncio.current_task(), False
        assert task is not None

        def cut_off() -> None:
            nonlocal is_cut_off
            if not has_started():  # a stream ends with an error event of its own
                is_cut_off = True
                task.cancel()

        try:
            with self._shutdown.at_end_of_grace(cut_off):
                await self._app(scope, receive, send)
        except asyncio.CancelledError:
            if not is_cut_off:
                raise
            task.uncancel()
            raise _CutOff from None


class _CutOff(Exception):
    """The process ends before the response has started."""


def _error_response(error: errors.DvdError, error_format: ErrorFormat = OPENAI) -> JSONResponse:
    return JSONResponse(error_format.body(error.body()), status_code=error.status)


def _request_id(scope: Scope) -> str:
    """Return the caller's `X-Request-Id` if it is valid, else a new one."""
    request_id = Headers(scope=scope).get(logs.REQUEST_ID_KEY, "")
    return request_id if logs.is_valid_request_id(request_id) else uuid.uuid4().hex


def log_request(stats: RequestStats, route: str, status: int) -> None:
    """Write the log line of a request; those of probes and scrapes at level debug."""
    logs.request_id.set(stats.request_id)
    level = logging.INFO if route.startswith("/v1/") or route == OTHER_ROUTE else logging.DEBUG
    fields = {"route": route, "status": status, "seconds": round(stats.elapsed(), 4), **stats.images}
    access_log.log(level, "answered", extra=logs.extra_fields(**fields, cache=stats.cache_result, error=stats.error_code))
