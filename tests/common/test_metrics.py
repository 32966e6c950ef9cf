"""Metrics that all processes have, and the endpoint for them."""

import asyncio
import socket
import time
import urllib.request

import pytest
from prometheus_client import CollectorRegistry

from common import metrics


def test_only_the_latest_checkpoint_is_1() -> None:
    registry = CollectorRegistry()
    common = metrics.ProcessMetrics(registry, "gateway")
    for fingerprint in ("a" * 64, "a" * 64, "b" * 64):
        common.set_model(fingerprint, "InternVL 3.5", "bfloat16")
    values = {
        sample.labels["fingerprint"]: sample.value
        for family in registry.collect()
        if family.name == "dvd_model_info"
        for sample in family.samples
    }
    assert values == {"a" * 12: 0, "b" * 12: 1}


async def test_a_blocked_event_loop_is_measured_as_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_LAG_INTERVAL_SECONDS", 0.01)
    registry = CollectorRegistry()
    measuring = asyncio.create_task(metrics.ProcessMetrics(registry, "gateway").measure_loop_lag())
    await asyncio.sleep(0)  # until it sleeps
    time.sleep(0.2)  # noqa: ASYNC251
    while not registry.get_sample_value("dvd_event_loop_lag_seconds_count"):
        await asyncio.sleep(0.005)
    measuring.cancel()
    assert (registry.get_sample_value("dvd_event_loop_lag_seconds_sum") or 0) >= 0.19


def test_metrics_are_served_and_a_port_in_use_is_named() -> None:
    registry = CollectorRegistry()
    registry.register(metrics.CacheEventsCollector("memory", lambda: {"hits": 3}))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    metrics.serve_metrics(registry, port)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    assert 'dvd_cache_events_total{event="hits",tier="memory"} 3.0' in text
    with pytest.raises(OSError, match=f"port {port}: another process uses it; choose another --metrics-port"):
        metrics.serve_metrics(registry, port)
