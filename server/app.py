"""The gateway's application: routes, and errors in OpenAI's shape."""

import asyncio
import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common import errors, logs
from common.processes import die_with_parent
from server.config import GatewayOptions
from server.http import error_format
from server.http.handlers import Routes, identity
from server.metrics import Metrics
from server.request_stats import Account

log = logging.getLogger(__name__)
access = logging.getLogger("dvd.access")

_GONE = 499
"""What nobody receives: the caller has left. nginx's number, for the metrics."""
_LEFT = "client_gone"
"""The code of such a request, and of one whose caller left in the middle of the answer."""


def create_app(options: GatewayOptions) -> FastAPI:
    """The ASGI application. Its workers are found and asked for when it starts up."""
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        routes = Routes(options, metrics)
        _add(app, routes)
        await routes.meet()
        watching = asyncio.create_task(metrics.common.measure_loop_lag())
        yield
        watching.cancel()
        await routes.close()

    app = FastAPI(title="dvd-serve", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan, redirect_slashes=False)
    app.add_middleware(_Observed, metrics=metrics)
    app.add_exception_handler(errors.DvdError, _on_error)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(ClientDisconnect, _on_gone)
    return app


def in_this_process(options: GatewayOptions) -> FastAPI:
    """The application, where it may be one of several that share a port."""
    logs.configure(options.log_level, options.log_format)
    if options.workers > 1:
        die_with_parent()
    return create_app(options)


def _add(app: FastAPI, routes: Routes) -> None:
    app.add_route("/v1/chat/completions", routes.chat, methods=["POST"])
    app.add_route("/v1/completions", routes.completions, methods=["POST"])
    app.add_route("/v1/responses", routes.responses, methods=["POST"])
    app.add_route("/v1/messages", routes.messages, methods=["POST"])
    app.add_route("/v1/messages/count_tokens", routes.messages, methods=["POST"])
    app.add_route("/tokenize", routes.tokenize, methods=["POST"])
    app.add_route("/detokenize", routes.detokenize, methods=["POST"])
    app.add_route("/v1/images/tokens", routes.image_tokens, methods=["POST"])
    app.add_route("/v1/models", routes.models, methods=["GET"])
    app.add_route("/version", routes.version, methods=["GET"])
    app.add_route("/health", routes.ready, methods=["GET"])  # what vLLM's clients ask before they begin
    app.add_route("/health/live", routes.live, methods=["GET"])
    app.add_route("/health/ready", routes.ready, methods=["GET"])
    app.add_route("/metrics", routes.metrics, methods=["GET"])
    app.add_route("/metrics/engine/{index}", routes.engine_metrics, methods=["GET"])


class _Observed:
    """Opens each request's account, writes the head of its answer from it, and closes it: counted, and one line in the log."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        account = scope["account"] = Account(identity(Request(scope)))
        logs.request_id.set(account.identity)  # uvicorn gives each request a task, and so a context, of its own
        status, whole = _GONE, False

        async def observed(message: Message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"], headers["Server-Timing"] = account.identity, account.server_timing()
            else:
                whole = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, observed)
        except Exception:
            log.exception("a request failed")
            account.error = errors.InternalError.code
            if status != _GONE:  # an answer has begun: all that can be done is to cut it
                raise
            await JSONResponse(errors.InternalError("internal error of the gateway").body(), status_code=500)(
                scope, receive, observed
            )
        finally:
            if status == _GONE or not whole:
                account.error = account.error or _LEFT
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.count(account, route, status)
            _log(account, route, status)
        return None


def _log(account: Account, route: str, status: int) -> None:
    """One line a request; those of probes and scrapes only at debug."""
    level = logging.INFO if route.startswith("/v1/") or route == "other" else logging.DEBUG
    line = {"route": route, "status": status, "seconds": round(account.elapsed(), 4), **account.images}
    access.log(level, "answered", extra=logs.extra_fields(**line, cache=account.cache, error=account.error))


async def _on_error(request: Request, error: Any) -> Response:
    request.scope["account"].error = error.code
    # an error that a worker raised does not say when to try again
    wait = error.retry_after or (1 if error.status in (429, 503) else None)
    headers = {"Retry-After": str(math.ceil(wait))} if wait else {}
    if isinstance(error, errors.DeadlineExceeded):  # clients try whatever is a 5xx again, and this took all its time
        headers["X-Should-Retry"] = "false"
    return JSONResponse(error_format.of(request.scope["path"]).body(error.body()), status_code=error.status, headers=headers)


async def _on_http(request: Request, error: Any) -> Response:
    """Unknown paths and methods, in OpenAI's shape."""
    known = {404: f"no such path: {request.scope['path'][:200]}", 405: f"{request.method} is not possible here"}
    made = errors.InvalidRequest(known.get(error.status_code, str(error.detail)))
    request.scope["account"].error, body = made.code, made.body()
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


async def _on_gone(_request: Request, _error: Any) -> Response:
    return Response(status_code=_GONE)
