"""Which servers are compared, with servers and rates of the test's own."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks import baselines, result
from benchmarks.baselines import COMPRESSED, MIXES, OURS, REPLICAS, STOCK, Started
from benchmarks.options import Options

RATES = {STOCK[0]: 1.0, REPLICAS: 2.0, OURS: 3.0, COMPRESSED: 4.0}


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of servers in the order of their starts and measurements."""
    events: list[str] = []

    def measure(server: Started, mix: object, seeds: object) -> tuple[float, dict[str, float]]:
        events.append(f"measure {server.url}")
        return 10.0 if (server.url, mix) == (STOCK[0], MIXES["text only"]) else RATES[str(server.url)], {}

    monkeypatch.setattr(result, "FOLDER", tmp_path)
    monkeypatch.setattr(baselines, "_measure", measure)
    monkeypatch.setattr(baselines._Comparison, "_warm_up", lambda *_: None)
    return events


def start(name: str, events: list[str], fails: bool = False) -> Callable[[], AbstractContextManager[Started]]:
    @contextmanager
    def starting() -> Iterator[Started]:
        events.append(f"start {name}")
        if fails:
            raise RuntimeError("no such flag")
        yield Started(Path(), name, {})

    return starting


def compare(events: list[str], *, quick: bool = False) -> dict[str, Any]:
    theirs = {name: start(name, events, fails=name == STOCK[2]) for name in STOCK}
    ours = {name: start(name, events) for name in (OURS, COMPRESSED)}
    comparison = baselines._Comparison(Options(quick=quick))
    for mixes in (["text only", "balanced"], [mix for mix in MIXES if mix not in ("text only", "balanced")]):
        comparison.measure(mixes, theirs, ours)
    return dict(json.loads(json.dumps(comparison.result().figures)))


def test_ours_is_compared_with_the_best_of_each_mix(started: list[str]) -> None:
    figures = compare(started)
    assert figures["text only"]["best of stock vLLM"] == STOCK[0]
    assert figures["text only"]["over the best"][OURS]["ratio"] == 0.3
    assert figures["balanced"]["best of stock vLLM"] == REPLICAS
    assert figures["balanced"]["over the best"] == {
        OURS: {"ratio": 1.5, "spread": 0.0}, COMPRESSED: {"ratio": 2.0, "spread": 0.0},
    }  # fmt: skip


def test_a_way_that_does_not_start_is_named(started: list[str]) -> None:
    assert compare(started)["does not run here"] == {STOCK[2]: "no such flag"}
    assert started.count(f"start {STOCK[2]}") == 2  # once for each checkpoint


def test_a_quick_run_compares_with_replicas_only(started: list[str]) -> None:
    figures = compare(started, quick=True)
    assert {figures[mix]["best of stock vLLM"] for mix in MIXES} == {REPLICAS}
    assert f"start {STOCK[0]}" not in started
