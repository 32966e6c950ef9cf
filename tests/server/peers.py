"""Everything a gateway talks to, in this process but over real sockets: workers of both kinds, callers, servers of images."""

from __future__ import annotations  # grpc.aio is generic for type checkers only

import asyncio
import base64
import contextlib
import inspect
import io
import json
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import uvicorn
from aiohttp import web
from PIL import Image

from common import errors, rpc
from protos import embeddings_pb2 as pb
from protos import embeddings_pb2_grpc, vision_pb2, vision_pb2_grpc
from server.app import create_app
from server.config import GatewayOptions
from server.http.protocol import uvicorn_config

MODEL = "internvl"
PATIENCE = 60.0
"""Seconds until a test gives up waiting: only a failing test ever needs them."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def described(**changed: Any) -> pb.CheckpointDescription:
    """What a worker says of the checkpoint that all workers here serve."""
    right: dict[str, Any] = {
        "fingerprint": "f" * 64, "family": "InternVL", "width": 4, "tile_size": 448, "tokens_per_tile": 256,
        "compressed_tokens_per_tile": 64, "min_tiles": 1, "max_tiles": 12, "thumbnail": True,
    }  # fmt: skip
    return pb.CheckpointDescription(**{**right, **changed})


def tokens_of(image: bytes) -> int:
    """Visual tokens that the fake makes of an image: not the same for all, so that a mix-up shows."""
    return 64 + sum(image) % 1000


async def until(true: Callable[[], Any], what: str, patience: float = PATIENCE) -> None:
    """Wait for something that somebody else does; `true` may be asynchronous."""
    try:
        async with asyncio.timeout(patience):
            while not await _answer(true):  # what others do sets no event of ours
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"never came true: {what}") from None


async def _answer(true: Callable[[], Any]) -> Any:
    answer = true()
    return await answer if inspect.isawaitable(answer) else answer


class Vision(vision_pb2_grpc.VisionServicer):
    """A vision worker that encodes to zeros, and delivers them."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.checkpoint = described()
        self.calls: list[vision_pb2.EncodeRequest] = []
        self.cancelled = 0
        self.error: Exception | None = None
        self.cached = False  # what it says of its cache
        self.free = asyncio.Event()  # Encode waits for it
        self.free.set()
        self.answers = asyncio.Event()  # Describe waits for it
        self.answers.set()
        self._server: Any = None

    async def start(self) -> None:
        self._server = rpc.create_server(self.address)
        vision_pb2_grpc.add_VisionServicer_to_server(self, self._server)
        await self._server.start()

    async def stop(self) -> None:
        if self._server:
            await self._server.stop(0)
            self._server = None

    async def Describe(self, request: Any, context: Any) -> vision_pb2.VisionDescription:  # noqa: N802
        await self.answers.wait()
        return vision_pb2.VisionDescription(checkpoint=self.checkpoint, device="cpu", dtype=pb.FLOAT32)

    async def Encode(self, request: vision_pb2.EncodeRequest, context: Any) -> vision_pb2.EncodeReply:  # noqa: N802
        self.calls.append(request)
        try:
            await self.free.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        if not request.dry_run:
            await asyncio.gather(*(self._deliver(request, image) for image in request.images))
        images = [_encoded(image, request.router.mode) for image in request.images]
        return vision_pb2.EncodeReply(images=images, cached=self.cached)

    async def _deliver(self, request: vision_pb2.EncodeRequest, image: vision_pb2.Image) -> None:
        rows = tokens_of(image.data)
        header = pb.EmbeddingHeader(
            key=image.key, fingerprint=request.fingerprint, dtype=request.dtype, rows=rows, width=4, length=rows * 16
        )

        async def parts() -> AsyncIterator[pb.DeliverChunk]:
            yield pb.DeliverChunk(header=header)
            yield pb.DeliverChunk(data=bytes(header.length))

        channel = rpc.open_channel(request.deliver_to)
        with rpc.translate_errors("sink"):
            await embeddings_pb2_grpc.EmbeddingSinkStub(channel).Deliver(parts())
        await channel.close()

    @property
    def images(self) -> list[bytes]:
        """Bytes of every image that was sent, in order of the calls."""
        return [image.data for call in self.calls for image in call.images]


def _encoded(image: vision_pb2.Image, mode: int) -> vision_pb2.EncodedImage:
    compressed = [mode == vision_pb2.Router.ALL, mode != vision_pb2.Router.OFF]
    return vision_pb2.EncodedImage(
        key=image.key, tokens=tokens_of(image.data), columns=1, rows=1, compressed=compressed, scores=[0.1, 0.9]
    )


class Sink(embeddings_pb2_grpc.EmbeddingSinkServicer):
    """Keeps of every embedding its number of rows."""

    def __init__(self, address: str, http: str) -> None:
        self.address, self.http = address, http
        self.checkpoint = described()
        self.rows: dict[str, int] = {}
        self.dtype: int = pb.FLOAT32
        self.answers = asyncio.Event()
        self.answers.set()
        self._server: Any = None

    async def start(self) -> None:
        self._server = rpc.create_server(self.address)
        embeddings_pb2_grpc.add_EmbeddingSinkServicer_to_server(self, self._server)
        await self._server.start()

    async def stop(self) -> None:
        if self._server:
            await self._server.stop(0)
            self._server = None

    async def Describe(self, request: Any, context: Any) -> pb.LanguageDescription:  # noqa: N802
        await self.answers.wait()
        return pb.LanguageDescription(checkpoint=self.checkpoint, dtype=self.dtype, http=self.http)  # type: ignore[arg-type]

    async def Has(self, request: pb.HasRequest, context: Any) -> pb.HasReply:  # noqa: N802
        return pb.HasReply(tokens=[self.rows.get(key, 0) for key in request.keys])

    async def Deliver(self, request: AsyncIterator[pb.DeliverChunk], context: Any) -> pb.DeliverReply:  # noqa: N802
        parts = [part async for part in request]
        header, data = parts[0].header, b"".join(part.data for part in parts[1:])
        if len(data) != header.length:
            raise errors.InvalidRequest(f"{len(data)} bytes arrived of {header.length}")
        self.rows[header.key] = header.rows
        return pb.DeliverReply()


@dataclass
class Received:
    """A request as vLLM's server got it."""

    path: str
    headers: Any
    raw: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.raw)


COMPLETION = b'{"id": "chatcmpl-1",  "object":"chat.completion", "choices": [{"message": {"content": "\\u00e9"}}]}'
EVENTS = [b'data: {"n": 0}\n\n', b'data: {"n": 1, "text": "a"}\n\n', b'data: {"n": 2}\n\n', b"data: [DONE]\n\n"]


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
"""Of vLLM with two engines (data parallelism)."""


class Engine:
    """vLLM's HTTP server. `respond` decides what a completion gets."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.received: list[Received] = []
        self.respond: Handler = usual
        self.models: Any = {"object": "list", "data": [{"id": MODEL, "root": "/secret/folder"}]}
        self.metrics = METRICS
        self.answers = asyncio.Event()  # everything waits for it
        self.answers.set()
        self.left = 0  # callers who went before their answer was whole
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
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
        tcp = path == self.address
        site = web.TCPSite(self._runner, host.strip("[]"), int(port)) if tcp else web.UnixSite(self._runner, path)
        await site.start()

    async def stop(self) -> None:
        if self._runner:
            await self._runner.cleanup()
            self._runner = None

    async def _health(self, _request: web.Request) -> web.Response:
        await self.answers.wait()
        return web.Response()

    async def _version(self, _request: web.Request) -> web.Response:
        return web.json_response({"version": "0.0.1"})

    async def _metrics(self, request: web.Request) -> web.Response:
        """As prometheus-client's application does: those that `name[]` asks for, or all."""
        wanted = tuple(f"{name}{{" for name in request.query.getall("name[]", []))
        lines = [line for line in self.metrics.splitlines(keepends=True) if line.startswith(wanted or "")]
        answer = web.Response(text="".join(lines))
        answer.enable_compression()  # of whoever says that he can read it
        return answer

    async def _models(self, _request: web.Request) -> web.Response:
        return web.json_response(self.models)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        self.received.append(Received(request.path, request.headers, await request.read()))
        try:
            return await self.respond(request)
        except (asyncio.CancelledError, ConnectionResetError):
            self.left += 1
            raise

    def last(self) -> Any:
        """The JSON of the last request."""
        return self.received[-1].json


async def usual(request: web.Request) -> web.StreamResponse:
    """A completion, streamed where the request says so."""
    if (await request.json()).get("stream"):
        return await streamed(*EVENTS)(request)
    return web.Response(body=COMPLETION, content_type="application/json")


def streamed(*chunks: bytes, then: Handler | None = None) -> Handler:
    """Server-sent events as these chunks, and then an end, or something else."""

    async def respond(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await answer.prepare(request)
        for chunk in chunks:
            await answer.write(chunk)
            await asyncio.sleep(0.01)  # a chunk to the sender is a chunk to the receiver
        if then is not None:
            await then(request)
        return answer

    return respond


def failing(status: int, message: str = "/root/model.py line 7 failed", **changed: Any) -> Handler:
    """An error in vLLM's shape, whose code is a number."""

    async def respond(_request: web.Request) -> web.StreamResponse:
        error = {"message": message, "type": "InternalServerError", "param": None, "code": status, **changed}
        return web.json_response({"error": error}, status=status)

    return respond


async def hang(_request: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError


async def cut(request: web.Request) -> web.StreamResponse:
    """The connection breaks, as when a process dies."""
    assert request.transport is not None
    request.transport.abort()
    return await hang(request)


async def half_a_body(request: web.Request) -> web.StreamResponse:
    """The header of an answer, some of its body, and the end of the connection."""
    answer = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": "1000"})
    await answer.prepare(request)
    await answer.write(b'{"id": ')
    await asyncio.sleep(0.01)
    return await cut(request)


def in_turn(*handlers: Handler) -> Handler:
    """One handler a request, the last for all that follow."""
    waiting = list(handlers)

    async def respond(request: web.Request) -> web.StreamResponse:
        return await (waiting.pop(0) if len(waiting) > 1 else waiting[0])(request)

    return respond


class Language:
    """A language worker: sink and engine."""

    def __init__(self, folder: Path, number: int, sink: str = "", http: str = "") -> None:
        self.engine = Engine(http or f"unix:{folder}/http-{number}")
        self.sink = Sink(sink or f"unix:{folder}/sink-{number}", self.engine.address)

    async def start(self) -> None:
        await self.engine.start()
        await self.sink.start()

    async def stop(self) -> None:
        await self.sink.stop()
        await self.engine.stop()


@dataclass
class Answer:
    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's error object; an assertion where the body is none."""
        error: dict[str, Any] = self.json["error"]
        assert set(self.json) == {"error"}
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert isinstance(error["message"], str)
        assert isinstance(error["type"], str)
        assert isinstance(error["code"], str)
        return error


class Stack:
    """A gateway that serves over a port, its workers, and a caller."""

    def __init__(self, vision: list[Vision], language: list[Language], session: aiohttp.ClientSession, port: int) -> None:
        self.visions, self.languages, self._session, self.port = vision, language, session, port
        self.url = f"http://127.0.0.1:{port}"

    @property
    def vision(self) -> Vision:
        return self.visions[0]

    @property
    def sink(self) -> Sink:
        return self.languages[0].sink

    @property
    def engine(self) -> Engine:
        return self.languages[0].engine

    async def request(self, method: str, path: str, **rest: Any) -> Answer:
        async with self._session.request(method, f"{self.url}{path}", **rest) as answer:
            return Answer(answer.status, answer.headers, await answer.read())

    async def get(self, path: str, **rest: Any) -> Answer:
        return await self.request("GET", path, **rest)

    async def post(self, body: Any, headers: dict[str, str] | None = None, path: str = "/v1/chat/completions") -> Answer:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.request("POST", path, data=raw, headers={"Content-Type": "application/json", **(headers or {})})

    async def chat(self, *content: Any, headers: dict[str, str] | None = None, **fields: Any) -> Answer:
        return await self.post(chat(*content, **fields), headers)

    async def metric(self, name: str) -> float:
        """The sum of all lines that begin so."""
        lines = (await self.get("/metrics")).body.decode().splitlines()
        found = [float(line.rsplit(" ", 1)[1]) for line in lines if re.match(re.escape(name) + r"[ {,}]", line)]
        return sum(found)

    async def settled(self) -> None:
        """Return when no permit is out any more."""
        await self.counts("dvd_requests_in_flight", 0)

    async def counts(self, name: str, value: float) -> None:
        """Return when a metric has this value."""

        async def right() -> bool:
            return await self.metric(name) == value

        await until(right, f"{name} is {value}")

    async def ready(self) -> None:
        """Return when the gateway finds all it needs."""

        async def right() -> bool:
            return (await self.get("/health/ready")).status == 200

        await until(right, "ready")

    async def raw(self, head: str, body: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection on which this was sent."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(head.replace("\n", "\r\n").encode("latin-1") + body)
        await writer.drain()
        return reader, writer

    async def begin(self, body: Any, headers: str = "") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A chat request, sent whole; its answer is not read."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.raw(f"POST /v1/chat/completions HTTP/1.1\nHost: a\n{headers}Content-Length: {len(raw)}\n\n", raw)


@contextlib.asynccontextmanager
async def serve(
    folder: Path, vision: int | list[Vision] = 1, language: int | list[Language] = 1, **options: Any
) -> AsyncIterator[Stack]:
    """All of it, ready; so many workers, or these."""
    visions = vision if isinstance(vision, list) else [Vision(f"unix:{folder}/vision-{i}") for i in range(vision)]
    languages = language if isinstance(language, list) else [Language(folder, i) for i in range(language)]
    peers: list[Vision | Language] = [*visions, *languages]
    for peer in peers:
        await peer.start()
    chosen = GatewayOptions(
        **{"vision_workers": [v.address for v in visions], "language_workers": [w.sink.address for w in languages], **options}
    )
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn_config(create_app(chosen), shutdown_timeout=1))
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    try:
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=PATIENCE)) as session:
            stack = Stack(visions, languages, session, listening.getsockname()[1])
            await until(lambda: server.started or serving.done(), "the gateway listens")
            await stack.ready()
            yield stack
    finally:
        server.should_exit = True
        await serving
        for peer in peers:
            await peer.stop()


@contextlib.asynccontextmanager
async def files(**handlers: Handler) -> AsyncIterator[str]:
    """The URL of a server of files, on a private address: a handler a path."""
    app = web.Application()
    for name, handler in handlers.items():
        app.router.add_get(f"/{name}", handler)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.05)
    await runner.setup()
    listening = socket.create_server(("127.0.0.1", 0))
    await web.SockSite(runner, listening).start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        await runner.cleanup()


def sends(body: bytes, status: int = 200, **headers: str) -> Handler:
    async def respond(_request: web.Request) -> web.StreamResponse:
        return web.Response(body=body, status=status, headers={k.replace("_", "-"): v for k, v in headers.items()})

    return respond


def picture(number: int = 0, size: tuple[int, int] = (8, 8), kind: str = "PNG", mode: str = "RGB") -> bytes:
    """An image file, another one for each number."""
    image = Image.new(mode, size)
    image.putpixel((0, 0), (number % 256, number // 256, 7) if mode == "RGB" else number % 2)
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def inline(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image_part(data: bytes | str) -> dict[str, Any]:
    """A part with this image, or with the one at this URL."""
    return {"type": "image_url", "image_url": {"url": data if isinstance(data, str) else inline(data)}}


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def chat(*content: Any, **fields: Any) -> dict[str, Any]:
    """A request with one message: of these parts, or of a text."""
    said = content[0] if len(content) == 1 and isinstance(content[0], str) else list(content)
    return {"model": MODEL, "messages": [{"role": "user", "content": said}], **fields}
