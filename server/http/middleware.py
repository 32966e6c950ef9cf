"""The outermost layer of the gateway: statistics of each request, its headers, its log line, and unexpected errors."""

import logging
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common import errors, logs
from server.metrics import Metrics
from server.request_stats import RequestStats

log = logging.getLogger(__name__)
access_log = logging.getLogger("dvd.access")

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a request whose caller disconnected before the response. It appears in metrics and logs only."""
_DISCONNECTED = "client_gone"
"""Error code of such a request, and of one whose caller disconnected during the response."""


class RequestStatsMiddleware:
    """Creates the statistics of each request, adds them to its response's headers, and records them at its end."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        stats = RequestStats(_request_id(scope))
        scope.setdefault("state", {})["stats"] = stats
        logs.request_id.set(stats.request_id)  # uvicorn runs each request in a task, and so in a context, of its own
        status, complete = CLIENT_CLOSED_REQUEST, False

        async def send_with_headers(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"], headers["Server-Timing"] = stats.request_id, stats.server_timing()
            else:
                complete = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception:
            log.exception("unexpected error while serving a request")
            stats.error_code = errors.InternalError.code
            if status != CLIENT_CLOSED_REQUEST:  # the response has started: it can only be cut off
                raise
            body = errors.InternalError("Internal error of the gateway.").body()
            await JSONResponse(body, status_code=500)(scope, receive, send_with_headers)
        finally:
            if status == CLIENT_CLOSED_REQUEST or not complete:
                stats.error_code = stats.error_code or _DISCONNECTED
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.record_request(stats, route, status)
            _log(stats, route, status)
        return None


def _request_id(scope: Scope) -> str:
    """Return the caller's `X-Request-Id` if it is valid, else a new one."""
    request_id = Headers(scope=scope).get(logs.REQUEST_ID_KEY, "")
    return request_id if logs.is_valid_request_id(request_id) else uuid.uuid4().hex


def _log(stats: RequestStats, route: str, status: int) -> None:
    """Write one log line per request; probes and scrapes at level debug."""
    level = logging.INFO if route.startswith("/v1/") or route == "other" else logging.DEBUG
    fields = {"route": route, "status": status, "seconds": round(stats.elapsed(), 4), **stats.images}
    access_log.log(level, "answered", extra=logs.extra_fields(**fields, cache=stats.cache_result, error=stats.error_code))
