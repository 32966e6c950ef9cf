"""What running streams feel while embeddings arrive at 1 GB/s: vLLM's HTTP process, its event loop sampled from within.

The language worker is the product's, its sink included; only the engine says words at a steady pace, so that any unsteadiness
comes from the process itself. The sender is a process of its own. All share the machine's cores.
"""

import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import checkpoint, load, processes
from benchmarks.fake_engine import LAG
from benchmarks.processes import Server
from common.checkpoint import open_checkpoint

PACE = 0.02
STREAMS, TOKENS = 4, 500


def felt(repeats: int) -> dict[str, Any]:
    """99th percentiles in milliseconds, alone and while embeddings arrive; medians of the repeats."""
    with tempfile.TemporaryDirectory(prefix="dvd-bench-") as name:
        folder = Path(name)
        model, lags, sent = checkpoint.make(folder / "middling"), folder / "lags", folder / "sent"
        cores, port = processes.cores(), processes.free_port()
        with _language(folder, model, port, lags):
            url = f"http://127.0.0.1:{port}"
            asyncio.run(_streams(url, model.name))
            found: dict[str, list[dict[str, float]]] = {"alone": [], "while embeddings arrive": []}
            for _ in range(repeats):
                found["alone"].append(_window(url, model.name, lags))
                with Server("sender", _sender(folder, model, sent), cores, folder, sent.exists):
                    found["while embeddings arrive"].append(_window(url, model.name, lags))
                found["while embeddings arrive"][-1]["GB/s"] = _rate(sent)
                sent.unlink()
    return {
        name: {what: round(statistics.median(window[what] for window in windows), 2) for what in windows[0]}
        for name, windows in found.items()
    }


def _language(folder: Path, model: Path, port: int, lags: Path) -> Server:
    server = processes.language(folder, model, processes.cores(), "--dtype=bfloat16")
    command = [word if not word.startswith("--http=") else f"--http=127.0.0.1:{port}" for word in server.command]
    at = command.index("--")
    command[at:at] = ["--sink-lease=0.2", f"--sink-bytes={1 << 30}"]  # what arrives is never asked for: it must make room
    server.command = [sys.executable, "-m", "benchmarks.fake_engine", str(PACE), *command[3:]]
    server.environment = {**server.environment, LAG: str(lags)}
    server.ready = lambda: processes.answers(f"http://127.0.0.1:{port}/health")
    return server


def _window(url: str, model: str, lags: Path) -> dict[str, float]:
    began = time.monotonic()
    done = asyncio.run(_streams(url, model))
    ended = time.monotonic()
    samples = [json.loads(line) for line in lags.read_text().splitlines()]
    lag = [late for at, late in samples if began <= at <= ended]
    gaps = [gap for one in done for gap in one.gaps]
    return {
        "event-loop lag p99, ms": 1e3 * load.percentile(lag, 0.99),
        "ITL p50, ms": 1e3 * load.percentile(gaps, 0.5), "ITL p99, ms": 1e3 * load.percentile(gaps, 0.99),
    }  # fmt: skip


async def _streams(url: str, model: str) -> list[load.Felt]:
    return await load.closed(url, [load.chat(model, f"Hello {i}", tokens=TOKENS) for i in range(STREAMS)], STREAMS)


def _sender(folder: Path, model: Path, sent: Path) -> list[str]:
    opened = open_checkpoint(model)
    said = (f"unix:{folder / 'language'}", opened.fingerprint, str(opened.description.width), str(sent))
    return [sys.executable, "-m", "benchmarks.sender", *said]


def _rate(sent: Path) -> float:
    lines = [json.loads(line) for line in sent.read_text().splitlines() if line.endswith("]")]
    return float(sum(size for _, size in lines[1:]) / (lines[-1][0] - lines[0][0]) / 1e9)
