"""Load generator: sends chat requests over HTTP and records when each began, when each token arrived and when it ended."""

import asyncio
import base64
import io
import json
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import aiohttp
from PIL import Image

from dvd.plan.simulation import share_in_window

_REQUEST_TIMEOUT_SECONDS = 900
_READ_BUFFER_BYTES = 1 << 20


Url = str | Iterator[str]
"""Base URL of a server; or an endless iterator of URLs, of which each request takes the next one."""


@dataclass
class RequestTiming:
    """Times of one request in seconds of the monotonic clock. A token's time is when its event was read."""

    started_at: float
    token_times: list[float] = field(default_factory=list)
    ended_at: float = 0.0
    """0 while the request is in flight, or if it was cancelled."""
    error: str = ""

    @property
    def ttft(self) -> float:
        """Time to first token in seconds."""
        return self.token_times[0] - self.started_at

    @property
    def gaps(self) -> list[float]:
        """Inter-token latencies in seconds."""
        return [b - a for a, b in pairwise(self.token_times)]

    @property
    def duration(self) -> float:
        """End-to-end latency in seconds."""
        return self.ended_at - self.started_at


def image_url(seed: int, width: int, height: int) -> str:
    """A `data:` URL of a JPEG, unique to the seed: coarse noise, which costs about as much to decode as a photograph."""
    columns, rows = width // 16 + 1, height // 16 + 1
    coarse = Image.frombytes("RGB", (columns, rows), random.Random(seed).randbytes(3 * columns * rows))
    file = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def chat_body(model: str, text: str, images: Sequence[str] = (), tokens: int = 16, **more: Any) -> bytes:
    """Body of a streamed chat request that generates exactly `tokens` tokens; `more` holds further fields."""
    parts = [*({"type": "image_url", "image_url": {"url": url}} for url in images), {"type": "text", "text": text}]
    body = {
        "model": model, "messages": [{"role": "user", "content": parts}], "max_tokens": tokens, "temperature": 0,
        "ignore_eos": True, "stream": True, **more,
    }  # fmt: skip
    return json.dumps(body).encode()


def open_session() -> aiohttp.ClientSession:
    """An HTTP client with a read buffer and a timeout for long streams."""
    timeout = aiohttp.ClientTimeout(total=_REQUEST_TIMEOUT_SECONDS)
    return aiohttp.ClientSession(timeout=timeout, read_bufsize=_READ_BUFFER_BYTES)


async def send(session: aiohttp.ClientSession, url: Url, body: bytes) -> RequestTiming:
    """Send one request and read its whole answer. An error is recorded in the timing, not raised."""
    timing = RequestTiming(time.monotonic())
    await _send(session, url, body, timing)
    return timing


async def _send(session: aiohttp.ClientSession, url: Url, body: bytes, timing: RequestTiming) -> None:
    base = url if isinstance(url, str) else next(url)
    try:
        async with session.post(
            f"{base}/v1/chat/completions", data=body, headers={"Content-Type": "application/json"}
        ) as response:
            if response.status != 200:
                timing.error = f"{response.status}: {(await response.text())[:300]}"
            async for line in response.content:
                if line.startswith(b"data: {") and b'"delta"' in line:
                    timing.token_times.append(time.monotonic())
                elif line.startswith(b'data: {"error"'):
                    timing.error = line.decode()[:300]
    except (aiohttp.ClientError, TimeoutError) as error:
        timing.error = f"{type(error).__name__}: {error}"
    timing.ended_at = time.monotonic()
    if not timing.token_times and not timing.error:
        timing.error = "the response contains no token"


async def run_closed_loop(url: Url, bodies: Iterable[bytes], in_flight: int) -> list[RequestTiming]:
    """Send all requests, at most `in_flight` at once, each as soon as another ends.

    Returns the timings in the order in which the requests began. Raises `RuntimeError` if a request fails.
    """
    timings = list[RequestTiming]()
    async with open_session() as session:
        await asyncio.gather(*_start_senders(session, url, bodies, in_flight, timings))
    return timings


async def saturated_rate(url: Url, bodies: Sequence[bytes], in_flight: int) -> float:
    """Requests per second while `in_flight` requests are always open.

    The window begins when `in_flight` requests have ended and closes when none is left to send. Requests that are still
    open then are cancelled, because a server that runs empty is not saturated. A request counts half with its first token
    and half with its other tokens: whole requests end in waves, too few of which fit into the window.

    Raises:
        RuntimeError: A request failed.
        ValueError: There are fewer than `2 * in_flight` requests.
    """
    if len(bodies) < 2 * in_flight:
        raise ValueError(f"{len(bodies)} requests are too few: expected at least {2 * in_flight} for {in_flight} in flight")
    expected_tokens = [int(json.loads(body)["max_tokens"]) for body in bodies]
    timings = list[RequestTiming]()
    async with open_session() as session:
        senders = _start_senders(session, url, bodies, in_flight, timings)
        done, pending = await asyncio.wait(senders, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for task in done:
            task.result()
    ends = sorted(timing.ended_at for timing in timings if timing.ended_at)
    window = ends[in_flight - 1], ends[-1]
    shares = (_share_in_window(timing, tokens, window) for timing, tokens in zip(timings, expected_tokens, strict=False))
    return sum(shares) / (window[1] - window[0])


def _share_in_window(timing: RequestTiming, expected_tokens: int, window: tuple[float, float]) -> float:
    """Share of a request between both ends of `window`, as `dvd plan` counts it."""
    received = len(timing.token_times)  # fewer than expected if an event held several tokens
    return share_in_window(timing.token_times, received if timing.ended_at else max(expected_tokens, received), *window)


async def run_open_loop(url: Url, bodies: Sequence[bytes], rate: float, seed: int = 0) -> list[RequestTiming]:
    """Send requests with Poisson arrivals, `rate` per second on average, whether or not the server keeps up.

    Raises `RuntimeError` if a request fails.
    """
    async with open_session() as session:
        return [require_success(timing) for timing in await arrivals(session, url, bodies, rate, seed)]


async def arrivals(
    session: aiohttp.ClientSession, url: Url, bodies: Sequence[bytes], rate: float, seed: int = 0
) -> list[RequestTiming]:
    """Send requests with Poisson arrivals, `rate` per second on average. Returns the failed ones too."""
    rng, due = random.Random(seed), time.monotonic()
    tasks = []
    for body in bodies:
        tasks.append(asyncio.create_task(send(session, url, body)))
        due += rng.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.monotonic()))  # late arrivals do not lower the rate
    return await asyncio.gather(*tasks)


def _start_senders(
    session: aiohttp.ClientSession, url: Url, bodies: Iterable[bytes], in_flight: int, timings: list[RequestTiming]
) -> list[asyncio.Task[None]]:
    """Start `in_flight` tasks that share `bodies`; each request's timing is appended to `timings` when it begins."""
    remaining = iter(bodies)

    async def send_remaining() -> None:
        for body in remaining:
            timings.append(timing := RequestTiming(time.monotonic()))
            await _send(session, url, body, timing)
            require_success(timing)

    return [asyncio.create_task(send_remaining()) for _ in range(in_flight)]


def require_success(timing: RequestTiming) -> RequestTiming:
    """Return the timing. Raises `RuntimeError` if its request failed."""
    if timing.error:
        raise RuntimeError(f"a request failed: {timing.error}")
    return timing


def throughput(timings: Sequence[RequestTiming]) -> float:
    """Requests per second, without the first and the last tenth to end, so that start-up and drain are excluded."""
    ends = sorted(timing.ended_at for timing in timings)
    cut = max(1, len(ends) // 10)
    return (len(ends) - 2 * cut) / (ends[-1 - cut] - ends[cut - 1])
