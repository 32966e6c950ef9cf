"""Cost of the gateway in front of vLLM's own server, with a fake engine that answers immediately.

vLLM's server has one core; the load generator and the gateway share the other. The headline uses streamed text-only requests.
Measured too: the latency of one request at a time, 500 concurrent streams, and small requests during uploads of 8 MB.
"""

import asyncio
import multiprocessing
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks import checkpoint, load, processes
from benchmarks.options import Options
from benchmarks.result import Result, median_ratio
from dvd.plan.simulation import percentile
from tests.ports import free_port

TOKENS = 8
IN_FLIGHT = 32
STREAMS, STREAM_TOKENS = 500, 40
LATENCY_REQUESTS = 300
SMALL_REQUESTS = 200
LARGE_BODY_BYTES = 8 << 20
UPLOADERS = 2
_UPLOAD_START_SECONDS = 3
"""Time until all uploaders have started."""


def run(options: Options) -> Result:
    """Measure the gateway. The headline is requests/s through the gateway over direct ones; the target is 0.9."""
    with tempfile.TemporaryDirectory(prefix="dvd-bench-") as name, ExitStack() as servers:
        folder = Path(name)
        cores, model = processes.available_cores(), checkpoint.write_checkpoint(folder / "medium")
        port = free_port()
        servers.enter_context(processes.vision_worker(folder, model, cores[:1], "--vision-backend=fake"))
        servers.enter_context(processes.fake_language_worker(folder, model, cores[-1:], port, "float32"))
        gateway = servers.enter_context(processes.gateway(folder, cores[:1]))
        return asyncio.run(_measure({"gateway": gateway.url, "direct": f"http://127.0.0.1:{port}"}, model.name, options))


async def _measure(urls: dict[str, str], model: str, options: Options) -> Result:
    count = 400 if options.quick else 2000
    rates: dict[str, list[float]] = {name: [] for name in urls}
    for repeat in range(options.repeats(5) + 1):
        for name, url in urls.items():
            bodies = [load.chat_body(model, f"Hello {i}", tokens=TOKENS) for i in range(count)]
            rate = load.throughput(await load.run_closed_loop(url, bodies, IN_FLIGHT))
            if repeat:  # the first is the warm-up
                rates[name].append(rate)
    latencies = {name: await _latencies(url, model, LATENCY_REQUESTS) for name, url in urls.items()}
    ratio, spread = median_ratio(rates["gateway"], rates["direct"])
    figures: dict[str, Any] = {
        "requests/s": {name: round(statistics.median(repeats), 1) for name, repeats in rates.items()},
        "latency added, ms": {
            f"{int(100 * p)}": round(1e3 * (percentile(latencies["gateway"], p) - percentile(latencies["direct"], p)), 3)
            for p in (0.5, 0.99)
        },
        f"{STREAMS} streams at once": {name: await _measure_streams(url, model) for name, url in urls.items()},
        "small requests p99, ms": await _measure_during_uploads(urls["gateway"], model),
    }
    return Result("gateway", ratio, 0.9, spread, figures)


async def _latencies(url: str, model: str, count: int) -> list[float]:
    """End-to-end latencies in seconds of `count` requests, one at a time."""
    bodies = [load.chat_body(model, f"Hi {i}", tokens=1) for i in range(count)]
    return [timing.duration for timing in await load.run_closed_loop(url, bodies, 1)]


async def _measure_streams(url: str, model: str) -> dict[str, float]:
    """Number of streams that ended and their tokens/s, all started at once."""
    bodies = [load.chat_body(model, f"Hello {i}", tokens=STREAM_TOKENS) for i in range(STREAMS)]
    timings = await load.run_closed_loop(url, bodies, STREAMS)
    seconds = max(timing.ended_at for timing in timings) - min(timing.started_at for timing in timings)
    tokens = sum(len(timing.token_times) for timing in timings)
    return {"answered": len(timings), "tokens/s": round(tokens / seconds, 1)}


async def _measure_during_uploads(url: str, model: str) -> dict[str, float]:
    """99th percentile of small requests' latency in milliseconds, without and during continuous uploads of 8 MB.

    The uploaders are separate processes: an event loop that writes 8 MB delays its own small requests.
    """
    alone = percentile(await _latencies(url, model, SMALL_REQUESTS), 0.99)
    context = multiprocessing.get_context("spawn")
    uploaders = [context.Process(target=_upload_forever, args=(url, model), daemon=True) for _ in range(UPLOADERS)]
    for uploader in uploaders:
        uploader.start()
    await asyncio.sleep(_UPLOAD_START_SECONDS)
    during_uploads = percentile(await _latencies(url, model, SMALL_REQUESTS), 0.99)
    for uploader in uploaders:
        uploader.terminate()
    return {"alone": round(1e3 * alone, 2), "during uploads of 8 MB": round(1e3 * during_uploads, 2)}


def _upload_forever(url: str, model: str) -> None:
    """Send large bodies until terminated. The image is invalid, which the gateway notices only after parsing the body."""
    body = load.chat_body(model, "What is this?", ["data:image/png;base64," + "A" * LARGE_BODY_BYTES], 1)

    async def upload() -> None:
        async with aiohttp.ClientSession() as session:
            while True:
                await load.send(session, url, body)

    asyncio.run(upload())
