"""Handlers of the APIs: authentication, parsing, admission and deadline. The pipeline does everything after that.

A permit is taken when the body has arrived and been checked: a caller that sends it slowly, or sends nonsense, holds none.
"""

import asyncio
import ipaddress
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from starlette.requests import Request
from starlette.responses import Response

from common import errors
from protos import vision_pb2 as pb
from server.apis.base import Api
from server.apis.image_options import RequestPolicy
from server.apis.request import ParsedRequest
from server.config import GatewayOptions
from server.http import json_body
from server.http.admission import Admission, BodyMemory
from server.http.authentication import Authenticator
from server.http.body import BodyLimits, read_body
from server.http.deadline import deadline_exceeded, request_timeout
from server.http.streaming import StreamWithResources, cancel_on_disconnect
from server.metrics import Metrics
from server.pipeline import Pipeline
from server.request_context import RequestContext
from server.request_stats import RequestStats

Endpoint = Callable[[Request], Awaitable[Response]]

_BYTES_PER_VALUE = 100
"""Memory of a decoded value: an empty list takes 56 bytes, an object with one field about 200, for three separators."""
_IPV6_PREFIX_BITS = 64
_MANY_VALUES = 20_000
"""Values from which on a body is checked in a thread: it takes more than about 10 ms."""


class ApiHandlers:
    """Makes an endpoint of each API. All endpoints share the permits and the policy."""

    def __init__(self, options: GatewayOptions, authenticator: Authenticator, pipeline: Pipeline, metrics: Metrics) -> None:
        self._options, self._authenticator, self._pipeline, self._metrics = options, authenticator, pipeline, metrics
        is_shared = options.api_key is None  # one key is one caller
        self._admission = Admission(options.max_in_flight, options.max_bodies_bytes, metrics, is_shared=is_shared)
        self._body_limits = BodyLimits(options.max_body_bytes, options.min_body_rate)
        router = pb.Router(
            mode=options.vir.upper(),
            relative_threshold=options.vir_relative_threshold,
            absolute_threshold=options.vir_absolute_threshold,
        )
        self._policy = RequestPolicy(
            options.max_images, router, options.allow_vir, options.max_sequences, options.compiled_tools
        )

    def endpoint(self, api: Api) -> Endpoint:
        """Return the endpoint of an API."""

        async def serve(request: Request) -> Response:
            return await self._serve(api, request)

        serve.__name__ = f"post_{api.path.strip('/').replace('/', '_')}"
        return serve

    async def _serve(self, api: Api, request: Request) -> Response:
        """Serve one request. Its resources are released after the last byte of the response."""
        stats: RequestStats = request.state.stats
        request.state.error_format, stats.generates_text = api.error_format, api.generates_text
        async with AsyncExitStack() as resources:
            caller = self._authenticator.authenticate(request.headers)
            timeout = request_timeout(request.headers, self._options.request_timeout)
            deadline = time.monotonic() + timeout
            flow = _flow(request, caller, has_keys=self._options.api_key is not None)
            salt = self._authenticator.cache_salt(caller) if api.generates_text else None
            self._admission.check_any_left()
            memory = resources.enter_context(self._admission.body_memory())
            context = RequestContext(
                caller, flow, api.path, api.error_format, stats, deadline, resources, memory.add,
                api.max_tokens_fields, api.default_max_tokens, salt,
            )  # fmt: skip
            try:
                async with asyncio.timeout(timeout):
                    with self._metrics.stage("receive", stats):
                        parsed = await self._parse(api, await read_body(request, self._body_limits, memory), memory)
                    has_images = bool(parsed.images)
                    resources.enter_context(self._admission.permits(flow, parsed.sequences, has_images=has_images))
                    response = await cancel_on_disconnect(request, api.respond(self._pipeline, parsed, context))
                    if has_images:  # a stream may last for minutes, and needs none of their bytes
                        memory.release()
            except TimeoutError:
                raise deadline_exceeded(timeout) from None
            except errors.BudgetExceeded as error:
                self._metrics.over_budget.labels(error.budget).inc()
                raise
            if isinstance(response, StreamWithResources):
                response.resources = resources.pop_all()
        return response

    async def _parse(self, api: Api, raw: bytes, memory: BodyMemory) -> ParsedRequest:
        """Parse a body, in a thread if it has many values, whose memory is reserved. Raises `InvalidRequest`, `Overloaded`."""
        values = json_body.count_values(raw, self._options.max_json_values)
        memory.add(values * _BYTES_PER_VALUE)
        if values < _MANY_VALUES:
            return api.parse(raw, self._policy)
        return await asyncio.to_thread(api.parse, raw, self._policy)


def _flow(request: Request, caller: bytes, *, has_keys: bool) -> str:
    """Return who shares capacity fairly with others: the owner of an API key, or an address if there are no keys.

    Without keys, credentials are free to choose: a caller with many of them would be many callers.
    """
    if has_keys:
        return caller.hex()[:32]
    return _network(request.client.host) if request.client else ""


def _network(host: str) -> str:
    """Return an address; for IPv6 its network of 64 bits, all of which one machine has."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a trusted proxy may write what it likes
        return host
    if isinstance(address, ipaddress.IPv4Address) or address.ipv4_mapped:
        return host
    return str(ipaddress.IPv6Network((int(address), _IPV6_PREFIX_BITS), strict=False))
