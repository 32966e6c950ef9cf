"""docs/metrics.md is true: its table and what the processes export are the same, both ways."""

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from lm_worker.metrics import Metrics as SinkMetrics
from lm_worker.store import Store
from server.metrics import EngineLoad, WorkerStatus
from server.metrics import Metrics as GatewayMetrics
from vision_worker.cache.embedding_cache import EmbeddingCache, Memory
from vision_worker.metrics import Metrics as VisionMetrics

ROOT = Path(__file__).parents[2]
_ROW = re.compile(r"^\| `(dvd_\w+)` \| (\w+) \| ([\w, –]+) \| ([^|]+) \| ([\w, ]+) \| ([^|]+) \|$", re.MULTILINE)

Row = tuple[str, frozenset[str]]
"""A metric's type, and its labels."""


def documented(process: str) -> dict[str, Row]:
    rows = _ROW.findall((ROOT / "docs/metrics.md").read_text())
    assert len(rows) == (ROOT / "docs/metrics.md").read_text().count("\n| `dvd_"), "a row that is not read"
    return {
        name: (kind, frozenset() if labels == "–" else frozenset(labels.split(", ")))
        for name, kind, labels, _, processes, _ in rows
        if process in processes.split(", ")
    }


def exported(registry: CollectorRegistry) -> dict[str, Row]:
    """What a registry has, whether anything was counted yet or not."""
    found = {}
    for collector in list(registry._collector_to_names):
        declared = isinstance(collector, MetricWrapperBase)
        for family in collector.describe() if declared else collector.collect():
            labels = collector._labelnames if declared else family.samples[0].labels
            found[family.name + ("_total" if family.type == "counter" else "")] = (family.type, frozenset(labels))
    return found


def test_of_the_gateway() -> None:
    made = GatewayMetrics()
    made.watch(lambda: [WorkerStatus("language", "a:1", True, EngineLoad(0, 0, 0))])
    assert exported(made.registry) == documented("gateway")


def test_of_a_vision_worker() -> None:
    made = VisionMetrics()
    made.watch(EmbeddingCache(Memory(1)))
    assert exported(made.registry) == documented("vision")


def test_of_a_sink(tmp_path: Path) -> None:
    assert exported(SinkMetrics(Store(tmp_path, 1, 1)).registry) == documented("sink")


@pytest.mark.parametrize("process", ["gateway", "vision", "sink"])
def test_names_say_their_units(process: str) -> None:
    for name, (kind, _) in documented(process).items():
        assert name.endswith("_total") == (kind == "counter"), name
        if kind == "histogram":
            assert name.endswith(("_seconds", "_tiles")), name
