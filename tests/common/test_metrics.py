"""What every process counts alike."""

import asyncio
import socket
import time
import urllib.request

import pytest
from prometheus_client import CollectorRegistry

from common import metrics


def test_the_checkpoint_that_is_served_is_the_last_one() -> None:
    registry = CollectorRegistry()
    common = metrics.ProcessMetrics(registry, "gateway")
    for fingerprint in ("a" * 64, "a" * 64, "b" * 64):
        common.set_model(fingerprint, "InternVL 3.5", "bfloat16")
    found = {
        sample.labels["fingerprint"]: sample.value
        for family in registry.collect()
        if family.name == "dvd_model_info"
        for sample in family.samples
    }
    assert found == {"a" * 12: 0, "b" * 12: 1}


async def test_a_loop_that_is_held_up_is_seen_to_be_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_LAG_EVERY", 0.01)
    registry = CollectorRegistry()
    watching = asyncio.create_task(metrics.ProcessMetrics(registry, "gateway").measure_loop_lag())
    await asyncio.sleep(0)  # it waits now
    time.sleep(0.2)  # noqa: ASYNC251
    while not registry.get_sample_value("dvd_event_loop_lag_seconds_count"):
        await asyncio.sleep(0.005)
    watching.cancel()
    assert (registry.get_sample_value("dvd_event_loop_lag_seconds_sum") or 0) >= 0.19


def test_metrics_are_served_at_a_port_and_a_taken_one_is_named() -> None:
    registry = CollectorRegistry()
    registry.register(metrics.CacheEventsCollector("memory", lambda: {"hits": 3}))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    metrics.serve_metrics(registry, port)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    assert 'dvd_cache_events_total{event="hits",tier="memory"} 3.0' in text
    with pytest.raises(OSError, match=f"port {port}: another process does; choose another --metrics-port"):
        metrics.serve_metrics(registry, port)
