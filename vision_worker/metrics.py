"""Prometheus metrics of a vision worker, all declared here, in one registry. docs/metrics.md documents them."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from common.metrics import STAGE_BUCKETS, CacheEventsCollector, DecoderMetrics, ProcessMetrics
from protos import vision_pb2 as pb
from vision_worker.cache.embedding_cache import EmbeddingCache

_BATCH_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128)
"""Tiles."""


class Metrics:
    """The metrics and their registry. Attributes without an underscore are updated where the event happens."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.common = ProcessMetrics(registry, "vision")
        self.decoder = DecoderMetrics(registry)
        self.images = Counter("dvd_vision_images", "Images served, by how they were obtained", ["outcome"], registry=registry)
        self.tiles = Counter("dvd_vision_tiles", "Tiles encoded", registry=registry)
        self.delivered = Counter("dvd_vision_delivered_bytes", "Bytes of embeddings sent to sinks", registry=registry)
        self.errors = Counter("dvd_vision_errors", "Encode calls that ended in an error", ["code"], registry=registry)
        self.refused_calls = Counter("dvd_vision_calls_refused", "Calls without the cluster token", registry=registry)
        self.calls = Gauge("dvd_vision_calls_in_flight", "Encode calls in flight", registry=registry)
        self.waiting_images = Gauge("dvd_vision_waiting_images", "Images waiting for a thread to decode in", registry=registry)
        self.waiting_tiles = Gauge("dvd_vision_waiting_tiles", "Tiles waiting for a batch", registry=registry)
        self.dropped_tiles = Counter(
            "dvd_vision_dropped_tiles", "Tiles not computed because of the deadline of their call", registry=registry
        )
        self.batch_tiles = Histogram("dvd_vision_batch_tiles", "Tiles per batch", registry=registry, buckets=_BATCH_BUCKETS)
        self._waits = Histogram(
            "dvd_vision_wait_seconds", "Seconds waited before a stage", ["stage"], registry=registry, buckets=STAGE_BUCKETS
        )
        self._stages = Histogram(
            "dvd_vision_stage_seconds", "Seconds in a stage", ["stage"], registry=registry, buckets=STAGE_BUCKETS
        )
        for outcome in ("encoded", "cached", "joined"):
            self.images.labels(outcome)

    def watch(self, cache: EmbeddingCache) -> None:
        """Export the counts of `cache`, unless it is `none`."""
        if cache.tier is not None:
            self.registry.register(CacheEventsCollector(cache.tier, lambda: _cache_events(cache)))

    def observe_encode(self, timings: pb.Timings) -> None:
        """Record the stages of one encoded group, delivery excluded."""
        self._waits.labels("decode").observe(timings.wait)
        self._waits.labels("encode").observe(timings.queue)
        for stage in ("decode", "tile", "encode", "route"):
            self._stages.labels(stage).observe(getattr(timings, stage))

    def observe_delivery(self, seconds: float, size: int) -> None:
        """Record the delivery of one call's embeddings, `size` bytes together."""
        self._stages.labels("deliver").observe(seconds)
        self.delivered.inc(size)


def _cache_events(cache: EmbeddingCache) -> dict[str, int]:
    return {name: cache.counts[name] for name in ("hits", "misses", "errors")} | {"evictions": cache.evictions}
