"""What a vision worker counts: one registry a process, every metric declared here."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, start_http_server
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from wire.cache import Embeddings


class Metrics:
    def __init__(self) -> None:
        self.registry = made = CollectorRegistry()
        self.images = Counter("dvd_vision_images", "Images asked for, by how they were had", ["outcome"], registry=made)
        self.tiles = Counter("dvd_vision_tiles", "Tiles looked at", registry=made)
        self.delivered = Counter("dvd_vision_delivered_bytes", "Bytes of embeddings sent to sinks", registry=made)
        for outcome in ("encoded", "cached", "joined"):
            self.images.labels(outcome)

    def watch(self, cache: Embeddings) -> None:
        self.registry.register(_Cache(cache))

    def serve(self, port: int) -> None:
        """At `/metrics` of a port, from a thread of its own."""
        start_http_server(port, registry=self.registry)


class _Cache(Collector):
    def __init__(self, cache: Embeddings) -> None:
        self._cache = cache

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily("dvd_vision_cache_events", "What the cache of embeddings did", labels=["event"])
        for event in ("hits", "misses", "errors"):
            family.add_metric([event], self._cache.counts[event])
        family.add_metric(["evictions"], self._cache.evictions)
        yield family
