"""The gateway's ASGI application: its parts and its routes."""

import asyncio
import contextlib
import importlib.metadata
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from common.grants import GrantSigner
from common.security import read_credentials
from common.tracing import Trace
from server.apis.base import Api
from server.apis.registry import APIS
from server.config import GatewayOptions
from server.http.authentication import Authenticator
from server.http.exception_handlers import add_exception_handlers
from server.http.handlers import ApiHandlers
from server.http.middleware import RequestStatsMiddleware
from server.http.operations import Operations
from server.media.fetch import MediaFetcher
from server.media.loader import MediaLoader
from server.media.video_decoder import VideoDecoder
from server.metrics import Metrics
from server.pipeline import Pipeline
from server.shutdown import Shutdown
from server.workers.probes import WorkerPools

_EXPOSED_HEADERS = ("X-Request-Id", "X-DvD-Images", "X-DvD-Degraded", "Server-Timing", "Retry-After", "X-Should-Retry")
"""Headers of responses that scripts of allowed origins may read."""
_PREFLIGHT_MAX_AGE_SECONDS = 7200
"""Time for which a browser remembers a preflight's answer: Chrome's maximum."""


def create_app(
    options: GatewayOptions,
    apis: tuple[Api, ...] = APIS,
    shutdown: Shutdown | None = None,
    metrics: Metrics | None = None,
) -> FastAPI:
    """Return the ASGI application. Its workers are probed once before it serves requests.

    Args:
        options: Options of the gateway.
        apis: The APIs to serve.
        shutdown: State of the process; None: it never drains.
        metrics: Metrics of the process; None: new ones.
    """
    metrics, shutdown = metrics or Metrics(), shutdown or Shutdown()
    credentials = read_credentials(options)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with (
            WorkerPools(options.vision_workers, options.language_workers, metrics, credentials=credentials) as workers,
            contextlib.AsyncExitStack() as stack,
            MediaFetcher(options, stack.enter_context(VideoDecoder(options, metrics.decoder))) as fetcher,
            _running(metrics.process.measure_loop_lag()),
        ):
            trace = Trace(options.trace, "gateway")
            media = MediaLoader(fetcher, options.max_body_bytes)
            pipeline = Pipeline(options, workers, media, metrics, trace, GrantSigner(credentials))
            authenticator = Authenticator(options.api_key, credentials)
            _add_apis(app, ApiHandlers(options, authenticator, pipeline, metrics), apis)
            _add_operations(app, Operations(options, authenticator, workers, metrics, shutdown))
            _match_whole_paths(app)
            await workers.probe()
            yield
            trace.flush()

    app = FastAPI(
        title="dvd-serve",
        version=importlib.metadata.version("dvd-serve"),
        docs_url="/docs" if options.docs else None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.add_middleware(RequestStatsMiddleware, metrics=metrics, shutdown=shutdown)
    if options.cors_origins:  # added last, and so outermost: every error gets the headers too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=_EXPOSED_HEADERS,
            max_age=_PREFLIGHT_MAX_AGE_SECONDS,
        )
    add_exception_handlers(app)
    return app


def _add_apis(app: FastAPI, handlers: ApiHandlers, apis: tuple[Api, ...]) -> None:
    for api in apis:
        app.add_api_route(
            api.path,
            handlers.endpoint(api),
            methods=["POST"],
            summary=api.summary,
            response_model=None,
            openapi_extra={"requestBody": _request_body(api)},
        )


def _request_body(api: Api) -> dict[str, Any]:
    """The body's OpenAPI declaration: any object, since vLLM decides about most fields, with an example."""
    return {"required": True, "content": {"application/json": {"schema": {"type": "object"}, "example": api.example}}}


def _add_operations(app: FastAPI, operations: Operations) -> None:
    endpoints = {
        "/v1/models": operations.models,
        "/v1/models/{model:path}": operations.model,  # ids may have slashes
        "/version": operations.version,
        "/health": operations.ready,  # clients of vLLM request it before they start
        "/health/live": operations.live,
        "/health/ready": operations.ready,
        "/metrics": operations.metrics,
        "/metrics/engine/{index}": operations.engine_metrics,
    }
    for path, endpoint in endpoints.items():
        app.add_api_route(path, endpoint, methods=["GET"], response_model=None)
        app.add_api_route(path, endpoint, methods=["HEAD"], response_model=None, include_in_schema=False)  # load balancers


def _match_whole_paths(app: FastAPI) -> None:
    """Make routes match whole paths only. Starlette's patterns end with `$`, which also matches before a final line feed."""
    for route in app.routes:
        if isinstance(route, Route):
            route.path_regex = re.compile(route.path_regex.pattern.removesuffix("$") + r"\Z")


@contextlib.asynccontextmanager
async def _running(work: Any) -> AsyncIterator[None]:
    """Run a coroutine in a task until the block ends."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
