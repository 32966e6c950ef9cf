"""Overload: ten times the images that the server can encode. Goodput, refusals, latency of text requests, and recovery.

A real vision worker with a core of its own; the language worker's engine is a fake with a fixed pace, so that images are the
bottleneck. Requests arrive at random times, whether or not the server keeps up, once with a deadline and once without.
"""

import asyncio
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks import checkpoint, load, processes
from benchmarks.options import Options
from benchmarks.result import Result, spread_of
from dvd.plan.simulation import percentile

OVERLOAD = 10
IN_FLIGHT = 6
"""Requests at once that saturate the vision worker."""
TEXT_PER_SECOND = 5.0
MAX_QUEUE_SECONDS = 4.0
"""The gateway's default."""
DEADLINE_SECONDS = 10
TOKENS = 4
IMAGE_SIZE = (448, 448)
IMAGES = 200
"""Number of different images. Each request with one has options of its own, so that no embedding is reused."""
_TIME_TO_SATURATE = 5.0
_PAUSE_SECONDS = 0.5
_ADDRESSES = {"peak": "127.0.0.2", "many": "127.0.0.3", "one": "127.0.0.4"}
"""Addresses of callers, by which the gateway tells them apart."""


@dataclass
class Phase:
    """Requests of one kind under overload, and when they were sent."""

    timings: list[load.RequestTiming]
    started_at: float
    ended_at: float

    def goodput(self) -> float:
        """Requests per second that were answered in time, without the time until the queue was full."""
        first, last = self.started_at + _TIME_TO_SATURATE, self.ended_at
        good = [t for t in self.timings if not t.error and first <= t.ended_at <= last]
        return len(good) / (last - first)

    def codes(self) -> dict[str, int]:
        """Number of requests by status."""
        codes: dict[str, int] = {}
        for timing in self.timings:
            code = timing.error.partition(":")[0] or "200"
            codes[code] = codes.get(code, 0) + 1
        return codes


def run(options: Options) -> Result:
    """Measure overload with and without deadlines. The headline is the lower goodput over the peak; the target is 0.9."""
    cores = processes.available_cores()
    with tempfile.TemporaryDirectory(prefix="dvd-bench-") as name, ExitStack() as servers:
        folder = Path(name)
        model = checkpoint.write_checkpoint(folder / "medium")
        servers.enter_context(processes.image_bound_workers(folder, model, cores))
        gateway = servers.enter_context(processes.gateway(folder, cores[-1:], f"--max-queue-seconds={MAX_QUEUE_SECONDS:g}"))
        return asyncio.run(_measure(gateway.url, model.name, options))


async def _measure(url: str, model: str, options: Options) -> Result:
    seconds, bodies = (20.0 if options.quick else 40.0), _bodies(model)
    await load.run_closed_loop(url, itertools.islice(bodies, IN_FLIGHT), IN_FLIGHT)  # warms up
    peaks = [await _peak(url, bodies, seconds / 2) for _ in range(options.repeats(3))]
    peak = statistics.median(peaks)
    idle = await _text(url, model, seconds / 2)
    figures: dict[str, Any] = {"peak, requests/s": round(peak, 2), "text p99 without images, ms": _p99_ms(idle)}
    figures["a caller beside one with 90 % of the traffic"] = await _fairness(url, bodies, seconds / 2)
    ratios = []
    for name, headers in (("with deadlines", {"X-Request-Timeout": str(DEADLINE_SECONDS)}), ("without deadlines", {})):
        images, text = await _overload(url, model, bodies, OVERLOAD * peak, seconds, headers)
        refused = [timing.duration for timing in images.timings if timing.error.startswith("429")]
        answered = [timing.duration for timing in images.timings if not timing.error]
        ratios.append(images.goodput() / peak)
        figures[name] = {
            "goodput over peak": round(ratios[-1], 3),
            "answers": images.codes(),
            "latency of answered requests p50 and p99, s": [round(percentile(answered, p), 2) for p in (0.5, 0.99)],
            "time to refuse p50, ms": round(1e3 * statistics.median(refused), 1) if refused else None,
            "text p99, ms": _p99_ms(text.timings),
            "text errors": text.codes(),
            "recovery, s": round(await _recovery(url, bodies), 2),
        }
    return Result("overload", min(ratios), 0.9, spread_of(peaks), figures)


def _bodies(model: str) -> Iterator[bytes]:
    """Requests with an image each, none of them equal."""
    images = [load.image_url(seed, *IMAGE_SIZE) for seed in range(IMAGES)]
    for number in itertools.count():
        # another threshold is another embedding
        router = {"mode": "auto", "relative_threshold": round(0.2 + number // IMAGES * 1e-4, 6)}
        yield load.chat_body(model, f"What is shown? {number}", [images[number % IMAGES]], TOKENS, vir=router)


async def _peak(url: str, bodies: Iterator[bytes], seconds: float) -> float:
    """Requests per second of a closed loop that keeps the vision worker busy."""
    timings = await closed_loop(url, bodies, seconds, IN_FLIGHT, "peak")
    answered = [timing for timing in timings if not timing.error.startswith("429")]  # a slow tower refuses some of them
    return load.throughput([load.require_success(timing) for timing in answered])


async def closed_loop(
    url: str, bodies: Iterator[bytes], seconds: float, in_flight: int, caller: str
) -> list[load.RequestTiming]:
    """Keep requests of one caller in flight for a time. After a refused one there is a pause."""
    timings: list[load.RequestTiming] = []
    end = time.monotonic() + seconds

    async def sender(session: aiohttp.ClientSession) -> None:
        while time.monotonic() < end:
            timings.append(await load.send(session, url, next(bodies)))
            if timings[-1].error:
                await asyncio.sleep(_PAUSE_SECONDS)

    async with open_session({}, _ADDRESSES[caller]) as session:
        await asyncio.gather(*(sender(session) for _ in range(in_flight)))
    return timings


def open_session(headers: dict[str, str], address: str = "127.0.0.1") -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, local_addr=(address, 0)), headers=headers)


async def _overload(
    url: str, model: str, bodies: Iterator[bytes], rate: float, seconds: float, headers: dict[str, str]
) -> tuple[Phase, Phase]:
    """Send requests with images at `rate`, and requests without at the same time. Returns both kinds."""
    ready = list(itertools.islice(bodies, int(rate * seconds)))  # made before, so that the generator keeps up
    started = time.monotonic()
    texts = asyncio.create_task(_text(url, model, seconds))
    images = await open_loop(url, ready, rate, headers)
    ended = started + seconds
    return Phase(images, started, ended), Phase(await texts, started, ended)


async def open_loop(url: str, bodies: Sequence[bytes], rate: float, headers: dict[str, str]) -> list[load.RequestTiming]:
    """Send requests with Poisson arrivals; refused ones are part of the result."""
    async with open_session(headers) as session:
        return await load.arrivals(session, url, bodies, rate)


async def _fairness(url: str, bodies: Iterator[bytes], seconds: float) -> dict[str, float]:
    """Median latency in seconds of a caller with one request at a time: on an idle server, and next to a caller with many."""
    alone = await _median_latency(url, bodies, seconds)
    crowd = asyncio.create_task(closed_loop(url, bodies, seconds + 2, 5 * IN_FLIGHT, "many"))
    await asyncio.sleep(2)
    crowded = await _median_latency(url, bodies, seconds)
    await crowd
    return {"alone": round(alone, 2), "beside": round(crowded, 2), "ratio": round(crowded / alone, 2)}


async def _median_latency(url: str, bodies: Iterator[bytes], seconds: float) -> float:
    timings = await closed_loop(url, bodies, seconds, 1, "one")
    return statistics.median(load.require_success(timing).duration for timing in timings)


async def _text(url: str, model: str, seconds: float) -> list[load.RequestTiming]:
    """Requests without images, at a low rate."""
    count = int(TEXT_PER_SECOND * seconds)
    return await open_loop(url, [load.chat_body(model, f"Hello {i}", tokens=TOKENS) for i in range(count)], TEXT_PER_SECOND, {})


async def _recovery(url: str, bodies: Iterator[bytes]) -> float:
    """Seconds until a request with an image is answered as fast as on an idle server: in at most 1.5 times the time."""
    started, durations = time.monotonic(), []
    async with load.open_session() as session:
        for _ in range(60):
            timing = await load.send(session, url, next(bodies))
            durations.append((timing.ended_at - started, timing.duration if not timing.error else float("inf")))
            if timing.error:
                await asyncio.sleep(0.2)
    usual = statistics.median(duration for _, duration in durations[-20:])
    return next(ended for ended, duration in durations if duration <= 1.5 * usual)


def _p99_ms(timings: Sequence[load.RequestTiming]) -> float:
    durations = [timing.duration for timing in timings if not timing.error]
    return round(1e3 * percentile(durations, 0.99), 1) if durations else float("nan")
