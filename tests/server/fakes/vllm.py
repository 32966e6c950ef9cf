"""vLLM's HTTP server over a real socket. A test chooses what a completion request is answered with."""

import asyncio
import json
import re
import ssl
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from common.security import OPEN, Credentials
from tests.server.fakes.handlers import Handler, event_stream

MODEL = "internvl"
"""The name of the model that the fake serves."""

COMPLETION = b'{"id": "chatcmpl-1",  "object":"chat.completion", "choices": [{"message": {"content": "\\u00e9"}}]}'
"""The default response. Its spaces and escapes show whether the gateway passes it byte for byte."""

EVENTS = [b'data: {"n": 0}\n\n', b'data: {"n": 1, "text": "a"}\n\n', b'data: {"n": 2}\n\n', b"data: [DONE]\n\n"]
"""The default events of a streamed response."""

METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="internvl"} 3.0
vllm:num_requests_running{engine="1",model_name="internvl"} 2.0
vllm:num_requests_waiting{engine="0",model_name="internvl"} 7.0
vllm:num_requests_waiting{engine="1",model_name="internvl"} 1.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="internvl",reason="capacity"} 100.0
vllm:kv_cache_usage_perc{engine="0",model_name="internvl"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="internvl"} 0.5
vllm:prompt_tokens_total{engine="0",model_name="internvl"} 11.0
"""
"""The metrics of a vLLM with two engines (data parallelism)."""

IDLE_METRICS = METRICS.replace("} 7.0", "} 0.0").replace('model_name="internvl"} 1.0', 'model_name="internvl"} 0.0')
"""The same, but no request waits."""


@dataclass
class ReceivedRequest:
    """A request as vLLM's server received it."""

    path: str
    headers: Any
    raw: bytes

    @property
    def unsalted(self) -> bytes:
        """The body without the salt of the prefix cache, which the gateway puts first."""
        return re.sub(rb'^\{"cache_salt":"[0-9a-f]{64}",?', b"{", self.raw)

    @property
    def json(self) -> Any:
        """The parsed body without its salt."""
        return {name: value for name, value in json.loads(self.raw).items() if name != "cache_salt"}

    @property
    def cache_salt(self) -> Any:
        """The salt of the prefix cache."""
        return json.loads(self.raw).get("cache_salt")


async def default_response(request: web.Request) -> web.StreamResponse:
    """Responds with COMPLETION, or with EVENTS where the request sets `stream`."""
    if (await request.json()).get("stream"):
        return await event_stream(*EVENTS)(request)
    return web.Response(body=COMPLETION, content_type="application/json")


class FakeVLLM:
    """vLLM's HTTP server.

    Attributes:
        requests: All POST requests, in order of arrival.
        respond: The handler of POST requests, on whatever path.
        models: What GET /v1/models returns.
        metrics: What GET /metrics returns; at first, no request waits.
        responsive: GET /health waits for this event; it is set at first.
        disconnects: Number of POST requests whose caller left before the response was complete.
    """

    def __init__(self, address: str, credentials: Credentials = OPEN) -> None:
        self.address, self._credentials = address, credentials
        self.requests: list[ReceivedRequest] = []
        self.respond: Handler = default_response
        self.models: Any = {"object": "list", "data": [{"id": MODEL, "root": "/secret/folder"}]}
        self.metrics = IDLE_METRICS
        self.responsive = asyncio.Event()
        self.responsive.set()
        self.disconnects = 0
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Listens at the address, `host:port` or `unix:path`."""
        app = web.Application(client_max_size=1 << 30)
        app.router.add_get("/health", self._health)
        app.router.add_get("/version", self._version)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/metrics/", self._metrics)
        app.router.add_post("/{path:.*}", self._complete)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.05)
        await self._runner.setup()
        path = self.address.removeprefix("unix:")
        host, _, port = self.address.rpartition(":")
        is_tcp = path == self.address
        site = (
            web.TCPSite(self._runner, host.strip("[]"), int(port), ssl_context=self._tls())
            if is_tcp
            else web.UnixSite(self._runner, path)
        )
        await site.start()

    def _tls(self) -> ssl.SSLContext | None:
        tls = self._credentials.tls
        if tls is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(tls.ca))
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(tls.cert, tls.key)
        return context

    async def stop(self) -> None:
        """Closes all connections and stops listening; does nothing where the server is stopped."""
        if self._runner:
            await self._runner.cleanup()
            self._runner = None

    async def _health(self, _request: web.Request) -> web.Response:
        await self.responsive.wait()
        return web.Response()

    async def _version(self, _request: web.Request) -> web.Response:
        return web.json_response({"version": "0.0.1"})

    async def _metrics(self, request: web.Request) -> web.Response:
        """Like prometheus-client's application: the metrics that `name[]` selects, or all of them."""
        prefixes = tuple(f"{name}{{" for name in request.query.getall("name[]", []))
        lines = [line for line in self.metrics.splitlines(keepends=True) if line.startswith(prefixes or "")]
        response = web.Response(text="".join(lines))
        response.enable_compression()  # only where the request accepts an encoding
        return response

    async def _models(self, _request: web.Request) -> web.Response:
        return web.json_response(self.models)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(ReceivedRequest(request.path, request.headers, await request.read()))
        try:
            return await self.respond(request)
        except (asyncio.CancelledError, ConnectionResetError):
            self.disconnects += 1
            raise

    def last_json(self) -> Any:
        """Returns the parsed body of the last request."""
        return self.requests[-1].json
