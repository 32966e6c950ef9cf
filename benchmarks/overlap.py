"""Does the whole go as fast as its slower half? V images/s alone, L requests/s alone, E end to end; one core for each half.

V: `Vision.Encode` with delivery into the language worker's sink, nothing read. L: requests whose embeddings are there
already. E: fresh images through the gateway. Prefix caching is off, so that L and E read the same; the answer's length is
chosen so that V and L are near each other, where a serial system would do half of either.
"""

import asyncio
import base64
import hashlib
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import checkpoint, load, processes, timeline
from benchmarks.options import Options
from benchmarks.result import Result
from protos import embeddings_pb2, vision_pb2, vision_pb2_grpc
from wire import rpc
from wire.checkpoint import open_checkpoint

IN_FLIGHT = 16
TEXT = "What do you see?"
SIDE = 448  # one tile an image


@dataclass(frozen=True)
class Stack:
    folder: Path
    url: str
    model: str
    fingerprint: str
    traces: Path


def run(options: Options) -> Result:
    """The headline is E / min(V, L); target 0.9."""
    with tempfile.TemporaryDirectory(prefix="dvd-bench-") as name, ExitStack() as held:
        folder = Path(name)
        stack = _started(folder, held)
        return asyncio.run(_measured(stack, options))


def _started(folder: Path, held: ExitStack) -> Stack:
    cores, model, traces = processes.cores(), checkpoint.make(folder / "middling"), folder / "traces"
    eye, tongue = cores[:1], cores[-1:]
    flags = ("--no-enable-prefix-caching", "--dtype=float32")
    held.enter_context(processes.vision(folder, model, eye, "--cache=none", f"--trace={traces}", "--max-batch-tiles=4"))
    held.enter_context(processes.language(folder, model, tongue, *flags))
    server, url = processes.gateway(folder, cores, f"--trace={traces}")
    held.enter_context(server)
    return Stack(folder, url, model.name, open_checkpoint(model).fingerprint, traces)


async def _measured(stack: Stack, options: Options) -> Result:
    count = 48 if options.quick else 160
    numbers = iter(range(10_000_000))

    def images(some: int) -> list[str]:
        return [load.picture(next(numbers), SIDE, SIDE) for _ in range(some)]

    await _end_to_end(stack, images(IN_FLIGHT), 4)  # warms everything
    vision = await _vision(stack, images(count))
    tokens = await _balanced(stack, images(count // 2), vision)
    found: dict[str, list[float]] = {"V": [], "L": [], "E": []}
    for _ in range(options.repeats(3)):
        fresh = images(count)
        found["V"].append(await _vision(stack, images(count)))
        found["E"].append(await _end_to_end(stack, fresh, tokens))
        found["L"].append(await _end_to_end(stack, fresh, tokens))  # now they are there
    ratios = [e / min(v, language) for v, language, e in zip(found["V"], found["L"], found["E"], strict=True)]
    middle = {name: round(statistics.median(values), 3) for name, values in found.items()}
    ratio = statistics.median(ratios)
    serial = 1 / (1 / middle["V"] + 1 / middle["L"])
    figures: dict[str, Any] = {
        **middle, "serial bound": round(serial, 3), "E over the serial bound": round(middle["E"] / serial, 3),
        "tokens of an answer": tokens, "in flight": IN_FLIGHT, "images": count,
    }  # fmt: skip
    return Result("overlap", ratio, 0.9, (max(ratios) - min(ratios)) / ratio, figures, [timeline.draw(stack.traces, "overlap")])


async def _balanced(stack: Stack, images: list[str], vision: float) -> int:
    """Tokens of an answer for which L is about V: two lengths are measured, and a line is drawn through them."""
    await _end_to_end(stack, images, 1)
    short, long = 4, 36
    seconds = [1 / await _end_to_end(stack, images, tokens) for tokens in (short, long)]
    slope = (seconds[1] - seconds[0]) / (long - short)
    return max(1, round(short + (1 / vision - seconds[0]) / slope))


async def _end_to_end(stack: Stack, images: list[str], tokens: int) -> float:
    """Requests a second."""
    bodies = [load.chat(stack.model, TEXT, [image], tokens) for image in images]
    return load.throughput(await load.closed(stack.url, bodies, IN_FLIGHT))


async def _vision(stack: Stack, images: list[str]) -> float:
    """Images a second into the sink."""
    waiting = iter(images)
    ends: list[load.Felt] = []
    async with rpc.channel(f"unix:{stack.folder / 'vision'}") as channel:
        stub = vision_pb2_grpc.VisionStub(channel)

        async def work() -> None:
            for url in waiting:
                ends.append(await _encode(stub, stack, base64.b64decode(url.partition(",")[2])))

        await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))
    return load.throughput(ends)


async def _encode(stub: vision_pb2_grpc.VisionStub, stack: Stack, data: bytes) -> load.Felt:
    felt = load.Felt(time.monotonic())
    request = vision_pb2.EncodeRequest(
        images=[vision_pb2.Image(key=hashlib.sha256(b"alone" + data).hexdigest(), data=data)],
        dtype=embeddings_pb2.FLOAT32, deliver_to=f"unix:{stack.folder / 'language'}", fingerprint=stack.fingerprint,
    )  # fmt: skip
    await stub.Encode(request, timeout=600)
    felt.ended = time.monotonic()
    return felt
