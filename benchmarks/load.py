"""Requests over HTTP and what each one felt: when it began, when each token came, when it ended."""

import asyncio
import base64
import io
import json
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import aiohttp
from PIL import Image

from dvd.plan.simulation import share_in_window


@dataclass
class Felt:
    """Seconds on one clock. A streamed token's time is when its event was read."""

    began: float
    tokens: list[float] = field(default_factory=list)
    ended: float = 0.0
    error: str = ""

    @property
    def ttft(self) -> float:
        return self.tokens[0] - self.began

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in pairwise(self.tokens)]


def picture(number: int, width: int, height: int) -> str:
    """A `data:` URL of a JPEG like no other: coarse noise, so that it decodes like a photograph."""
    columns, rows = width // 16 + 1, height // 16 + 1
    coarse = Image.frombytes("RGB", (columns, rows), random.Random(number).randbytes(3 * columns * rows))
    file = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def chat(model: str, text: str, images: Sequence[str] = (), tokens: int = 16, **more: Any) -> bytes:
    """A streamed request of exactly so many tokens."""
    parts = [*({"type": "image_url", "image_url": {"url": url}} for url in images), {"type": "text", "text": text}]
    body = {
        "model": model, "messages": [{"role": "user", "content": parts}], "max_tokens": tokens, "temperature": 0,
        "ignore_eos": True, "stream": True, **more,
    }  # fmt: skip
    return json.dumps(body).encode()


async def ask(session: aiohttp.ClientSession, url: str, body: bytes) -> Felt:
    """One request to its end; an error is kept, not raised."""
    felt = Felt(time.monotonic())
    await _ask(session, url, body, felt)
    return felt


async def _ask(session: aiohttp.ClientSession, url: str, body: bytes, felt: Felt) -> None:
    try:
        async with session.post(
            f"{url}/v1/chat/completions", data=body, headers={"Content-Type": "application/json"}
        ) as answer:
            if answer.status != 200:
                felt.error = f"{answer.status}: {(await answer.text())[:300]}"
            async for line in answer.content:
                if line.startswith(b"data: {") and b'"delta"' in line:
                    felt.tokens.append(time.monotonic())
                elif line.startswith(b'data: {"error"'):
                    felt.error = line.decode()[:300]
    except (aiohttp.ClientError, TimeoutError) as error:
        felt.error = f"{type(error).__name__}: {error}"
    felt.ended = time.monotonic()
    if not felt.tokens and not felt.error:
        felt.error = "no token"


async def closed(url: str, bodies: Iterable[bytes], in_flight: int) -> list[Felt]:
    """So many at once, one following another. Raises `RuntimeError` for a request that failed."""
    felt = list[Felt]()
    async with _session() as session:
        await asyncio.gather(*_working(session, url, bodies, in_flight, felt))
    return felt


async def saturated(url: str, bodies: Sequence[bytes], in_flight: int) -> float:
    """Requests a second while so many are always at once, from when as many have ended until none waits any more.

    Those still going then are broken off: a server that runs empty is not saturated. A request counts half with its first
    token and half with the others, each its share: whole ones end in waves, and too few of them in such a time. Raises
    `RuntimeError` for a request that failed, `ValueError` for too few.
    """
    if len(bodies) < 2 * in_flight:
        raise ValueError(f"{len(bodies)} requests, {in_flight} of them at once: at least twice as many are wanted")
    asked = [int(json.loads(body)["max_tokens"]) for body in bodies]
    felt = list[Felt]()
    async with _session() as session:
        working = _working(session, url, bodies, in_flight, felt)
        ended, others = await asyncio.wait(working, return_when=asyncio.FIRST_COMPLETED)
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for task in ended:
            task.result()
    ends = sorted(one.ended for one in felt if one.ended)
    window = ends[in_flight - 1], ends[-1]
    return sum(_within(one, tokens, window) for one, tokens in zip(felt, asked, strict=False)) / (window[1] - window[0])


def _within(felt: Felt, asked: int, window: tuple[float, float]) -> float:
    """How much of a request fell between both ends of `window`, as `dvd plan` counts it."""
    came = len(felt.tokens)
    return share_in_window(felt.tokens, came if felt.ended else max(asked, came), *window)  # one event may hold several tokens


async def offered(url: str, bodies: Sequence[bytes], rate: float, seed: int = 0) -> list[Felt]:
    """Arriving at random, so many a second on average, whatever the server does."""
    rng = random.Random(seed)
    async with _session() as session:
        tasks = []
        for body in bodies:
            tasks.append(asyncio.create_task(ask(session, url, body)))
            await asyncio.sleep(rng.expovariate(rate))
        return [_good(felt) for felt in await asyncio.gather(*tasks)]


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=900), read_bufsize=1 << 20)


def _working(
    session: aiohttp.ClientSession, url: str, bodies: Iterable[bytes], in_flight: int, felt: list[Felt]
) -> list[asyncio.Task[None]]:
    """So many at once, one following another; each is put into `felt` as it begins."""
    waiting = iter(bodies)

    async def work() -> None:
        for body in waiting:
            felt.append(one := Felt(time.monotonic()))
            await _ask(session, url, body, one)
            _good(one)

    return [asyncio.create_task(work()) for _ in range(in_flight)]


def _good(felt: Felt) -> Felt:
    if felt.error:
        raise RuntimeError(f"a request failed: {felt.error}")
    return felt


def throughput(done: Sequence[Felt]) -> float:
    """Requests a second, the first and the last tenth of the ends left out: neither start nor end counts."""
    ends = sorted(felt.ended for felt in done)
    cut = max(1, len(ends) // 10)
    return (len(ends) - 2 * cut) / (ends[-1 - cut] - ends[cut - 1])


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
