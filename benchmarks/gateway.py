"""What the gateway costs in front of vLLM's own server, an engine that answers at once behind both.

vLLM's server has one core; the caller and the gateway share the other. Text-only requests, streamed; then the latency of one
request at a time, five hundred streams at once, and what bodies of 8 MB do to everybody else.
"""

import asyncio
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks import checkpoint, load, processes
from benchmarks.options import Options
from benchmarks.result import Result, ratio_of

TOKENS = 8
IN_FLIGHT = 32
STREAMS = 500


def run(options: Options) -> Result:
    """The headline: requests/s through the gateway over direct; target 0.9."""
    with tempfile.TemporaryDirectory(prefix="dvd-bench-") as name, ExitStack() as held:
        folder = Path(name)
        cores, model = processes.cores(), checkpoint.make(folder / "middling")
        port = processes.free_port()
        held.enter_context(processes.vision(folder, model, cores[:1], "--vision-backend=fake"))
        held.enter_context(_language(folder, model, cores[-1:], port))
        server, url = processes.gateway(folder, cores[:1])
        held.enter_context(server)
        return asyncio.run(_measured(url, f"http://127.0.0.1:{port}", model.name, options))


def _language(folder: Path, model: Path, on: Sequence[int], port: int) -> processes.Server:
    """As `processes.language`, its engine replaced, vLLM at a port so that it can be asked directly."""
    server = processes.language(folder, model, on, "--dtype=float32")
    command = [word if not word.startswith("--http=") else f"--http=127.0.0.1:{port}" for word in server.command]
    server.command = [sys.executable, "-m", "benchmarks.fake_engine", "0", *command[3:]]
    server.ready = lambda: processes.answers(f"http://127.0.0.1:{port}/health")
    return server


async def _measured(gateway: str, direct: str, model: str, options: Options) -> Result:
    count = 400 if options.quick else 2000
    urls = {"gateway": gateway, "direct": direct}
    rates: dict[str, list[float]] = {name: [] for name in urls}
    for repeat in range(options.repeats(5) + 1):
        for name, url in urls.items():
            bodies = [load.chat(model, f"Hello {i}", tokens=TOKENS) for i in range(count)]
            rate = load.throughput(await load.closed(url, bodies, IN_FLIGHT))
            if repeat:  # the first warms
                rates[name].append(rate)
    alone = {name: await _latency(url, model, 300) for name, url in urls.items()}
    ratio, spread = ratio_of(rates["gateway"], rates["direct"])
    figures: dict[str, Any] = {
        "requests/s": {name: round(statistics.median(found), 1) for name, found in rates.items()},
        "latency added, ms": {
            f"{int(100 * p)}": round(1e3 * (load.percentile(alone["gateway"], p) - load.percentile(alone["direct"], p)), 3)
            for p in (0.5, 0.99)
        },
        f"{STREAMS} streams at once": {name: await _streams(url, model) for name, url in urls.items()},
        "beside bodies of 8 MB": await _beside_large_bodies(gateway, model),
    }
    return Result("gateway", ratio, 0.9, spread, figures)


async def _latency(url: str, model: str, count: int) -> list[float]:
    """Seconds of each of so many requests, one at a time."""
    done = await load.closed(url, [load.chat(model, f"Hi {i}", tokens=1) for i in range(count)], 1)
    return [felt.ended - felt.began for felt in done]


async def _streams(url: str, model: str) -> dict[str, float]:
    bodies = [load.chat(model, f"Hello {i}", tokens=40) for i in range(STREAMS)]
    done = await load.closed(url, bodies, STREAMS)
    seconds = max(felt.ended for felt in done) - min(felt.began for felt in done)
    return {"answered": len(done), "tokens/s": round(sum(len(felt.tokens) for felt in done) / seconds, 1)}


async def _beside_large_bodies(url: str, model: str) -> dict[str, float]:
    """99th percentile of small requests' time, milliseconds: alone, and while bodies of 8 MB keep coming.

    Their senders are processes of their own: a loop that writes 8 MB is late for its other requests itself.
    """
    found = {"alone": 1e3 * load.percentile(await _latency(url, model, 200), 0.99)}
    senders = [
        multiprocessing.get_context("spawn").Process(target=_send_large, args=(url, model), daemon=True) for _ in range(2)
    ]
    for sender in senders:
        sender.start()
    await asyncio.sleep(3)  # until both have begun
    found["beside"] = 1e3 * load.percentile(await _latency(url, model, 200), 0.99)
    for sender in senders:
        sender.terminate()
    return {name: round(value, 2) for name, value in found.items()}


def _send_large(url: str, model: str) -> None:
    """Without end. It is no image, which is found out after it was parsed."""
    body = load.chat(model, "What is this?", ["data:image/png;base64," + "A" * (8 << 20)], 1)

    async def send() -> None:
        async with aiohttp.ClientSession() as session:
            while True:
                await load.ask(session, url, body)

    asyncio.run(send())
