"""What the gateway answers over HTTP."""

import asyncio
import contextlib
import hashlib
import hmac
import importlib.metadata
import re
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack
from typing import Any, TypeVar

import aiohttp
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from common import errors, logs
from common.tracing import Trace
from protos import vision_pb2 as pb
from server import vllm_response
from server.apis.chat import parse_chat, parse_tokenize
from server.apis.image_options import Allowed
from server.apis.image_tokens import parse_images
from server.apis.messages import parse_messages
from server.apis.request import Asked, parse_text
from server.apis.responses import parse_responses
from server.config import GatewayOptions
from server.http import error_format
from server.http.error_format import Shape
from server.media.fetch import Fetcher, inspect
from server.metrics import Listener, Metrics
from server.pipeline import Pipeline, Prepared, counted
from server.request_stats import Account, Caller
from server.token_counts import costs
from server.workers.pool import Language, Workers

T = TypeVar("T")

_ENGINE_METRICS = 16 << 20
"""Bytes of vLLM's metrics that are passed on at most."""


class HeldStream(StreamingResponse):
    """A streamed answer that gives back what is held with its last byte, also where not one was sent."""

    held: AsyncExitStack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self.held:
            await super().__call__(scope, receive, send)


Parse = Callable[[bytes, Allowed], Asked]
Answer = Callable[[Asked, Caller], Coroutine[Any, Any, Response]]


class Routes:
    """The handlers and what they share. Make it inside the event loop; `close` it."""

    def __init__(self, options: GatewayOptions, metrics: Metrics) -> None:
        self._options, self._metrics = options, metrics
        self._workers = Workers(options.vision_workers, options.language_workers, metrics)
        self._fetcher = Fetcher(options)
        self._trace = Trace(options.trace, "gateway")
        self._pipeline = Pipeline(options, self._workers, self._fetcher, metrics, self._trace)
        router = pb.Router(
            mode=options.vir.upper(),
            relative_threshold=options.vir_relative_threshold,
            absolute_threshold=options.vir_absolute_threshold,
        )
        self._allowed = Allowed(options.max_images, router, options.allow_vir)
        self._key = options.api_key.get_secret_value() if options.api_key else None
        self._in_flight = 0

    async def meet(self) -> None:
        """Ask all workers once: a process that listens before that would refuse what it can serve."""
        await self._workers.probe()

    async def close(self) -> None:
        await self._fetcher.close()
        await self._workers.close()
        self._trace.flush()

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        return await self._serve(request, parse_chat, self._answer)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions: text only."""
        return await self._serve(request, parse_text, self._answer)

    async def responses(self, request: Request) -> Response:
        """POST /v1/responses"""
        return await self._serve(request, parse_responses, self._answer)

    async def messages(self, request: Request) -> Response:
        """POST /v1/messages and /v1/messages/count_tokens: Anthropic's."""
        return await self._serve(request, parse_messages, self._answer)

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize"""
        return await self._serve(request, parse_tokenize, self._answer)

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize"""
        return await self._serve(request, parse_text, self._answer)

    async def image_tokens(self, request: Request) -> Response:
        """POST /v1/images/tokens: what images would cost. Only to route them is a vision worker asked."""
        return await self._serve(request, parse_images, self._measure)

    async def models(self, request: Request) -> Response:
        """GET /v1/models"""
        self._authenticate(request)
        language = self._workers.language.pick(None)
        with language.held():
            listed = await language.client.get("/v1/models", self._options.request_timeout)
        for model in listed["data"]:
            model["root"] = model["id"]  # the engine says a path of its machine
        return JSONResponse(listed)

    async def version(self, _request: Request) -> Response:
        """GET /version"""
        said: dict[str, Any] = {"version": importlib.metadata.version("dvd-serve"), "engine": None}
        with contextlib.suppress(errors.DvdError):
            language = self._workers.language.pick(None)
            with language.held():
                said["engine"] = (await language.client.get("/version", 5))["version"]
        return JSONResponse(said)

    async def live(self, _request: Request) -> Response:
        """GET /health/live: this process runs."""
        return JSONResponse({"status": "live"})

    async def ready(self, _request: Request) -> Response:
        """GET /health/ready: an image request would be served now; every worker is asked for it."""
        answered = zip(("vision", "language"), await self._workers.probe(), strict=True)
        wanting = [f"no {kind} worker answers" for kind, there in answered if not there]
        wanting += [mismatch.in_full] if (mismatch := self._workers.mismatch()) else []
        body = {"status": "not ready" if wanting else "ready", "reasons": wanting}
        return JSONResponse(body, status_code=503 if wanting else 200)

    async def metrics(self, _request: Request) -> Response:
        """GET /metrics"""
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def engine_metrics(self, request: Request) -> Response:
        """GET /metrics/engine/{index}: vLLM's own of one language worker, which may listen where nobody else can ask it."""
        said, workers = request.path_params["index"], self._workers.language.members
        if not said.isdecimal() or len(said) > 9 or int(said) >= len(workers):
            raise errors.InvalidRequest(f"no language worker {said[:50]!r}: they are numbered from 0 to {len(workers) - 1}")
        worker = workers[int(said)]
        with worker.held():
            text = await worker.client.text("/metrics", 10, _ENGINE_METRICS)
        return Response(text, media_type="text/plain; version=0.0.4")

    async def _serve(self, request: Request, parse: Parse, answer: Answer) -> Response:
        """From the permit to the first byte of the answer; the permit goes back with the last one."""
        async with AsyncExitStack() as held:
            held.enter_context(self._permit())
            who, seconds = self._authenticate(request), self._timeout(request)
            # not request.url: that is made of the Host header, which could name any path of the engine
            path, account = request.scope["path"], request.scope["account"]
            caller = Caller(who, path, account, time.monotonic() + seconds, held)
            try:
                async with asyncio.timeout(seconds):
                    with self._metrics.stage("receive", account):
                        asked = parse(await self._body(request), self._allowed)
                    await self._check_model(asked.model)
                    made = await _unless_gone(request, answer(asked, caller))
            except TimeoutError:
                raise errors.DeadlineExceeded("the request's time is up; ask for less, or allow it more time") from None
            if isinstance(made, HeldStream):
                made.held = held.pop_all()
        return made

    @contextlib.contextmanager
    def _permit(self) -> Iterator[None]:
        if self._in_flight >= self._options.max_in_flight:
            raise errors.Overloaded(f"{self._in_flight} requests are being served, which is the most; try again", retry_after=1)
        self._in_flight += 1
        self._metrics.in_flight.set(self._in_flight)
        try:
            yield
        finally:
            self._in_flight -= 1
            self._metrics.in_flight.set(self._in_flight)

    def _authenticate(self, request: Request) -> bytes:
        """Who asks, as a digest: part of every key. Raises `Unauthorized`."""
        said = request.headers.get("authorization", "")
        if not said and "x-api-key" in request.headers:  # as Anthropic's clients send it
            said = f"Bearer {request.headers['x-api-key']}"
        if self._key is not None:
            scheme, _, key = said.partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._key.encode()):
                raise errors.Unauthorized("missing or wrong API key: send it as 'Authorization: Bearer …'")
        return hashlib.sha256(said.encode()).digest()

    def _timeout(self, request: Request) -> float:
        """Seconds this request may take: the server's limit, or less where the caller says so."""
        said = request.headers.get("x-request-timeout")
        if said is None:
            return self._options.request_timeout
        if not re.fullmatch(r"\d{1,6}(\.\d{1,3})?", said) or not float(said):
            raise errors.InvalidRequest(f"X-Request-Timeout must be seconds above 0, got {said[:50]!r}")
        return min(float(said), self._options.request_timeout)

    async def _body(self, request: Request) -> bytes:
        limit, size = self._options.max_body_bytes, 0
        body = bytearray()
        async for chunk in request.stream():
            size += len(chunk)
            if size <= limit:
                body += chunk
            elif size > 2 * limit:
                break  # till here it is read and dropped: who is cut off while sending may never see the answer
        if size > limit:
            raise errors.BodyTooLarge(f"the body has more than {limit} bytes: send fewer or smaller images, or URLs")
        return bytes(body)

    async def _check_model(self, name: str | None) -> None:
        """Before any work on images. Raises `ModelNotFound`, `Unavailable`."""
        if not self._workers.language.up():
            self._workers.language.pick(None)
        if name is None or self._serves(name):
            return
        for _ in range(2):  # an adapter may have been loaded since, and a probe that is under way have begun before that
            await self._workers.probe()
            if self._serves(name):
                return
        served = sorted({model for worker in self._workers.language.up() for model in worker.models})
        raise errors.ModelNotFound(f"no model {name[:200]!r} here; served: {', '.join(served)}", param="model")

    def _serves(self, name: str) -> bool:
        return any(name in worker.models for worker in self._workers.language.up())

    async def _measure(self, asked: Asked, caller: Caller) -> Response:
        asked, images = await self._pipeline.fetch(asked, caller)
        sizes = [await asyncio.to_thread(inspect, image.data, self._options.max_image_pixels) for image in images]
        _, said = self._pipeline.choose(images, caller)
        routes = await self._pipeline.route(asked, images, caller) if asked.body.get("route") else None
        dials = [image.dial for image in asked.images]
        return JSONResponse(costs(sizes, dials, said.checkpoint, self._options.max_tiles, routes))

    async def _answer(self, asked: Asked, caller: Caller) -> Response:
        """The engine's answer. One more try where an embedding was lost, or a language worker is not there any more."""
        asked, images = await self._pipeline.fetch(asked, caller) if asked.images else (asked, [])
        others = [worker for worker in self._workers.language.members if asked.model not in (None, *worker.models)]
        for last in (False, True):
            try:
                prepared = await self._pipeline.prepare(asked, images, caller, without=others)
                with _put_aside(prepared.language):
                    answer = await self._ask(prepared, caller)
            except errors.Unavailable:
                # what did not answer has been put aside until it does; is there another one?
                if last or not self._workers.language.up():
                    raise
                continue
            if last or answer.status_code < 500 or not await self._pipeline.lost(prepared):
                break
        return answer

    async def _ask(self, prepared: Prepared, caller: Caller) -> Response:
        account, shape, tokens = caller.account, error_format.of(caller.path), prepared.report.tokens
        account.images, account.error = vars(prepared.report) if prepared.names else {}, None
        report = {"X-DvD-Images": prepared.report.header()} if prepared.names else {}
        headers = {"Content-Type": "application/json", "X-Request-Id": account.identity}
        async with AsyncExitStack() as mine:
            mine.enter_context(counted(prepared.language))
            mine.enter_context(self._trace.span("answer", request=account.identity))
            # a little later than the request's own deadline, which is the one to be heard before the answer begins
            timeout = caller.deadline - time.monotonic() + 1
            account.handed_over()
            with self._metrics.stage("engine", account):
                answer = await mine.enter_async_context(
                    prepared.language.client.request("POST", caller.path, prepared.body, headers, timeout)
                )
                kind = answer.headers.get("Content-Type", "application/json")
                if answer.status != 200:
                    error = vllm_response.normalised(answer.status, await _whole(answer))
                    return _failed(answer.status, error, shape, report, account)
                if not kind.startswith("text/event-stream"):
                    body = await _whole(answer)
                    said = vllm_response.with_image_tokens(body, tokens) if tokens else body
                    return Response(said, media_type=kind, headers=report)
                stream = vllm_response.Stream(
                    answer, Listener(self._metrics, account), shape, tokens, self._options.stream_keep_alive
                )
                if failure := await stream.begin():
                    return _failed(*failure, shape, report, account)
            mine.enter_context(self._metrics.stage("stream", account))
            # with the caller at once, not in the answer: a deadline may still come before that is returned
            caller.held.push_async_exit(mine.pop_all())
            return HeldStream(stream.events(), media_type=kind, headers=report)


def _failed(status: int, body: dict[str, Any], shape: Shape, headers: dict[str, str], account: Account) -> Response:
    """The engine's error, in OpenAI's object."""
    account.error = body["error"]["code"]
    return JSONResponse(shape.body(body), status_code=status, headers=headers)


def identity(request: Request) -> str:
    """The caller's X-Request-Id where it is harmless, else a new one."""
    said = request.headers.get(logs.REQUEST_ID_KEY, "")
    return said if logs.is_valid_request_id(said) else uuid.uuid4().hex


@contextlib.contextmanager
def _put_aside(worker: Language) -> Iterator[None]:
    """A worker that does not answer gets nothing more until it answers a probe."""
    try:
        yield
    except errors.Unavailable:
        worker.said = None
        raise


async def _whole(answer: Any) -> bytes:
    try:
        body: bytes = await answer.read()
    except aiohttp.ClientError:
        raise errors.Unavailable("the language worker went away before its answer was whole; try again") from None
    return body


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the caller leaves: nobody else watches the socket before an answer begins."""
    working, watching = asyncio.create_task(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
