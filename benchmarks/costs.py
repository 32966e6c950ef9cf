"""What the stages cost here, as `dvd plan` wants to know it: measured through a vision and a language worker on a core each.

Preparing an image and looking at it share the vision worker's one core, as HTTP and the engine share the language worker's;
so what preparing takes is counted as the tower's, and what a request takes whatever is in it as the engine's.
"""

import asyncio
import base64
import hashlib
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks import load
from common import rpc
from common.checkpoint import open_checkpoint
from dvd.plan.model import Costs, Fleet, Kind, LanguageCosts, Load, VisionCosts, visual_tokens
from dvd.plan.search import simulate_saturated
from protos import embeddings_pb2, vision_pb2, vision_pb2_grpc

IN_FLIGHT = 16
TEXT = "What do you see?"
TOKENS = 2, 34
BATCH = 4
"""Tiles in a batch of a vision worker on a CPU."""
DEEP = (1792, 1344), 13
"""A picture and its tiles, read to see what attention adds."""


@dataclass(frozen=True)
class Stack:
    """A vision worker at `FOLDER/vision`, a language worker at `FOLDER/language`, and the gateway before them."""

    folder: Path
    url: str
    model: Path
    numbers: Iterator[int]
    in_flight: int = IN_FLIGHT

    def pictures(self, count: int, size: tuple[int, int]) -> list[str]:
        """No two alike, ever."""
        return [load.picture(next(self.numbers), *size) for _ in range(count)]

    def chat(self, pictures: Sequence[str], tokens: int) -> bytes:
        """Text without pictures differs each time, so that no part of it is there already."""
        text = TEXT if pictures else f"{TEXT} {next(self.numbers)}"
        return load.chat(self.model.name, text, pictures, tokens)

    async def requests(self, pictures: Sequence[Sequence[str]], tokens: int) -> float:
        """Requests a second, one for each list of pictures; answers are half to one and a half times as long as `tokens`.

        Alike, they would begin and end in waves, and what is measured would hang on where in a wave it stops.
        """
        lengths = random.Random(7)
        bodies = [self.chat(some, round(tokens * lengths.uniform(0.5, 1.5))) for some in pictures]
        return await load.saturated(self.url, bodies, self.in_flight)

    async def requests_again(self, pictures: Sequence[Sequence[str]], tokens: int) -> float:
        """Requests a second whose embeddings are there already."""
        await load.closed(self.url, [self.chat(some, 1) for some in pictures], self.in_flight)
        return await self.requests(pictures, tokens)

    async def images(self, pictures: Sequence[str]) -> float:
        """Images a second through `Vision.Encode` alone, delivery into the sink included."""
        waiting, ends, fingerprint = iter(pictures), list[load.Felt](), open_checkpoint(self.model).fingerprint
        async with rpc.open_channel(f"unix:{self.folder / 'vision'}") as channel:
            stub = vision_pb2_grpc.VisionStub(channel)

            async def work() -> None:
                for url in waiting:
                    ends.append(await self._encode(stub, fingerprint, base64.b64decode(url.partition(",")[2])))

            await asyncio.gather(*(work() for _ in range(self.in_flight)))
        return load.throughput(ends)

    async def _encode(self, stub: vision_pb2_grpc.VisionStub, fingerprint: str, data: bytes) -> load.Felt:
        felt = load.Felt(time.monotonic())
        request = vision_pb2.EncodeRequest(
            images=[vision_pb2.Image(key=hashlib.sha256(b"alone" + data).hexdigest(), data=data)],
            dtype=embeddings_pb2.FLOAT32, deliver_to=f"unix:{self.folder / 'language'}", fingerprint=fingerprint,
        )  # fmt: skip
        await stub.Encode(request, timeout=600)
        felt.ended = time.monotonic()
        return felt


async def measured(stack: Stack, size: tuple[int, int], tiles: int, count: int) -> Costs:
    """`size`: of a picture that makes so many tiles, thumbnail counted; `count`: of requests in each measurement, more than
    twice what is in flight.
    """
    checkpoint = open_checkpoint(stack.model).description
    pictures = stack.pictures(count, size)
    vision = await stack.images(pictures)
    texts: list[list[str]] = [[]] * count
    several = [1 / await stack.requests(texts, tokens) for tokens in (TOKENS[0], *TOKENS)][1:]  # the first warms
    alone = [1 / await replace(stack, in_flight=1).requests(texts[: count // 3], tokens) for tokens in TOKENS]
    one, many = ((seconds[1] - seconds[0]) / (TOKENS[1] - TOKENS[0]) for seconds in (alone, several))
    step = max(0.0, (one - many) * stack.in_flight / (stack.in_flight - 1))
    shallow = await _reading(stack, [[picture] for picture in pictures], several[0])
    deep = await _reading(replace(stack, in_flight=4), [[picture] for picture in stack.pictures(16, DEEP[0])], several[0])
    prefill, attention = _by_depth({tiles * checkpoint.tokens_per_tile: shallow, DEEP[1] * checkpoint.tokens_per_tile: deep})
    request = max(0.0, several[0] - TOKENS[0] * many - prefill * await prompt(stack))
    return Costs(
        vision=VisionCosts(prepare=1e-6, tile=1 / vision / tiles, batch_tiles=BATCH),
        language=LanguageCosts(
            step=step, request=request, prefill=prefill, attention=attention, decode=max(0.0, one - step),
            step_tokens=4096, sequences=64,
        ),
        tokens_per_tile=checkpoint.tokens_per_tile,
        bytes_per_token=4 * checkpoint.width,
    )  # fmt: skip


async def _reading(stack: Stack, shown: Sequence[Sequence[str]], without: float) -> float:
    """Seconds a request that its image's tokens cost, once the embedding is there; `without`: a request's that has none."""
    return 1 / await stack.requests_again(shown, TOKENS[0]) - without


def _by_depth(seconds: dict[int, float]) -> tuple[float, float]:
    """Prefill and attention, of prompts of two lengths."""
    (few, short), (many, long) = sorted(seconds.items())
    attention = max(0.0, 2 * (long / many - short / few) / (many - few))
    return max(1e-9, short / few - attention * few / 2), attention


async def prompt(stack: Stack) -> int:
    """Tokens of a prompt without a picture."""
    body = load.chat(stack.model.name, TEXT, tokens=1, stream=False)
    headers = {"Content-Type": "application/json"}
    url = f"{stack.url}/v1/chat/completions"
    async with aiohttp.ClientSession() as session, session.post(url, data=body, headers=headers) as answer:
        said: dict[str, Any] = await answer.json()
    return int(said["usage"]["prompt_tokens"])


def predicted(costs: Costs, kind: Kind, in_flight: int) -> float:
    """Requests a second, saturated, by one vision and one language worker."""
    return simulate_saturated(costs, Load(kinds=[kind]), Fleet(), in_flight).throughput


def halves(costs: Costs, tiles: int, text: int, tokens: int, compressed: float, in_flight: int) -> tuple[float, float]:
    """Seconds of a vision worker and of a language worker that a request with such an image takes, an answer of `tokens`.

    About half of those in flight are with the engine, and share its steps.
    """
    engine = costs.language
    spoken = tokens * (engine.decode + engine.step / (in_flight / 2))
    prefill = engine.prefill_seconds(text + visual_tokens(costs, tiles, compressed))
    return tiles * costs.vision.tile, engine.request + prefill + spoken


def balanced(costs: Costs, tiles: int, text: int, compressed: float, in_flight: int, longer: float = 1.0) -> int:
    """Tokens of an answer for which a request with such an image keeps language `longer` times as busy as vision."""
    vision, reading = halves(costs, tiles, text, 0, compressed, in_flight)
    return max(4, round((longer * vision - reading) / (halves(costs, tiles, text, 1, compressed, in_flight)[1] - reading)))


async def halves_alone(stack: Stack, shown: Sequence[Sequence[str]], tokens: int) -> tuple[float, float]:
    """Images/s of vision alone, and requests/s of language with the embeddings there; the engine must not cache prefixes."""
    vision = await stack.images([picture for some in shown for picture in some])
    return vision, await stack.requests_again(shown, tokens)


def beside(costs: Costs, kind: Kind, vision: float, language: float, in_flight: int) -> Costs:
    """The costs, made to agree with what the halves did alone just now (`halves_alone`): the machine's speed changes."""
    at_once = costs.model_copy(update={"vision": costs.vision.model_copy(update={"tile": 1e-9})})
    slower = predicted(at_once, kind, in_flight) / language
    engine = costs.language
    scaled = {name: slower * getattr(engine, name) for name in ("step", "request", "prefill", "attention", "decode")}
    return costs.model_copy(
        update={
            "vision": costs.vision.model_copy(update={"tile": 1 / vision / kind.tiles}),
            "language": engine.model_copy(update=scaled),
        }
    )


async def balanced_alone(
    stack: Stack, shown: Sequence[Sequence[str]], priced: Costs, tiles: int, text: int, longer: float = 1.0
) -> int:
    """`balanced`, corrected by what the halves do alone with answers that long: `priced` is of stages, one after another."""
    in_flight = 2 * stack.in_flight  # language alone has all of them, where `halves` counts on half
    told = balanced(priced, tiles, text, 0.0, in_flight, longer)
    alone = await halves_alone(stack, shown, told)
    here = beside(priced, Kind(tiles=tiles, text=text, output=told), *alone, stack.in_flight)
    return balanced(here, tiles, text, 0.0, in_flight, longer)


def case(name: str, kind: Kind, rate: float, costs: Costs, in_flight: int) -> dict[str, Any]:
    """A kind of request, what was measured of it, requests a second, and the costs then: for the benchmark of `dvd plan`."""
    return {
        "name": name, "kind": kind.model_dump(), "in flight": in_flight, "requests/s": round(rate, 3),
        "costs": costs.model_dump(),
    }  # fmt: skip
