"""Metrics of the sink, one registry per process. `docs/metrics.md` describes them."""

from prometheus_client import CollectorRegistry, Counter, Gauge

from common.metrics import CacheEventsCollector, ProcessMetrics
from lm_worker.store import Store

TRANSPORTS = ("shm", "tcp", "grpc")
"""Label values: the names of transports, and `grpc` for values that were sent through the call itself."""


class Metrics:
    """Every metric that the sink exports."""

    def __init__(self, store: Store) -> None:
        self.registry = registry = CollectorRegistry()
        self.common = ProcessMetrics(registry, "sink")
        self.deliveries = Counter("dvd_sink_deliveries", "Deliveries that succeeded", ["outcome"], registry=registry)
        self.received = Counter(
            "dvd_sink_received_bytes", "Bytes of embeddings that were stored", ["transport"], registry=registry
        )
        self.refusals = Counter("dvd_sink_refusals", "Deliveries that were rejected or failed", ["code"], registry=registry)
        self.refused_calls = Counter("dvd_sink_calls_refused", "Calls without the cluster token", registry=registry)
        used = Gauge("dvd_sink_used_bytes", "Shared memory in use", registry=registry)
        used.set_function(lambda: store.used)
        embeddings = Gauge("dvd_sink_embeddings", "Embeddings in shared memory", registry=registry)
        embeddings.set_function(lambda: len(store))
        Gauge("dvd_sink_budget_bytes", "Shared memory that may be used", registry=registry).set(store.budget)
        registry.register(CacheEventsCollector("sink", lambda: {"evictions": store.evictions}))
        for outcome in ("stored", "already_here"):
            self.deliveries.labels(outcome)
        for transport in TRANSPORTS:
            self.received.labels(transport)
