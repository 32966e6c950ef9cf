"""Measures how running streams of vLLM's HTTP process slow down while embeddings arrive at up to 1 GB/s.

The language worker is the product's, including its sink. Only the engine is fake and emits tokens at a fixed pace, so that
any jitter comes from the process itself; its event loop is sampled from within. The sender is a process of its own. All
processes share the machine's cores.
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
from benchmarks.fake_engine import LAG_FILE_VARIABLE
from benchmarks.processes import Server
from common.checkpoint import open_checkpoint
from dvd.plan.simulation import percentile
from tests.ports import free_port

SECONDS_PER_TOKEN = 0.02
STREAMS, TOKENS = 4, 500
_SINK_FLAGS = ("--sink-lease=0.2", f"--sink-bytes={1 << 30}")
"""No request uses the embeddings that arrive, so the sink must drop them soon."""


def measure(repeats: int) -> dict[str, Any]:
    """Medians over the repeats of latency percentiles in milliseconds, without and with arriving embeddings."""
    windows: dict[str, list[dict[str, float]]] = {"alone": [], "while embeddings arrive": []}
    with tempfile.TemporaryDirectory(prefix="dvd-bench-") as name:
        folder = Path(name)
        model, lag_file, sent_file = checkpoint.write_checkpoint(folder / "medium"), folder / "lags", folder / "sent"
        cores, port = processes.available_cores(), free_port()
        with processes.fake_language_worker(
            folder, model, cores, port, "bfloat16", SECONDS_PER_TOKEN, _SINK_FLAGS, {LAG_FILE_VARIABLE: str(lag_file)}
        ):
            url = f"http://127.0.0.1:{port}"
            asyncio.run(_run_streams(url, model.name))  # warm-up
            for _ in range(repeats):
                windows["alone"].append(_measure_window(url, model.name, lag_file))
                with Server("sender", _sender_command(folder, model, sent_file), cores, folder, sent_file.exists):
                    windows["while embeddings arrive"].append(_measure_window(url, model.name, lag_file))
                windows["while embeddings arrive"][-1]["GB/s"] = _gigabytes_per_second(sent_file)
                sent_file.unlink()
    return {
        condition: {figure: round(statistics.median(window[figure] for window in entries), 2) for figure in entries[0]}
        for condition, entries in windows.items()
    }


def _measure_window(url: str, model: str, lag_file: Path) -> dict[str, float]:
    """Percentiles over one run of all streams. Raises `RuntimeError` if the event loop was not sampled meanwhile."""
    started_at = time.monotonic()
    timings = asyncio.run(_run_streams(url, model))
    ended_at = time.monotonic()
    samples = [json.loads(line) for line in lag_file.read_text().splitlines()]
    lags = [lag for at, lag in samples if started_at <= at <= ended_at]
    gaps = [gap for timing in timings for gap in timing.gaps]
    if not lags:
        raise RuntimeError(f"{lag_file} has no sample of the event loop's lag in a window of {ended_at - started_at:.1f} s")
    return {
        "event-loop lag p99, ms": 1e3 * percentile(lags, 0.99),
        "ITL p50, ms": 1e3 * percentile(gaps, 0.5), "ITL p99, ms": 1e3 * percentile(gaps, 0.99),
    }  # fmt: skip


async def _run_streams(url: str, model: str) -> list[load.RequestTiming]:
    bodies = [load.chat_body(model, f"Hello {i}", tokens=TOKENS) for i in range(STREAMS)]
    return await load.run_closed_loop(url, bodies, STREAMS)


def _sender_command(folder: Path, model: Path, sent_file: Path) -> list[str]:
    opened = open_checkpoint(model)
    arguments = (f"unix:{folder / 'language'}", opened.fingerprint, str(opened.description.width), str(sent_file))
    return [sys.executable, "-m", "benchmarks.embedding_sender", *arguments]


def _gigabytes_per_second(sent_file: Path) -> float:
    lines = [json.loads(line) for line in sent_file.read_text().splitlines() if line.endswith("]")]
    return float(sum(size for _, size in lines[1:]) / (lines[-1][0] - lines[0][0]) / 1e9)
