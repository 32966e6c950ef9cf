"""Endpoints for operators and clients' start-up: models, version, health, metrics."""

import contextlib
import importlib.metadata
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from common import errors
from server.config import GatewayOptions
from server.http.authentication import Authenticator
from server.metrics import Metrics
from server.shutdown import Shutdown
from server.workers.probes import WorkerPools
from server.workers.worker import LanguageWorker

_MAX_ENGINE_METRICS_BYTES = 16 << 20
_ENGINE_METRICS_TIMEOUT_SECONDS = 10
_VERSION_TIMEOUT_SECONDS = 5
_PROMETHEUS_TEXT = "text/plain; version=0.0.4"


class Operations:
    """Answers the requests of operators and of clients' start-up, with no work on images."""

    def __init__(
        self,
        options: GatewayOptions,
        authenticator: Authenticator,
        workers: WorkerPools,
        metrics: Metrics,
        shutdown: Shutdown,
    ) -> None:
        self._options, self._authenticator, self._workers, self._metrics = options, authenticator, workers, metrics
        self._shutdown = shutdown

    async def models(self, request: Request) -> Response:
        """List the models and adapters of a language worker (OpenAI)."""
        self._authenticator.authenticate(request.headers)
        return JSONResponse(await self._list_models(self._workers.language.pick(None)))

    async def model(self, request: Request) -> Response:
        """Describe one model or adapter (OpenAI)."""
        self._authenticator.authenticate(request.headers)
        name = request.path_params["model"]
        language, *_ = await self._workers.serving(name)
        models = (await self._list_models(language))["data"]
        if model := next((model for model in models if model["id"] == name), None):
            return JSONResponse(model)
        raise self._workers.model_not_found(name)  # it was removed since the last probe

    async def _list_models(self, language: LanguageWorker) -> Any:
        with language.in_use():
            models = await language.client.get("/v1/models", self._options.request_timeout)
        for model in models["data"]:
            model["root"] = model["id"]  # vLLM's root is a path of its machine
        return models

    async def version(self, _request: Request) -> Response:
        """Return the versions of the gateway and of vLLM."""
        engine = None
        with contextlib.suppress(errors.DvdError):
            language = self._workers.language.pick(None)
            with language.in_use():
                engine = (await language.client.get("/version", _VERSION_TIMEOUT_SECONDS))["version"]
        return JSONResponse({"version": importlib.metadata.version("dvd-serve"), "engine": engine})

    async def live(self, _request: Request) -> Response:
        """Return 200: this process runs."""
        return JSONResponse({"status": "live"})

    async def ready(self, _request: Request) -> Response:
        """Return 200 if an image request would be served now, 503 with the reasons if not.

        The last probes decide: a new round would take its whole timeout wherever one worker hangs.
        """
        if self._shutdown.is_draining:
            return JSONResponse({"status": "draining", "reasons": ["the gateway is shutting down"]}, status_code=503)
        pools = (self._workers.vision, self._workers.language)
        reasons = [f"no {pool.kind} worker answers" for pool in pools if not pool.available()]
        if mismatch := self._workers.mismatch():
            reasons.append(mismatch.details)
        body: dict[str, Any] = {"status": "not ready" if reasons else "ready", "reasons": reasons}
        if warnings := [warning for warning in self._workers.warnings() if warning not in reasons]:
            body["warnings"] = warnings
        return JSONResponse(body, status_code=503 if reasons else 200)

    async def metrics(self, _request: Request) -> Response:
        """Return the gateway's metrics in Prometheus' text format."""
        return Response(self._metrics.text(), media_type=_PROMETHEUS_TEXT)

    async def engine_metrics(self, request: Request) -> Response:
        """Return the metrics of a language worker's vLLM, which may listen where Prometheus cannot reach it."""
        index, workers = request.path_params["index"], self._workers.language.workers
        if not index.isdecimal() or len(index) > 9 or int(index) >= len(workers):
            raise errors.InvalidRequest(
                f"Language worker {index[:50]!r} does not exist: expected a number from 0 to {len(workers) - 1}."
            )
        worker = workers[int(index)]
        with worker.in_use():
            text = await worker.client.text("/metrics", _ENGINE_METRICS_TIMEOUT_SECONDS, _MAX_ENGINE_METRICS_BYTES)
        return Response(text, media_type=_PROMETHEUS_TEXT)
