"""What the gateway counts: one registry a process, every metric declared here. Several processes are shown as one."""

import os
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

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
        self._workers: _Workers | None = None

    def watch(self, workers: Callable[[], Iterable[tuple[str, str, bool]]]) -> None:
        """Show whom `workers` lists when somebody looks: kind, address, whether it answers."""
        self._workers = _Workers(workers)
        self.registry.register(self._workers)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return generate_latest(self.registry)
        everybody = CollectorRegistry()
        MultiProcessCollector(everybody)  # type: ignore[no-untyped-call]
        if self._workers:
            everybody.register(self._workers)  # every process asks every worker: any of them knows
        return generate_latest(everybody)


class _Workers(Collector):
    """Read when somebody looks, so that a worker that has left is not shown: the files of several processes forget nothing."""

    def __init__(self, workers: Callable[[], Iterable[tuple[str, str, bool]]]) -> None:
        self._workers = workers

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = GaugeMetricFamily("dvd_worker_up", "Whether a worker answers", labels=["kind", "address"])
        for kind, address, up in self._workers():
            family.add_metric([kind, address], up)
        yield family
