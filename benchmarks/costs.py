"""Measures stage costs for `dvd plan` through a vision and a language worker with a core each.

Preparing and encoding an image share the vision worker's core, as HTTP and the engine share the language worker's core. The
time to prepare an image is therefore counted as the tower's, and the fixed cost of a request as the engine's.
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
PROMPT = "What do you see?"
SHORT_ANSWER_TOKENS, LONG_ANSWER_TOKENS = 2, 34
BATCH_TILES = 4
"""Tiles in a batch of a vision worker on a CPU."""
MAX_STEP_TOKENS, MAX_SEQUENCES = 4096, 64
LARGE_IMAGE_SIZE, LARGE_IMAGE_TILES = (1792, 1344), 13
"""Width, height and tiles of an image whose long prefill shows the cost of attention."""
_LARGE_IMAGES, _LARGE_IMAGES_IN_FLIGHT = 16, 4
_ENCODE_TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class Stack:
    """A running server and how it is loaded.

    Attributes:
        folder: Holds the sockets `vision` and `language` of the workers.
        url: URL of the gateway, or of stock vLLM.
        model: Folder of the checkpoint.
        seeds: Source of seeds, so that no image and no text is sent twice.
        in_flight: Number of concurrent requests.
    """

    folder: Path
    url: str
    model: Path
    seeds: Iterator[int]
    in_flight: int = IN_FLIGHT

    def new_images(self, count: int, size: tuple[int, int]) -> list[str]:
        """`data:` URLs of `count` images of (width, height), each unique across the whole run."""
        return [load.image_url(next(self.seeds), *size) for _ in range(count)]

    def chat_body(self, images: Sequence[str], tokens: int) -> bytes:
        """Body of a chat request. Text without images is unique, so that no prefix of it is cached."""
        text = PROMPT if images else f"{PROMPT} {next(self.seeds)}"
        return load.chat_body(self.model.name, text, images, tokens)

    async def request_rate(self, requests: Sequence[Sequence[str]], tokens: int) -> float:
        """Requests per second at saturation, one request for each list of images.

        Answers have half to one and a half times `tokens` tokens. Equal lengths would make requests begin and end in
        waves, and the result would depend on where in a wave the measurement stops.
        """
        rng = random.Random(7)
        bodies = [self.chat_body(images, round(tokens * rng.uniform(0.5, 1.5))) for images in requests]
        return await load.saturated_rate(self.url, bodies, self.in_flight)

    async def cached_request_rate(self, requests: Sequence[Sequence[str]], tokens: int) -> float:
        """Requests per second at saturation when all embeddings are in the language worker already."""
        await load.run_closed_loop(self.url, [self.chat_body(images, 1) for images in requests], self.in_flight)
        return await self.request_rate(requests, tokens)

    async def encode_rate(self, images: Sequence[str]) -> float:
        """Images per second through `Vision.Encode` alone, delivery into the sink included."""
        remaining, fingerprint = iter(images), open_checkpoint(self.model).fingerprint
        timings = list[load.RequestTiming]()
        async with rpc.open_channel(f"unix:{self.folder / 'vision'}") as channel:
            stub = vision_pb2_grpc.VisionStub(channel)

            async def encode_remaining() -> None:
                for url in remaining:
                    timings.append(await self._encode(stub, fingerprint, base64.b64decode(url.partition(",")[2])))

            await asyncio.gather(*(encode_remaining() for _ in range(self.in_flight)))
        return load.throughput(timings)

    async def _encode(self, stub: vision_pb2_grpc.VisionStub, fingerprint: str, data: bytes) -> load.RequestTiming:
        timing = load.RequestTiming(time.monotonic())
        request = vision_pb2.EncodeRequest(
            images=[vision_pb2.Image(key=hashlib.sha256(b"alone" + data).hexdigest(), data=data)],
            dtype=embeddings_pb2.FLOAT32, deliver_to=f"unix:{self.folder / 'language'}", fingerprint=fingerprint,
        )  # fmt: skip
        await stub.Encode(request, timeout=_ENCODE_TIMEOUT_SECONDS)
        timing.ended_at = time.monotonic()
        return timing

    async def prompt_tokens(self) -> int:
        """Tokens of the prompt without an image, chat template included."""
        body = load.chat_body(self.model.name, PROMPT, tokens=1, stream=False)
        headers = {"Content-Type": "application/json"}
        url = f"{self.url}/v1/chat/completions"
        async with aiohttp.ClientSession() as session, session.post(url, data=body, headers=headers) as response:
            content: dict[str, Any] = await response.json()
        return int(content["usage"]["prompt_tokens"])

    async def isolated_rates(self, requests: Sequence[Sequence[str]], tokens: int) -> tuple[float, float]:
        """Images/s of the vision worker alone, then requests/s of the language worker with all embeddings in place.

        The engine must not cache prefixes.
        """
        images = [image for images in requests for image in images]
        return await self.encode_rate(images), await self.cached_request_rate(requests, tokens)


async def measure_costs(stack: Stack, size: tuple[int, int], tiles: int, count: int) -> Costs:
    """Measure the costs of all stages.

    Args:
        stack: The server, not loaded otherwise.
        size: Width and height of an image.
        tiles: Tiles that such an image makes, thumbnail included.
        count: Requests in each measurement, more than twice the number in flight.
    """
    checkpoint = open_checkpoint(stack.model).description
    images = stack.new_images(count, size)
    images_per_second = await stack.encode_rate(images)
    short_answer, sequence, shared_sequence = await _decode_costs(stack, count)
    step = max(0.0, (sequence - shared_sequence) * stack.in_flight / (stack.in_flight - 1))
    large_images = stack.new_images(_LARGE_IMAGES, LARGE_IMAGE_SIZE)
    few_in_flight = replace(stack, in_flight=_LARGE_IMAGES_IN_FLIGHT)
    prefill, attention = _fit_prefill({
        tiles * checkpoint.tokens_per_tile: await _prefill_seconds(stack, images, short_answer),
        LARGE_IMAGE_TILES * checkpoint.tokens_per_tile: await _prefill_seconds(few_in_flight, large_images, short_answer),
    })  # fmt: skip
    request = max(0.0, short_answer - SHORT_ANSWER_TOKENS * shared_sequence - prefill * await stack.prompt_tokens())
    return Costs(
        vision=VisionCosts(prepare=1e-6, tile=1 / images_per_second / tiles, batch_tiles=BATCH_TILES),
        language=LanguageCosts(
            step=step, request=request, prefill=prefill, attention=attention, decode=max(0.0, sequence - step),
            step_tokens=MAX_STEP_TOKENS, sequences=MAX_SEQUENCES,
        ),
        tokens_per_tile=checkpoint.tokens_per_tile,
        bytes_per_token=4 * checkpoint.width,
    )  # fmt: skip


async def _decode_costs(stack: Stack, count: int) -> tuple[float, float, float]:
    """Seconds of a text request with a short answer; of a token of a sequence alone; and of one among `stack.in_flight`."""
    texts: list[list[str]] = [[]] * count
    lengths = SHORT_ANSWER_TOKENS, LONG_ANSWER_TOKENS
    await stack.request_rate(texts, SHORT_ANSWER_TOKENS)  # warm-up
    shared = [1 / await stack.request_rate(texts, tokens) for tokens in lengths]
    alone = [1 / await replace(stack, in_flight=1).request_rate(texts[: count // 3], tokens) for tokens in lengths]
    token, shared_token = ((seconds[1] - seconds[0]) / (lengths[1] - lengths[0]) for seconds in (alone, shared))
    return shared[0], token, shared_token


async def _prefill_seconds(stack: Stack, images: Sequence[str], text_seconds: float) -> float:
    """Seconds that a request spends on an image's tokens, the embedding in place; `text_seconds`: of one without image."""
    return 1 / await stack.cached_request_rate([[image] for image in images], SHORT_ANSWER_TOKENS) - text_seconds


def _fit_prefill(seconds: dict[int, float]) -> tuple[float, float]:
    """Costs `prefill` and `attention` from the seconds that prompts of two lengths take, by number of tokens."""
    (short_tokens, short_seconds), (long_tokens, long_seconds) = sorted(seconds.items())
    slope = (long_seconds / long_tokens - short_seconds / short_tokens) / (long_tokens - short_tokens)
    attention = max(0.0, 2 * slope)
    return max(1e-9, short_seconds / short_tokens - attention * short_tokens / 2), attention


def predict_throughput(costs: Costs, kind: Kind, in_flight: int) -> float:
    """Requests per second that `dvd plan` predicts for one vision and one language worker at saturation."""
    return simulate_saturated(costs, Load(kinds=[kind]), Fleet(), in_flight).throughput


def worker_seconds(costs: Costs, tiles: int, text: int, tokens: int, compressed: float, in_flight: int) -> tuple[float, float]:
    """Seconds of a vision worker and of a language worker that a request takes.

    About half of the requests in flight are in the engine and share its steps.

    Args:
        costs: Costs of the stages.
        tiles: Tiles of the request's image.
        text: Tokens of the prompt without the image.
        tokens: Tokens of the answer.
        compressed: Share of tiles that the router compresses.
        in_flight: Number of concurrent requests.
    """
    engine = costs.language
    decode = tokens * (engine.decode + engine.step / (in_flight / 2))
    return tiles * costs.vision.tile, engine.request + engine.prefill_seconds(
        text + visual_tokens(costs, tiles, compressed)
    ) + decode


def balanced_tokens(
    costs: Costs, tiles: int, text: int, compressed: float, in_flight: int, language_factor: float = 1.0
) -> int:
    """Answer length for which a request occupies the language worker `language_factor` times as long as the vision worker.

    The other arguments are those of `worker_seconds`. The length is at least 4 tokens.
    """
    vision, without_answer = worker_seconds(costs, tiles, text, 0, compressed, in_flight)
    per_token = worker_seconds(costs, tiles, text, 1, compressed, in_flight)[1] - without_answer
    return max(4, round((language_factor * vision - without_answer) / per_token))


def calibrated(costs: Costs, kind: Kind, images_per_second: float, requests_per_second: float, in_flight: int) -> Costs:
    """The costs scaled to `Stack.isolated_rates`, measured just before, because the speed of the machine drifts."""
    language_only = costs.model_copy(update={"vision": costs.vision.model_copy(update={"tile": 1e-9})})
    factor = predict_throughput(language_only, kind, in_flight) / requests_per_second
    engine = costs.language
    scaled = {name: factor * getattr(engine, name) for name in ("step", "request", "prefill", "attention", "decode")}
    return costs.model_copy(
        update={
            "vision": costs.vision.model_copy(update={"tile": 1 / images_per_second / kind.tiles}),
            "language": engine.model_copy(update=scaled),
        }
    )


async def measure_balanced_tokens(
    stack: Stack, requests: Sequence[Sequence[str]], costs: Costs, tiles: int, text: int, language_factor: float = 1.0
) -> int:
    """`balanced_tokens`, corrected by the rates of both halves alone with answers of that length.

    `costs` were measured stage by stage, and stages that run at once are slower.
    """
    in_flight = 2 * stack.in_flight  # the language worker alone has all of them; `worker_seconds` assumes half
    first_estimate = balanced_tokens(costs, tiles, text, 0.0, in_flight, language_factor)
    rates = await stack.isolated_rates(requests, first_estimate)
    corrected = calibrated(costs, Kind(tiles=tiles, text=text, output=first_estimate), *rates, stack.in_flight)
    return balanced_tokens(corrected, tiles, text, 0.0, in_flight, language_factor)


def plan_case(name: str, kind: Kind, rate: float, costs: Costs, in_flight: int) -> dict[str, Any]:
    """A measurement for the benchmark `plan`: the kind of request, its measured rate in requests/s, and the costs then."""
    return {
        "name": name, "kind": kind.model_dump(), "in flight": in_flight, "requests/s": round(rate, 3),
        "costs": costs.model_dump(),
    }  # fmt: skip
