"""A vision worker's parts and their wiring, from reading the weights to the stop."""

import asyncio
import contextlib
import logging
import math
import os
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import grpc.aio

from common import rpc
from common.admin import admin_of_worker
from common.checkpoint import Checkpoint
from common.decoder_processes import DecoderProcesses
from common.grants import GrantSigner
from common.metrics import serve_metrics
from common.phases import Phases
from common.probing import NOTICE_SECONDS
from common.security import Credentials
from common.tracing import Trace
from protos import vision_pb2_grpc
from vision_worker import encoder as encoders
from vision_worker.batcher import Batcher
from vision_worker.cache.base import open_cache
from vision_worker.cache.embedding_cache import EmbeddingCache
from vision_worker.config import VisionOptions
from vision_worker.delivery import SinkChannels
from vision_worker.liveness import IDLE_CPU_SECONDS, PREPARE_IDLE_CPU_SECONDS, Liveness, Watch
from vision_worker.metrics import Metrics
from vision_worker.prepare_threads import PrepareThreads
from vision_worker.preprocessing import image_decoder, tiling
from vision_worker.preprocessing.image_decoder import ImageDecoder
from vision_worker.service import Service

log = logging.getLogger("dvd.vision")

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_LOST_DEVICE_GRACE_SECONDS = 10.0
"""Time for calls in flight to finish once the device is lost: they deliver what was computed before, or fail."""

_SPARE_NICENESS = 15
"""Niceness of the threads of a spare worker that compute: about 3 % of a core that another process uses."""

_TIME_LIMIT_BATCHES = 10
"""A batch is not stalled before it has taken this many times as long as those before, whatever `--progress-timeout` is: on a
CPU, a batch of a large tower may take minutes."""


async def run(options: VisionOptions, checkpoint: Checkpoint, phases: Phases, credentials: Credentials) -> str | None:
    """Read the weights, warm up, serve until a signal or until the device is lost, and stop.

    After a signal, `Describe` reports that the worker is draining; calls are still accepted for a moment, and finished within
    `--shutdown-grace`. A second signal ends the process at once.

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
        on_thread_start = lower_priority if options.spare else lambda: None
        batcher = await stack.enter_async_context(Batcher(encoder, max_tiles, metrics, trace, on_thread_start))
        await _warm_up(batcher, f"{max_tiles} tiles on {placement.device}", options.vision_compile, phases)
        processes = DecoderProcesses(image_decoder.KIND, options.decode_memory, metrics.decoder)
        prepare_threads = stack.enter_context(
            PrepareThreads(options.prepare_threads or os.cpu_count() or 1, processes.cpu_seconds, on_thread_start)
        )
        stack.enter_context(processes)
        if not options.spare:  # else the threads that call them start them, so that they have their priority
            processes.start()
        stack.callback(trace.flush)
        cache = await stack.enter_async_context(EmbeddingCache(open_cache(options.cache, credentials.tls)))
        metrics.watch(cache)
        sinks = await stack.enter_async_context(SinkChannels(credentials))
        liveness = await stack.enter_async_context(
            watch_threads(batcher, prepare_threads, str(placement.device), options.progress_timeout)
        )
        draining = asyncio.Event()
        service = Service(
            encoder=encoder, decoder=ImageDecoder(processes, options.decode_timeout, options.max_image_pixels),
            batcher=batcher, sinks=sinks, cache=cache, prepare_threads=prepare_threads, liveness=liveness,
            draining=draining, metrics=metrics, trace=trace, grants=GrantSigner(credentials), is_spare=options.spare,
        )  # fmt: skip
        _set_on_signal(draining)
        stack.enter_context(admin_of_worker(options.admin, draining.set, draining.is_set, credentials))
        server = await stack.enter_async_context(_serve(service, options, metrics, credentials))
        log.info("ready on %s after %s", options.listen, phases.summary())
        grace_seconds = await _wait_for_end(draining, batcher.device_lost, options.shutdown_grace)
        log.info("stopping: %.0f s for calls in flight", grace_seconds)
        await server.stop(grace_seconds)
    if batcher.device_lost.is_set():
        return str(placement.device)
    if not (batcher.is_idle and prepare_threads.is_idle):
        # the interpreter would wait for these threads, for ever if they hang
        log.warning("ending although a thread is still busy; nobody waits for its result")
        logging.shutdown()
        os._exit(0)
    return None


def lower_priority() -> None:
    """Let the calling thread, and threads that it starts, compute only while the core has little else to do.

    The event loop keeps its priority: a worker that answers probes late would count as hung. The lowest priority is not used:
    a thread that holds the interpreter's lock would then stop the event loop as long as another process computes.
    """
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _SPARE_NICENESS)


def watch_threads(batcher: Batcher, prepare_threads: PrepareThreads, device: str, progress_timeout: float) -> Liveness:
    """Return the watch over all threads of a worker, not started. `progress_timeout` in seconds; 0: no limit for a batch."""

    def time_limit() -> float:
        return max(progress_timeout, _TIME_LIMIT_BATCHES * batcher.times.seconds_per_batch) if progress_timeout else math.inf

    return Liveness(
        Watch(f"a batch on {device}", lambda: batcher.progress, IDLE_CPU_SECONDS, time_limit),
        [Watch("decoding", lambda: prepare_threads.progress, PREPARE_IDLE_CPU_SECONDS, lambda: math.inf)],
        batcher.self_test,
    )


async def _warm_up(batcher: Batcher, what: str, compiles: bool, phases: Phases) -> None:
    with phases.phase("compiling the preprocessing", "numba compiles it once for each machine"):
        await asyncio.to_thread(tiling.warm_up)
    name = f"compiling the tower and warming up with {what}" if compiles else f"warming up with {what}"
    with phases.phase(name, "one layer is compiled for all" if compiles else "the first batch allocates memory"):
        await batcher.warm_up()


@asynccontextmanager
async def _serve(
    service: Service, options: VisionOptions, metrics: Metrics, credentials: Credentials
) -> AsyncIterator[grpc.aio.Server]:
    """Serve gRPC and metrics. On leaving, calls in flight are cancelled."""
    server = rpc.create_server(options.listen, credentials=credentials, on_refused=metrics.refused_calls.inc)
    vision_pb2_grpc.add_VisionServicer_to_server(service, server)
    if options.metrics_port:
        serve_metrics(metrics.registry, options.metrics_port)
    lag_task = asyncio.create_task(metrics.common.measure_loop_lag())
    await server.start()
    try:
        yield server
    finally:
        lag_task.cancel()
        await server.stop(0)


async def _wait_for_end(draining: asyncio.Event, device_lost: asyncio.Event, shutdown_grace: float) -> float:
    """Wait until the worker shall accept no more calls. Returns: the seconds in which those in flight must finish."""
    await _wait_for_any(draining, device_lost)
    if device_lost.is_set():
        return _LOST_DEVICE_GRACE_SECONDS
    notice = min(NOTICE_SECONDS, shutdown_grace)
    log.info("draining: calls are accepted for %.0f s more", notice)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(device_lost.wait(), notice)
    return shutdown_grace - notice


async def _wait_for_any(*events: asyncio.Event) -> None:
    tasks = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


def _set_on_signal(event: asyncio.Event) -> None:
    """Set `event` on the first SIGTERM or SIGINT. The second one has its default action, which ends the process at once."""
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        for number in _STOP_SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)  # for SIGINT, Python's default would only raise KeyboardInterrupt
        event.set()

    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, on_signal)
