"""The table in docs/metrics.md lists exactly the metrics that the processes export."""

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from lm_worker.metrics import Metrics as SinkMetrics
from lm_worker.store import Store
from server.metrics import EngineLoad, WorkerStatus
from server.metrics import Metrics as GatewayMetrics
from vision_worker.cache.embedding_cache import EmbeddingCache
from vision_worker.cache.memory import MemoryCache
from vision_worker.metrics import Metrics as VisionMetrics

ROOT = Path(__file__).parents[2]
_ROW = re.compile(r"^\| `(dvd_\w+)` \| (\w+) \| ([\w, –]+) \| ([^|]+) \| ([\w, ]+) \| ([^|]+) \|$", re.MULTILINE)

Row = tuple[str, frozenset[str]]
"""Type and labels of a metric."""


def documented(process: str) -> dict[str, Row]:
    """Return the rows of one process, by metric."""
    rows = _ROW.findall((ROOT / "docs/metrics.md").read_text())
    assert len(rows) == (ROOT / "docs/metrics.md").read_text().count("\n| `dvd_"), "the pattern misses a row"
    return {
        name: (kind, frozenset() if labels == "–" else frozenset(labels.split(", ")))
        for name, kind, labels, _, processes, _ in rows
        if process in processes.split(", ")
    }


def exported(registry: CollectorRegistry) -> dict[str, Row]:
    """Return the metrics of a registry, including those without a sample yet."""
    rows = {}
    for collector in list(registry._collector_to_names):
        for family in collector.describe() if isinstance(collector, MetricWrapperBase) else collector.collect():
            labels = collector._labelnames if isinstance(collector, MetricWrapperBase) else family.samples[0].labels
            rows[family.name + ("_total" if family.type == "counter" else "")] = (family.type, frozenset(labels))
    return rows


def test_metrics_of_the_gateway_are_documented() -> None:
    metrics = GatewayMetrics()
    metrics.watch_workers(lambda: [WorkerStatus("language", "a:1", True, EngineLoad(0, 0, 0))])
    assert exported(metrics.registry) == documented("gateway")


def test_metrics_of_a_vision_worker_are_documented() -> None:
    metrics = VisionMetrics()
    metrics.watch(EmbeddingCache(MemoryCache(1)))
    assert exported(metrics.registry) == documented("vision")


def test_metrics_of_a_sink_are_documented(tmp_path: Path) -> None:
    assert exported(SinkMetrics(Store(tmp_path, 1, 1)).registry) == documented("sink")


@pytest.mark.parametrize("process", ["gateway", "vision", "sink"])
def test_metric_names_end_with_their_unit(process: str) -> None:
    for name, (kind, _) in documented(process).items():
        assert name.endswith("_total") == (kind == "counter"), name
        if kind == "histogram":
            assert name.endswith(("_seconds", "_tiles")), name
