"""The measurement of preprocessing over cores: the worker's own path, and what follows from its rates."""

import os
from typing import Any

import pytest

from benchmarks import preprocessing_scaling
from benchmarks.preprocessing_scaling import Setup, measure, run_workers


def test_workers_prepare_images_on_their_cores() -> None:
    core = min(os.sched_getaffinity(0))
    result = run_workers([[core], [core]], (900, 450), 0.2)
    assert result["tiles"] == 3, "two and a thumbnail"
    assert result["images"] > 0
    assert 0 < result["cpu"] < 10


def test_figures_follow_from_the_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(setup: Setup, _size: Any, _seconds: float) -> dict[str, float]:
        rate = 10.0 if setup == [[3]] else 18.0 if setup == [[3, 5]] else 19.0
        return {"images": rate, "cpu": 0.1, "tiles": 9}

    monkeypatch.setattr(preprocessing_scaling, "run_workers", run)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {5, 3})
    figures = measure(2)["1920 × 1080"]
    assert figures["share of linear"] == 0.9
    assert figures["share of linear, a worker per core"] == 0.95
    assert figures["one worker / a worker per core"] == 0.947
    assert figures["CPU ms per image"] == 100
    assert figures["cores for 1092 tiles/s"] == 13.5, "9 images/s a core are 81 tiles/s"
