"""Makes vLLM's `/health` fail while the engine makes no progress. By itself it fails only if the engine's process has ended."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vllm import SamplingParams
from vllm.platforms import current_platform
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from lm_worker.engine import core_processes
from lm_worker.engine_processes import ProcessTree
from lm_worker.progress import GPU_SILENCE_SECONDS, SILENCE_SECONDS, Progress
from lm_worker.shared_memory import seconds_since_waiting

log = logging.getLogger("dvd.language")

_INTERVAL_SECONDS = 1.0
_SILENCE_BEFORE_SEARCH_SECONDS = 1.5
"""Silence after which the engine's descendants are searched anew: it may wait for a compiler."""


class Watchdog:
    """Async context manager: within the block it watches an engine once a second, and replaces its `check_health`.

    An engine that is silent is sent a call that its loop answers between two steps. It computes nothing, and appears in no
    log, metric or cache.
    """

    def __init__(self, engine: AsyncLLM, progress_timeout: float, folder: Path) -> None:
        """Prepare to watch an engine.

        Args:
            engine: The engine; it has started.
            progress_timeout: See `Progress`.
            folder: The sink's shared memory, where the engine notes that all its work waits for embeddings.
        """
        self._engine, self._folder = engine, folder
        silence = SILENCE_SECONDS if current_platform.is_cpu() else GPU_SILENCE_SECONDS
        self._progress = Progress(time.monotonic(), progress_timeout, silence)
        self._processes = ProcessTree(process.pid for process in core_processes(engine) if process.pid is not None)
        self._call: asyncio.Task[None] | None = None
        self._kv_cache_usage: float | None = None
        self._stall: str | None = None
        self._stalled_at = 0.0

    async def __aenter__(self) -> Self:
        self._replace(self._engine, "check_health", self._check_health_with)
        self._replace(self._engine.engine_core, "get_output_async", self._get_output_with)
        self._watching = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        tasks = [task for task in (self._watching, self._call) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @staticmethod
    def _replace(owner: object, name: str, wrapper: Callable[[Any], Awaitable[Any]]) -> None:
        original = getattr(owner, name)
        setattr(owner, name, lambda: wrapper(original))

    async def _check_health_with(self, original: Callable[[], Awaitable[None]]) -> None:
        await original()
        if self._stall:
            raise EngineDeadError

    async def _get_output_with(self, original: Callable[[], Awaitable[EngineCoreOutputs]]) -> EngineCoreOutputs:
        outputs = await original()
        self._record(outputs)
        return outputs

    def _record(self, outputs: EngineCoreOutputs) -> None:
        """Note the output of a step. One without tokens counts as progress if it has filled the KV cache: a long prefill."""
        stats = outputs.scheduler_stats
        usage = stats.kv_cache_usage if stats else self._kv_cache_usage
        record = (
            self._progress.record_token if outputs.outputs or usage != self._kv_cache_usage else self._progress.record_message
        )
        self._kv_cache_usage = usage
        record(time.monotonic())

    async def _watch(self) -> None:
        while not self._engine.errored:  # vLLM itself reports a dead engine
            try:
                await self._observe()
            except Exception:
                log.exception("watching the engine failed")
            await asyncio.sleep(_INTERVAL_SECONDS)

    async def _observe(self) -> None:
        now, unfinished = time.monotonic(), self._engine.get_num_unfinished_requests()
        if seconds_since_waiting(self._folder) < 2 * _INTERVAL_SECONDS:
            self._progress.record_token(now)  # it can generate none: the images are still being encoded
        search = self._progress.is_silent(now, _SILENCE_BEFORE_SEARCH_SECONDS)
        processes = await asyncio.to_thread(self._processes.read, find_descendants=search)
        self._report(now, self._progress.stall(now, unfinished, processes))
        if self._call is None or self._call.done():
            if self._progress.is_starved and not unfinished:
                self._call = asyncio.create_task(self._generate_one_token())
            elif self._progress.is_silent(now, _INTERVAL_SECONDS / 2):
                self._call = asyncio.create_task(self._call_engine())

    async def _call_engine(self) -> None:
        with contextlib.suppress(EngineDeadError):
            await self._engine.is_sleeping()
            self._progress.record_message(time.monotonic())

    async def _generate_one_token(self) -> None:
        """Find out whether an engine from which all requests have been withdrawn generates again."""
        prompt, parameters = {"prompt_token_ids": [0]}, SamplingParams(max_tokens=1)
        with contextlib.suppress(EngineDeadError):
            async for _ in self._engine.generate(prompt, parameters, f"progress-{time.monotonic_ns()}"):
                pass

    def _report(self, now: float, stall: str | None) -> None:
        if stall and not self._stall:
            self._stalled_at = now
            log.error("the engine makes no progress, so /health is 503: %s", stall)
        elif self._stall and not stall:
            log.warning("the engine makes progress again after %.0f s", now - self._stalled_at)
        self._stall = stall
