"""What the sink counts: one registry a process, every metric declared here. `docs/metrics.md` lists them for people."""

from prometheus_client import CollectorRegistry, Counter, Gauge

from common.metrics import CacheEventsCollector, ProcessMetrics
from lm_worker.store import Store


class Metrics:
    def __init__(self, store: Store) -> None:
        self.registry = made = CollectorRegistry()
        self.common = ProcessMetrics(made, "sink")
        self.deliveries = Counter("dvd_sink_deliveries", "Deliveries that ended well", ["outcome"], registry=made)
        self.received = Counter("dvd_sink_received_bytes", "Bytes of embeddings that were stored", registry=made)
        self.refusals = Counter("dvd_sink_refusals", "Deliveries that were refused or broke off", ["code"], registry=made)
        used = Gauge("dvd_sink_used_bytes", "Shared memory in use", registry=made)
        used.set_function(lambda: store.used)
        held = Gauge("dvd_sink_embeddings", "Embeddings that are here", registry=made)
        held.set_function(lambda: len(store))
        Gauge("dvd_sink_budget_bytes", "Shared memory that may be used", registry=made).set(store.budget)
        made.register(CacheEventsCollector("sink", lambda: {"evictions": store.evictions}))
        for outcome in ("stored", "already_here"):
            self.deliveries.labels(outcome)
