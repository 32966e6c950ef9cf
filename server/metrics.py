"""What the gateway counts, in a registry of its own."""

import contextlib
import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """One set an app, so that two apps in one process do not clash."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("dvd_requests_total", "Requests answered", ["route", "code"], registry=registry)
        self.in_flight = Gauge("dvd_requests_in_flight", "Requests that hold a permit", registry=registry)
        self.images = Counter("dvd_images_total", "Images in requests", registry=registry)
        self.tokens = Counter("dvd_visual_tokens_total", "Visual tokens in requests", registry=registry)
        self.tiles = Counter("dvd_tiles_total", "Tiles encoded, by what the router chose", ["resolution"], registry=registry)
        self.reused = Counter("dvd_embeddings_reused_total", "Images that needed no encoding", registry=registry)
        self.retries = Counter("dvd_retries_total", "Second tries", ["reason"], registry=registry)
        self.seconds = Histogram("dvd_stage_seconds", "Duration of a stage", ["stage"], buckets=_SECONDS, registry=registry)
        self.up = Gauge("dvd_worker_up", "1 where a worker answers", ["kind", "index"], registry=registry)
        for resolution in ("full", "compressed"):
            self.tiles.labels(resolution)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Observe how long the block takes, where it succeeds."""
        start = time.perf_counter()
        yield
        self.seconds.labels(name).observe(time.perf_counter() - start)

    def text(self) -> bytes:
        """The exposition format of Prometheus."""
        return generate_latest(self._registry)
