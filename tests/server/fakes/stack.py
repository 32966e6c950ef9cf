"""A gateway that listens on a real port in this process, with fake workers and an HTTP client."""

import asyncio
import contextlib
import io
import json
import re
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import uvicorn

from server.apis.base import Api
from server.apis.registry import APIS
from server.app import create_app
from server.config import GatewayOptions
from server.http.connections import Connections
from server.http.protocol import uvicorn_config
from server.metrics import Metrics
from tests.server.fakes.language_worker import FakeLanguageWorker, FakeSink
from tests.server.fakes.requests import chat
from tests.server.fakes.vision_worker import FakeVisionWorker
from tests.server.fakes.vllm import FakeVLLM
from tests.server.fakes.waiting import TIMEOUT_SECONDS, wait_until


@dataclass
class Response:
    """A complete response of the gateway."""

    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        """The parsed body."""
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object in OpenAI's format; an AssertionError where the body is in another format."""
        error: dict[str, Any] = self.json["error"]
        assert set(self.json) == {"error"}
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert isinstance(error["message"], str)
        assert isinstance(error["type"], str)
        assert isinstance(error["code"], str)
        return error


class Stack:
    """A gateway at a port, its fake workers, and an HTTP client."""

    def __init__(
        self,
        vision_workers: list[FakeVisionWorker],
        language_workers: list[FakeLanguageWorker],
        session: aiohttp.ClientSession,
        port: int,
    ) -> None:
        self.vision_workers, self.language_workers, self._session, self.port = vision_workers, language_workers, session, port
        self.url = f"http://127.0.0.1:{port}"

    @property
    def vision(self) -> FakeVisionWorker:
        """The first vision worker."""
        return self.vision_workers[0]

    @property
    def sink(self) -> FakeSink:
        """The sink of the first language worker."""
        return self.language_workers[0].sink

    @property
    def engine(self) -> FakeVLLM:
        """The HTTP server of the first language worker."""
        return self.language_workers[0].engine

    async def request(self, method: str, path: str, **options: Any) -> Response:
        """Sends a request and reads the whole response. `options` are those of aiohttp."""
        async with self._session.request(method, f"{self.url}{path}", **options) as response:
            return Response(response.status, response.headers, await response.read())

    async def get(self, path: str, **options: Any) -> Response:
        """Sends a GET request."""
        return await self.request("GET", path, **options)

    async def post(self, body: Any, headers: dict[str, str] | None = None, path: str = "/v1/chat/completions") -> Response:
        """Sends a POST request with these bytes, or with this value as JSON."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        data = io.BytesIO(raw)  # aiohttp warns about large bytes
        return await self.request("POST", path, data=data, headers={"Content-Type": "application/json", **(headers or {})})

    async def chat(self, *content: Any, headers: dict[str, str] | None = None, **fields: Any) -> Response:
        """Sends a chat request with one user message."""
        return await self.post(chat(*content, **fields), headers)

    async def start_chat(self, body: Any, headers: str = "") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Sends a whole chat request and does not read the response."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\nHost: a\n{headers}Content-Length: {len(raw)}\n\n"
        return await self.send_raw(head, raw)

    async def send_raw(self, head: str, body: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Opens a connection and sends these bytes. Each line feed in `head` becomes a CR LF."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(head.replace("\n", "\r\n").encode("latin-1") + body)
        await writer.drain()
        return reader, writer

    async def metric(self, name: str) -> float:
        """Returns the sum of all samples whose lines begin with `name`."""
        lines = (await self.get("/metrics")).body.decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(re.escape(name) + r"[ {,}]", line))

    async def wait_for_metric(self, name: str, value: float) -> None:
        """Waits until a metric has this value."""

        async def matches() -> bool:
            return await self.metric(name) == value

        await wait_until(matches, f"{name} is {value}")

    async def wait_until_idle(self) -> None:
        """Waits until no request is in flight."""
        await self.wait_for_metric("dvd_requests_in_flight", 0)

    async def wait_until_ready(self) -> None:
        """Waits until the gateway reports that it is ready."""

        async def is_ready() -> bool:
            return (await self.get("/health/ready")).status == 200

        await wait_until(is_ready, "the gateway is ready")

    async def wait_until_not_ready(self) -> Response:
        """Waits until the gateway reports that it is not ready, and returns this response."""
        responses: list[Response] = []

        async def is_not_ready() -> bool:
            responses.append(await self.get("/health/ready"))
            return responses[-1].status == 503

        await wait_until(is_not_ready, "the gateway is not ready")
        return responses[-1]


@contextlib.asynccontextmanager
async def start_stack(
    folder: Path,
    vision: int | list[FakeVisionWorker] = 1,
    language: int | list[FakeLanguageWorker] = 1,
    apis: tuple[Api, ...] = APIS,
    **options: Any,
) -> AsyncIterator[Stack]:
    """Starts workers and a gateway, and yields them when the gateway is ready.

    Args:
        folder: Folder for the workers' Unix sockets.
        vision: Number of vision workers, or the workers.
        language: Number of language workers, or the workers.
        apis: The APIs of the gateway.
        options: Fields of GatewayOptions.
    """
    vision_workers = vision if isinstance(vision, list) else _vision_workers(folder, vision)
    language_workers = language if isinstance(language, list) else [FakeLanguageWorker(folder, i) for i in range(language)]
    workers: list[FakeVisionWorker | FakeLanguageWorker] = [*vision_workers, *language_workers]
    for worker in workers:
        await worker.start()
    addresses = {
        "vision_workers": [worker.address for worker in vision_workers],
        "language_workers": [worker.sink.address for worker in language_workers],
    }
    listening = socket.create_server(("127.0.0.1", 0))
    gateway_options = GatewayOptions(**{**addresses, **options})
    metrics = Metrics()
    connections = Connections(gateway_options.max_connections, gateway_options.head_timeout, metrics)
    config = uvicorn_config(
        create_app(gateway_options, apis, metrics=metrics),
        1,
        connections,
        gateway_options.trusted_proxies,
        timeout_keep_alive=gateway_options.keep_alive_timeout,
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
    try:
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            stack = Stack(vision_workers, language_workers, session, listening.getsockname()[1])
            await wait_until(lambda: server.started or serving.done(), "the gateway listens")
            await stack.wait_until_ready()
            yield stack
    finally:
        server.should_exit = True
        await serving
        for worker in workers:
            await worker.stop()


def _vision_workers(folder: Path, count: int) -> list[FakeVisionWorker]:
    return [FakeVisionWorker(f"unix:{folder}/vision-{i}") for i in range(count)]
