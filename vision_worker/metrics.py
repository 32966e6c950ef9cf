"""What a vision worker counts: one registry a process, every metric declared here. `docs/metrics.md` lists them for people."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from common.metrics import STAGE_BUCKETS, CacheEventsCollector, ProcessMetrics
from protos import vision_pb2 as pb
from vision_worker.cache.embedding_cache import EmbeddingCache

_BATCH = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128)


class Metrics:
    def __init__(self) -> None:
        self.registry = made = CollectorRegistry()
        self.common = ProcessMetrics(made, "vision")
        self.images = Counter("dvd_vision_images", "Images asked for, by how they were had", ["outcome"], registry=made)
        self.tiles = Counter("dvd_vision_tiles", "Tiles looked at", registry=made)
        self.delivered = Counter("dvd_vision_delivered_bytes", "Bytes of embeddings sent to sinks", registry=made)
        self.errors = Counter("dvd_vision_errors", "Encode calls that ended in an error", ["code"], registry=made)
        self.calls = Gauge("dvd_vision_calls_in_flight", "Encode calls being served", registry=made)
        self.waiting_images = Gauge("dvd_vision_waiting_images", "Images that wait for a thread to decode in", registry=made)
        self.waiting_tiles = Gauge("dvd_vision_waiting_tiles", "Tiles that wait for a batch", registry=made)
        self.batch_tiles = Histogram("dvd_vision_batch_tiles", "Tiles in a batch", registry=made, buckets=_BATCH)
        self._waits = Histogram(
            "dvd_vision_wait_seconds", "Seconds waited before a stage", ["stage"], registry=made, buckets=STAGE_BUCKETS
        )
        self._stages = Histogram(
            "dvd_vision_stage_seconds", "Seconds in a stage", ["stage"], registry=made, buckets=STAGE_BUCKETS
        )
        for outcome in ("encoded", "cached", "joined"):
            self.images.labels(outcome)

    def watch(self, cache: EmbeddingCache) -> None:
        """Show what a cache counts, where there is one."""
        if cache.tier is not None:
            self.registry.register(CacheEventsCollector(cache.tier, lambda: _events(cache)))

    def made(self, timings: pb.Timings) -> None:
        """An embedding was computed; its delivery comes apart."""
        self._waits.labels("decode").observe(timings.wait)
        self._waits.labels("encode").observe(timings.queue)
        for stage in ("decode", "tile", "encode", "route"):
            self._stages.labels(stage).observe(getattr(timings, stage))

    def sent(self, seconds: float, size: int) -> None:
        """EmbeddingCache of one call were delivered."""
        self._stages.labels("deliver").observe(seconds)
        self.delivered.inc(size)


def _events(cache: EmbeddingCache) -> dict[str, int]:
    return {name: cache.counts[name] for name in ("hits", "misses", "errors")} | {"evictions": cache.evictions}
