"""`python -m vision_worker MODEL`: one vision worker. The wiring, and nothing else."""

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from common import logs, rpc
from common.checkpoint import CheckpointError, open_checkpoint
from common.metrics import serve_metrics
from common.options import ConfigError, read_options
from common.tracing import Trace
from protos import vision_pb2_grpc
from vision_worker import encoder as encoders
from vision_worker.batcher import Batcher
from vision_worker.cache.embedding_cache import EmbeddingCache, open_cache
from vision_worker.config import VisionOptions
from vision_worker.delivery import Sinks
from vision_worker.encoder import Encoder
from vision_worker.metrics import Metrics
from vision_worker.preprocessing import resampling
from vision_worker.service import Service

log = logging.getLogger("dvd.vision")

_GRACE = 10.0
"""Seconds that calls in flight have to end after a signal."""


class DeviceLost(Exception):
    """It computes nothing any more, and would not until the process is another one."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 2 for a bad option, 1 where the worker cannot serve, 0 after a signal."""
    try:
        options = read_options(VisionOptions, sys.argv[1:] if arguments is None else arguments)
        logs.configure(options.log_level, options.log_format)
        asyncio.run(_serve(options))
    except ConfigError as error:
        return _failed(error, 2)
    except (CheckpointError, DeviceLost, OSError) as error:
        return _failed(error, 1)
    except KeyboardInterrupt:
        pass
    return 0


def _failed(error: Exception, status: int) -> int:
    print(f"dvd vision: {error}", file=sys.stderr)
    return status


async def _serve(options: VisionOptions) -> None:
    begin = time.monotonic()
    checkpoint = open_checkpoint(options.model)
    log.info("loading %s from %s", checkpoint.description.family, checkpoint.path)
    encoder = encoders.load(options, checkpoint)
    tiles = encoders.batch_tiles(options, encoder.placement.device)
    log.info("warming %d tiles on %s after %.1f s", tiles, encoder.placement.device, time.monotonic() - begin)
    trace, metrics = Trace(options.trace, "vision"), Metrics()
    metrics.common.set_model(checkpoint.fingerprint, checkpoint.description.family, encoder.placement.dtype_name)
    async with Batcher(encoder, tiles, metrics, trace) as batcher:
        await asyncio.to_thread(resampling.warm)
        await batcher.warm()
        await _answer(options, encoder, batcher, metrics, trace, begin)


async def _answer(
    options: VisionOptions, encoder: Encoder, batcher: Batcher, metrics: Metrics, trace: Trace, begin: float
) -> None:
    sinks, server = Sinks(), rpc.create_server(options.listen)
    preparing = ThreadPoolExecutor(options.prepare_threads or os.cpu_count() or 1, "prepare")
    cache = EmbeddingCache(open_cache(options.cache))
    metrics.watch(cache)
    if options.metrics_port:
        serve_metrics(metrics.registry, options.metrics_port)
    watching = asyncio.create_task(metrics.common.measure_loop_lag())
    service = Service(encoder, batcher, sinks, cache, preparing, options.max_image_pixels, metrics, trace)
    vision_pb2_grpc.add_VisionServicer_to_server(service, server)
    stop = _on_signal()
    await server.start()
    log.info("ready on %s after %.1f s", options.listen, time.monotonic() - begin)
    await _first(stop, batcher.lost)
    watching.cancel()
    log.info("stopping: %.0f s for calls in flight", _GRACE)
    await server.stop(_GRACE)
    await sinks.close()
    await cache.close()
    trace.flush()
    preparing.shutdown(wait=False, cancel_futures=True)
    if batcher.lost.is_set():
        raise DeviceLost(f"device {encoder.placement.device} computes nothing any more: start this worker again")


async def _first(*events: asyncio.Event) -> None:
    waiting = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()


def _on_signal() -> asyncio.Event:
    """Set by SIGTERM or SIGINT."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


if __name__ == "__main__":
    sys.exit(main())
