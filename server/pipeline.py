"""From a parsed request to its response: images are fetched, embeddings delivered, and the request is forwarded to vLLM."""

import logging
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack

from starlette.responses import JSONResponse, Response

from common import errors
from common.grants import NO_GRANTS, GrantSigner
from common.tracing import Trace
from server import context_length, vllm_response
from server.apis.constraints import constraint_field
from server.apis.request import ParsedRequest
from server.config import GatewayOptions
from server.http.streaming import STREAM_HEADERS, StreamWithResources
from server.media.image_file import ImageFile
from server.media.loader import MediaLoader
from server.metrics import Metrics, StreamTimer
from server.placement import EmbeddingPlacer, EngineRequest
from server.request_context import RequestContext
from server.retry import RetryBudget, with_retry
from server.token_counts import fewest_tokens, most_tokens, token_counts
from server.vision_queue import VisionQueue
from server.waits import check_wait
from server.workers.probes import WorkerPools
from server.workers.worker import LanguageWorker

log = logging.getLogger(__name__)

_HEALTH_TIMEOUT_SECONDS = 5.0
"""Time in which vLLM must answer to count as healthy after an internal error."""


class Pipeline:
    """Serves parsed requests. The parts that it calls do not call it back."""

    def __init__(
        self,
        options: GatewayOptions,
        workers: WorkerPools,
        media: MediaLoader,
        metrics: Metrics,
        trace: Trace,
        grants: GrantSigner = NO_GRANTS,
    ) -> None:
        self._options, self._workers, self._media, self._metrics, self._trace = options, workers, media, metrics, trace
        self._budget = RetryBudget(options.retry_share, metrics)
        queue = VisionQueue(workers.vision, options.max_queue_seconds, metrics)
        workers.on_change(queue.dispatch)
        self._placer = EmbeddingPlacer(options, workers, queue, self._budget, metrics, trace, grants)

    async def answer(self, request: ParsedRequest, context: RequestContext) -> Response:
        """Return vLLM's response.

        The request is retried once if an embedding was evicted, or if its language worker is down or fails and there is
        another one.
        """
        serving = await self._workers.serving(request.model)
        limit = _context_tokens(serving)
        context_length.check_texts(request, limit, self._options.max_prompt_characters)
        if limit is not None:
            context_length.check_max_tokens(request.body, context.max_tokens_fields, limit)
        context_length.check_output_tokens(request, context, limit, self._options.max_output_tokens)
        request, files = await self._load_media(request, context)
        if limit is not None and files and context.max_tokens_fields:
            self._check_images_fit(request, files, context, limit)
        self._check_language_wait(serving, context)
        exclude = [worker for worker in self._workers.language.workers if not worker.serves(request.model)]
        failed: list[LanguageWorker] = []
        attempts = 0

        async def attempt(is_last: bool) -> Response:
            nonlocal attempts
            attempts += 1
            engine_request = await self._placer.place(request, files, context, exclude, is_retry=attempts > 1)
            language = engine_request.language
            # outside: a vision worker that is gone does not mark the language worker down
            async with engine_request.encoding():
                await engine_request.wait_until_useful()
                with language.marking_down_if_gone():
                    async with language.giving_up_if_hung():
                        response = await self._forward(engine_request, request, context)
            if response.status_code < 500:
                language.record_served()
                for worker in failed:  # only now: had all failed, the request would be to blame
                    self._workers.language.record_failure(worker)
                return response
            is_lost = await self._placer.lost_embedding(engine_request)
            if is_lost and not is_last:
                raise errors.EmbeddingLost("An embedding was evicted before vLLM read it; retry later.")
            exclude.append(language)
            failed.append(language)
            if not is_last and any(worker not in exclude for worker in self._workers.language.available()):
                raise errors.EngineFailed(vllm_response.ENGINE_ERROR_MESSAGE)
            if not is_lost and response.status_code == 500:
                await _check_constraint(request, language)
            return response

        def may_retry(error: errors.DvdError) -> bool:
            # a worker that does not answer has been marked down, so a retry needs another one
            if isinstance(error, errors.EmbeddingLost | errors.EngineFailed):
                return True
            return isinstance(error, errors.Unavailable) and any(
                worker not in exclude for worker in self._workers.language.available()
            )

        return await with_retry(attempt, may_retry, self._budget)

    def _check_language_wait(self, serving: Sequence[LanguageWorker], context: RequestContext) -> None:
        """Check that a request does not wait too long in vLLM. Raises `Overloaded`."""
        wait, left = min(worker.wait_seconds for worker in serving), context.deadline - time.monotonic()
        check_wait("language", "the request", wait, self._options.max_queue_seconds, left, self._metrics)

    async def count_image_tokens(self, request: ParsedRequest, context: RequestContext) -> Response:
        """Return tiles and visual tokens of images. A vision worker is called only if the request asks for the routes."""
        await self._workers.serving(request.model)
        request, files = await self._load_media(request, context)
        _, description = self._placer.choose_language(files, context)
        routes = await self._placer.route(request, files, context) if request.body.get("route") else None
        sizes, options = [file.size for file in files], [image.options for image in request.images]
        return JSONResponse(token_counts(sizes, options, description.checkpoint, self._options.max_tiles, routes))

    def _check_images_fit(self, request: ParsedRequest, files: list[ImageFile], context: RequestContext, limit: int) -> None:
        """Check before anything is encoded that the images alone do not exceed the context. Raises `ContextLengthExceeded`."""
        _, description = self._placer.choose_language(files, context)
        checkpoint, options = description.checkpoint, [image.options for image in request.images]
        if most_tokens(options, checkpoint, self._options.max_tiles) > limit:
            tokens = fewest_tokens([file.size for file in files], options, checkpoint, self._options.max_tiles)
            context_length.check_images(request, tokens, limit, bool(checkpoint.compressed_tokens_per_tile))

    async def _load_media(self, request: ParsedRequest, context: RequestContext) -> tuple[ParsedRequest, list[ImageFile]]:
        if not request.images:
            return request, []
        with self._metrics.stage("fetch", context.stats), self._trace.span("fetch"):
            request, files = await self._media.load(request, context.reserve_bytes)
        self._metrics.images.inc(len(files))
        return request, files

    async def _forward(self, request: EngineRequest, parsed: ParsedRequest, context: RequestContext) -> Response:
        """Send a request to vLLM and return its response, a stream from its first event with content on.

        It is returned when all images are encoded, unless vLLM rejects the request.

        Args:
            request: The request as vLLM gets it.
            parsed: The same as the caller has sent it.
            context: Its context.

        Raises:
            WorkerUnavailable: vLLM went away before it answered.
            DeadlineExceeded: The deadline passed.
        """
        stats = context.stats
        stats.images, stats.error_code = vars(request.report) if request.report else {}, None
        async with AsyncExitStack() as resources:
            resources.enter_context(request.language.generating(parsed.sequences))
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
                    failure = vllm_response.Failure.parse(response.status, await vllm_response.read_error(response))
                    if failure.status >= 500:
                        await self._wait_until_encoded(request, context)  # it may be due to an image
                    return _error_response(failure.about(parsed.body, context.max_tokens_fields), context, request.headers())
                if not content_type.startswith("text/event-stream"):
                    body = await vllm_response.read_all(response)
                    await self._wait_until_encoded(request, context)
                    if request.keys:
                        body = vllm_response.add_image_tokens(body, request.image_tokens)
                    return Response(body, media_type=content_type, headers=request.headers())
                stream = vllm_response.EventStream(
                    response,
                    StreamTimer(self._metrics, stats),
                    context.error_format,
                    request.image_tokens,
                    self._options.stream_keep_alive,
                )
                stream_failure = await stream.start()
                await self._wait_until_encoded(request, context)
                if stream_failure:
                    return _error_response(
                        stream_failure.about(parsed.body, context.max_tokens_fields), context, request.headers()
                    )
            resources.enter_context(self._metrics.stage("stream", stats))
            # moved to the request here: the deadline may pass before the handler gets the response
            context.resources.push_async_exit(resources.pop_all())
            stream_headers = {**STREAM_HEADERS, **request.headers()}
            return StreamWithResources(stream.events(), stream.stop, media_type=content_type, headers=stream_headers)

    @staticmethod
    async def _wait_until_encoded(request: EngineRequest, context: RequestContext) -> None:
        await request.wait_until_encoded()
        context.stats.images = vars(request.report) if request.report else {}


async def _check_constraint(request: ParsedRequest, language: LanguageWorker) -> None:
    """Raise `InvalidRequest` if an internal error of vLLM is due to a constraint: a healthy engine could not compile it."""
    field = constraint_field(request.body)
    if field is None or not await language.client.is_healthy(_HEALTH_TIMEOUT_SECONDS):
        return
    log.warning("vLLM failed on a request with %s, which counts as invalid", field)
    raise errors.InvalidRequest(
        f"vLLM cannot apply {field}: a schema, regular expression or grammar in it is invalid, refers to itself, or is too "
        f"complex. Simplify it, or omit {field}.",
        param=field,
    )


def _context_tokens(workers: Sequence[LanguageWorker]) -> int | None:
    """Return the longest context among language workers; None if one of them does not report it."""
    lengths = [worker.context_tokens for worker in workers]
    return max((length for length in lengths if length), default=None) if all(lengths) else None


def _error_response(failure: vllm_response.Failure, context: RequestContext, headers: dict[str, str]) -> Response:
    context.stats.error_code = failure.code
    return JSONResponse(context.error_format.body(failure.body), status_code=failure.status, headers=headers)
