"""Errors as responses, in the format of the API that was called."""

from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from common import errors
from server.http import content_encoding
from server.http.error_format import OPENAI, retry_after_header
from server.http.middleware import CLIENT_CLOSED_REQUEST

_RETRYABLE_STATUSES = (429, 503)
_DEFAULT_RETRY_AFTER_SECONDS = 1


def add_exception_handlers(app: FastAPI) -> None:
    """Register the handlers of all errors that a request may raise."""
    app.add_exception_handler(errors.DvdError, _on_dvd_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)


async def _on_dvd_error(request: Request, error: Any) -> Response:
    request.state.stats.error_code = error.code
    # errors that a worker raised have no retry_after
    retry_after = error.retry_after or (_DEFAULT_RETRY_AFTER_SECONDS if error.status in _RETRYABLE_STATUSES else None)
    headers = {"Retry-After": retry_after_header(retry_after)} if retry_after else {}
    if isinstance(error, errors.DeadlineExceeded):  # clients retry every 5xx, but a retry would take as long
        headers["X-Should-Retry"] = "false"
    if isinstance(error, errors.RequestTooSlow):
        headers["Connection"] = "close"
    if isinstance(error, errors.UnsupportedEncoding):
        headers["Accept-Encoding"] = ", ".join(content_encoding.SUPPORTED)
    error_format = getattr(request.state, "error_format", OPENAI)
    return JSONResponse(error_format.body(error.body()), status_code=error.status, headers=headers)


async def _on_http_exception(request: Request, error: Any) -> Response:
    """Answer unknown paths and methods."""
    messages = {
        404: f"Path {request.scope['path']!r:.200} does not exist.",
        405: f"Method {request.method} is not allowed for this path.",
    }
    converted = errors.InvalidRequest(messages.get(error.status_code, str(error.detail)))
    request.state.stats.error_code = converted.code
    return JSONResponse(converted.body(), status_code=error.status_code, headers=error.headers)


async def _on_disconnect(_request: Request, _error: Any) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)
