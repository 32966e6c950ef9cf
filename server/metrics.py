"""What the gateway counts: one registry a process, every metric declared here. Several processes are shown as one."""

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class Metrics:
    def __init__(self) -> None:
        self.registry = made = CollectorRegistry()
        self.requests = Counter("dvd_requests", "Answered requests", ["route", "code"], registry=made)
        self.in_flight = Gauge("dvd_requests_in_flight", "Requests being served", registry=made, multiprocess_mode="livesum")
        self.images = Counter("dvd_images", "Images in accepted requests", registry=made)
        self.reused = Counter("dvd_embeddings_reused", "Images whose embedding the language worker had", registry=made)
        self.encodes = Counter("dvd_encodes", "Encode calls made", registry=made)
        self.joined = Counter("dvd_encodes_joined", "Images that shared an encode in flight", registry=made)
        self.tiles = Counter("dvd_tiles", "Encoded tiles", ["resolution"], registry=made)
        self.visual_tokens = Counter("dvd_visual_tokens", "Visual tokens sent to language models", registry=made)
        self.stages = Histogram("dvd_stage_seconds", "Seconds a stage took", ["stage"], registry=made, buckets=_SECONDS)
        self.workers = Gauge(
            "dvd_worker_up", "Whether a worker answers", ["kind", "index"], registry=made, multiprocess_mode="livemin"
        )

    def text(self) -> bytes:
        """In Prometheus' text format."""
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return generate_latest(self.registry)
        everybody = CollectorRegistry()
        MultiProcessCollector(everybody)  # type: ignore[no-untyped-call]
        return generate_latest(everybody)
