"""Durations of work on a device, which runs behind the Python that starts it."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

_MIN_RUNS, _MAX_RUNS = 3, 50


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_seconds(work: Callable[[], Any], device: torch.device, budget: float) -> list[float]:
    """Run `work` repeatedly and return the seconds of each run, the first two excluded.

    The first run compiles or records what it must, the second one is the first at full speed.

    Args:
        work: Starts the work; it may return before the device has done it.
        device: Where it runs.
        budget: Seconds for all measured runs together. There are at least three and at most fifty of them.
    """
    for _ in range(2):
        last = run_seconds(work, device)
    runs = max(_MIN_RUNS, min(_MAX_RUNS, int(budget / max(last, 1e-6))))
    return [run_seconds(work, device) for _ in range(runs)]


def rate(count: int, seconds: list[float]) -> dict[str, float]:
    """Return items per second of runs with `count` items each: the median, and its spread, (maximum - minimum) / median."""
    median = statistics.median(seconds)
    return {"per second": round(count / median, 3), "spread": round((max(seconds) - min(seconds)) / median, 3)}


def run_seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of one run, until the device has done it."""
    synchronize(device)
    started_at = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started_at
