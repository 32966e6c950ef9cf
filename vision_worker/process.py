"""A vision worker's parts and their wiring, from reading the weights to the stop."""

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager

from common import rpc
from common.checkpoint import Checkpoint
from common.metrics import serve_metrics
from common.phases import Phases
from common.tracing import Trace
from protos import vision_pb2_grpc
from vision_worker import encoder as encoders
from vision_worker.batcher import Batcher
from vision_worker.cache.base import open_cache
from vision_worker.cache.embedding_cache import EmbeddingCache
from vision_worker.config import VisionOptions
from vision_worker.delivery import SinkChannels
from vision_worker.metrics import Metrics
from vision_worker.preprocessing import resampling
from vision_worker.service import Service

log = logging.getLogger("dvd.vision")

_GRACE_SECONDS = 10.0
"""Time for calls in flight to finish after a signal."""


async def run(options: VisionOptions, checkpoint: Checkpoint, phases: Phases) -> str | None:
    """Read the weights, warm up, serve until a signal or until the device is lost, and stop.

    Returns: the device if it was lost; the process must then be restarted.
    """
    log.info("%s from %s", checkpoint.description.family, checkpoint.path)
    with phases.phase("reading weights", "the disk, or a network file system, is slow"):
        encoder = encoders.load(options, checkpoint)
    placement = encoder.placement
    max_tiles = encoders.max_batch_tiles(options, placement.device)
    metrics, trace = Metrics(), Trace(options.trace, "vision")
    metrics.common.set_model(checkpoint.fingerprint, checkpoint.description.family, placement.dtype_name)
    async with AsyncExitStack() as stack:
        batcher = await stack.enter_async_context(Batcher(encoder, max_tiles, metrics, trace))
        await _warm_up(batcher, f"{max_tiles} tiles on {placement.device}", options.vision_compile, phases)
        prepare_threads = stack.enter_context(_thread_pool(options.prepare_threads or os.cpu_count() or 1))
        stack.callback(trace.flush)
        cache = await stack.enter_async_context(EmbeddingCache(open_cache(options.cache)))
        metrics.watch(cache)
        sinks = await stack.enter_async_context(SinkChannels())
        service = Service(
            encoder=encoder, batcher=batcher, sinks=sinks, cache=cache, prepare_threads=prepare_threads,
            max_pixels=options.max_image_pixels, metrics=metrics, trace=trace,
        )  # fmt: skip
        stop = _stop_signal()
        await stack.enter_async_context(_serve(service, options, metrics))
        log.info("ready on %s after %s", options.listen, phases.summary())
        await _wait_for_any(stop, batcher.device_lost)
    return str(placement.device) if batcher.device_lost.is_set() else None


async def _warm_up(batcher: Batcher, what: str, compiles: bool, phases: Phases) -> None:
    with phases.phase("compiling the preprocessing", "numba compiles it once for each machine"):
        await asyncio.to_thread(resampling.warm_up)
    name = f"compiling the tower and warming up with {what}" if compiles else f"warming up with {what}"
    with phases.phase(name, "each batch size is compiled once" if compiles else "the first batch allocates memory"):
        await batcher.warm_up()


@asynccontextmanager
async def _serve(service: Service, options: VisionOptions, metrics: Metrics) -> AsyncIterator[None]:
    """Serve gRPC and metrics; on leaving, accept no new calls and let those in flight end."""
    server = rpc.create_server(options.listen)
    vision_pb2_grpc.add_VisionServicer_to_server(service, server)
    if options.metrics_port:
        serve_metrics(metrics.registry, options.metrics_port)
    lag_task = asyncio.create_task(metrics.common.measure_loop_lag())
    await server.start()
    try:
        yield
    finally:
        lag_task.cancel()
        log.info("stopping: %.0f s for calls in flight", _GRACE_SECONDS)
        await server.stop(_GRACE_SECONDS)


@contextmanager
def _thread_pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that decode and tile images. On leaving, images that wait for a thread are dropped."""
    executor = ThreadPoolExecutor(threads, "prepare")
    try:
        yield executor
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


async def _wait_for_any(*events: asyncio.Event) -> None:
    tasks = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


def _stop_signal() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop
