"""`python -m vision_worker MODEL`: starts one vision worker and stops it. Contains only the wiring."""

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager

from common import logs, rpc
from common.checkpoint import Checkpoint, CheckpointError
from common.hub import find_checkpoint
from common.metrics import serve_metrics
from common.options import ConfigError, read_options
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


class DeviceLostError(Exception):
    """The device is lost: this process can no longer compute anything on it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one vision worker until a signal.

    Returns: the exit status; 2 for an invalid option, 1 where the worker cannot serve, 0 after a signal.
    """
    try:
        options = read_options(VisionOptions, sys.argv[1:] if arguments is None else arguments)
        logs.configure(options.log_level, options.log_format)
        checkpoint = find_checkpoint(options.model, "vision", weights=options.load_format == "auto")
        asyncio.run(_run(options, checkpoint))
    except ConfigError as error:
        return _print_error(error, 2)
    except (CheckpointError, DeviceLostError, OSError) as error:
        return _print_error(error, 1)
    except KeyboardInterrupt:
        pass
    return 0


def _print_error(error: Exception, status: int) -> int:
    print(f"dvd vision: {error}", file=sys.stderr)
    return status


async def _run(options: VisionOptions, checkpoint: Checkpoint) -> None:
    """Load, warm up, serve until a signal or until the device is lost, and stop."""
    started = time.monotonic()
    log.info("loading %s from %s", checkpoint.description.family, checkpoint.path)
    encoder = encoders.load(options, checkpoint)
    placement = encoder.placement
    max_tiles = encoders.max_batch_tiles(options, placement.device)
    log.info("warming up with %d tiles on %s after %.1f s", max_tiles, placement.device, time.monotonic() - started)
    metrics, trace = Metrics(), Trace(options.trace, "vision")
    metrics.common.set_model(checkpoint.fingerprint, checkpoint.description.family, placement.dtype_name)
    async with AsyncExitStack() as stack:
        batcher = await stack.enter_async_context(Batcher(encoder, max_tiles, metrics, trace))
        await asyncio.to_thread(resampling.warm_up)
        await batcher.warm_up()
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
        log.info("ready on %s after %.1f s", options.listen, time.monotonic() - started)
        await _wait_for_any(stop, batcher.device_lost)
    if batcher.device_lost.is_set():
        raise DeviceLostError(f"device {placement.device} is no longer usable: restart this worker")


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


if __name__ == "__main__":
    sys.exit(main())
