"""From a parsed request to its response: images are fetched, embeddings delivered, and the request is forwarded to vLLM."""

import time
from contextlib import AsyncExitStack

from starlette.responses import JSONResponse, Response

from common import errors
from common.tracing import Trace
from server import vllm_response
from server.apis.request import ParsedRequest
from server.config import GatewayOptions
from server.http.streaming import StreamWithResources
from server.media.loader import ImageFile, MediaLoader
from server.metrics import Metrics, StreamTimer
from server.placement import EmbeddingPlacer, EngineRequest
from server.request_context import RequestContext
from server.retry import with_retry
from server.token_counts import token_counts
from server.workers.probes import WorkerPools


class Pipeline:
    """Serves parsed requests. The parts that it calls do not call it back."""

    def __init__(
        self, options: GatewayOptions, workers: WorkerPools, media: MediaLoader, metrics: Metrics, trace: Trace
    ) -> None:
        self._options, self._workers, self._media, self._metrics, self._trace = options, workers, media, metrics, trace
        self._placer = EmbeddingPlacer(options, workers, metrics, trace)

    async def answer(self, request: ParsedRequest, context: RequestContext) -> Response:
        """Return vLLM's response.

        The request is retried once if an embedding was evicted, or if its language worker is down or fails and there is
        another one.
        """
        await self._check_model(request.model)
        request, files = await self._load_media(request, context)
        exclude = [worker for worker in self._workers.language.workers if not _serves(worker.models, request.model)]

        async def attempt(is_last: bool) -> Response:
            engine_request = await self._placer.place(request, files, context, exclude)
            with engine_request.language.marking_down_if_gone():
                async with engine_request.language.giving_up_if_hung():
                    response = await self._forward(engine_request, context)
            if is_last or response.status_code < 500:
                return response
            if await self._placer.lost_embedding(engine_request):
                raise errors.EmbeddingLost("An embedding was evicted before vLLM read it; retry later.")
            exclude.append(engine_request.language)
            if all(worker in exclude for worker in self._workers.language.available()):
                return response
            raise errors.EngineFailed(vllm_response.ENGINE_ERROR_MESSAGE)

        def may_retry(error: errors.DvdError) -> bool:
            # a worker that does not answer has been marked down, so a retry needs another one
            if isinstance(error, errors.EmbeddingLost | errors.EngineFailed):
                return True
            return isinstance(error, errors.Unavailable) and bool(self._workers.language.available())

        return await with_retry(attempt, may_retry)

    async def count_image_tokens(self, request: ParsedRequest, context: RequestContext) -> Response:
        """Return tiles and visual tokens of images. A vision worker is called only if the request asks for the routes."""
        await self._check_model(request.model)
        request, files = await self._load_media(request, context)
        sizes = await self._media.sizes(files)
        _, description = self._placer.choose_language(files, context)
        routes = await self._placer.route(request, files, context) if request.body.get("route") else None
        options = [image.options for image in request.images]
        return JSONResponse(token_counts(sizes, options, description.checkpoint, self._options.max_tiles, routes))

    async def _check_model(self, name: str | None) -> None:
        """Check that a language worker serves a model, before any work on images. Raises `ModelNotFound`, `Unavailable`."""
        language = self._workers.language
        language.pick(None)

        def is_served() -> bool:
            return any(_serves(worker.models, name) for worker in language.available())

        for _ in range(2):  # an adapter may be new, and a round of probes that already runs may have missed it
            if is_served():
                return
            await self._workers.probe()
        if not is_served():
            served = ", ".join(sorted({model for worker in language.available() for model in worker.models}))
            raise errors.ModelNotFound(f"Model {name!r:.200} is not served; served models: {served}.", param="model")

    async def _load_media(self, request: ParsedRequest, context: RequestContext) -> tuple[ParsedRequest, list[ImageFile]]:
        if not request.images:
            return request, []
        with self._metrics.stage("fetch", context.stats), self._trace.span("fetch"):
            request, files = await self._media.load(request)
        self._metrics.images.inc(len(files))
        return request, files

    async def _forward(self, request: EngineRequest, context: RequestContext) -> Response:
        """Send a request to vLLM and return its response, a stream from its first event with content on.

        Raises:
            WorkerUnavailable: vLLM went away before it answered.
            DeadlineExceeded: The deadline passed.
        """
        stats = context.stats
        stats.images, stats.error_code = vars(request.report) if request.keys else {}, None
        report_header = {"X-DvD-Images": request.report.header()} if request.keys else {}
        async with AsyncExitStack() as resources:
            resources.enter_context(request.language.track_in_flight())
            resources.enter_context(self._trace.span("answer", request=stats.request_id))
            # a second more than the request has left, since the request's own deadline must fire first
            timeout = context.deadline - time.monotonic() + 1
            headers = {"Content-Type": "application/json", "X-Request-Id": stats.request_id}
            stats.mark_sent_to_engine()
            with self._metrics.stage("engine", stats):
                response = await resources.enter_async_context(
                    request.language.client.request("POST", context.path, request.body, headers, timeout)
                )
                content_type = response.headers.get("Content-Type", "application/json")
                if response.status != 200:
                    failure = vllm_response.Failure.parse(response.status, await vllm_response.read_all(response))
                    return _error_response(failure, context, report_header)
                if not content_type.startswith("text/event-stream"):
                    body = await vllm_response.read_all(response)
                    if request.keys:
                        body = vllm_response.add_image_tokens(body, request.report.tokens)
                    return Response(body, media_type=content_type, headers=report_header)
                stream = vllm_response.EventStream(
                    response,
                    StreamTimer(self._metrics, stats),
                    context.error_format,
                    request.report.tokens,
                    self._options.stream_keep_alive,
                )
                if stream_failure := await stream.start():
                    return _error_response(stream_failure, context, report_header)
            resources.enter_context(self._metrics.stage("stream", stats))
            # moved to the request here: the deadline may pass before the handler gets the response
            context.resources.push_async_exit(resources.pop_all())
            return StreamWithResources(stream.events(), media_type=content_type, headers=report_header)


def _serves(models: tuple[str, ...], name: str | None) -> bool:
    return name is None or name in models


def _error_response(failure: vllm_response.Failure, context: RequestContext, headers: dict[str, str]) -> Response:
    context.stats.error_code = failure.code
    return JSONResponse(context.error_format.body(failure.body), status_code=failure.status, headers=headers)
