"""Metrics of the gateway: one registry per process, every metric declared here. Several processes are exported as one.

`docs/metrics.md` documents them.
"""

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from common.metrics import STAGE_BUCKETS, DecoderMetrics, ProcessMetrics, cache_counter
from server.request_stats import RequestStats

_FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
_INTER_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0)
_REQUEST_BUCKETS = (0.03, 0.1, 0.3, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_TILE_BUCKETS = (1, 2, 3, 5, 7, 9, 13, 21, 31, 41)


class Metrics:
    """All metrics of one gateway process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.process = ProcessMetrics(registry, "gateway")
        self.decoder = DecoderMetrics(registry)
        self.requests = Counter("dvd_requests", "Completed requests", ["route", "code"], registry=registry)
        self.errors = Counter("dvd_errors", "Requests that ended with an error, streams included", ["code"], registry=registry)
        self.in_flight = Gauge("dvd_requests_in_flight", "Requests in flight", registry=registry, multiprocess_mode="livesum")
        self.body_bytes = Gauge(
            "dvd_request_body_bytes", "Memory of the request bodies in flight", registry=registry, multiprocess_mode="livesum"
        )
        self.connections = Gauge("dvd_connections", "Open connections", registry=registry, multiprocess_mode="livesum")
        self.failed_handshakes = Counter(
            "dvd_tls_handshakes_failed", "TLS handshakes of clients that failed", ["reason"], registry=registry
        )
        self.in_stage = Gauge(
            "dvd_stage_requests", "Requests in a stage", ["stage"], registry=registry, multiprocess_mode="livesum"
        )
        self.stages = Histogram("dvd_stage_seconds", "Seconds in a stage", ["stage"], registry=registry, buckets=STAGE_BUCKETS)
        self.to_engine = Histogram(
            "dvd_time_to_engine_seconds",
            "Seconds from arrival until the request is sent to vLLM",
            registry=registry,
            buckets=STAGE_BUCKETS,
        )
        self.first_token = Histogram(
            "dvd_time_to_first_token_seconds", "Seconds from arrival to a stream's first event with content", registry=registry,
            buckets=_FIRST_TOKEN_BUCKETS,
        )  # fmt: skip
        self.inter_token = Histogram(
            "dvd_inter_token_seconds", "Seconds between two events with content of a stream", registry=registry,
            buckets=_INTER_TOKEN_BUCKETS,
        )  # fmt: skip
        self.request_seconds = Histogram(
            "dvd_request_seconds", "Seconds from arrival to the last byte of a response", ["route"], registry=registry,
            buckets=_REQUEST_BUCKETS,
        )  # fmt: skip
        self.images = Counter("dvd_images", "Images in accepted requests", registry=registry)
        self.cache = cache_counter(registry)
        self.encodes = Counter("dvd_encodes", "Encode calls sent to vision workers", registry=registry)
        self.waiting_tiles = Gauge(
            "dvd_queue_tiles", "Tiles that wait in the gateway for a vision worker", registry=registry,
            multiprocess_mode="livesum",
        )  # fmt: skip
        self.dropped_tiles = Counter("dvd_tiles_dropped", "Tiles whose deadline passed in the queue", registry=registry)
        self.refused = Counter("dvd_requests_refused", "Requests refused for lack of capacity", ["resource"], registry=registry)
        self.over_budget = Counter(
            "dvd_requests_over_budget", "Requests that ask for more than one may cost", ["budget"], registry=registry
        )
        self.degradation_level = Gauge(
            "dvd_degradation_level", "Level of degradation, 0 for none", registry=registry, multiprocess_mode="livemax"
        )
        self.degraded_images = Counter("dvd_degraded_images", "Images encoded with a degraded setting", registry=registry)
        self.hedges = Counter("dvd_encodes_hedged", "Encode calls sent to a second vision worker", registry=registry)
        self.retries = Counter("dvd_retries", "Attempts repeated on another worker, or refused", ["outcome"], registry=registry)
        self.joined = Counter("dvd_encodes_joined", "Images that shared an encode in flight", registry=registry)
        self.tiles = Counter("dvd_tiles", "Encoded tiles", ["resolution"], registry=registry)
        self.image_tiles = Histogram("dvd_image_tiles", "Tiles of an encoded image", registry=registry, buckets=_TILE_BUCKETS)
        self.visual_tokens = Counter("dvd_visual_tokens", "Visual tokens sent to language models", registry=registry)
        self.saved_tokens = Counter("dvd_visual_tokens_saved", "Visual tokens saved by compression", registry=registry)
        self._workers: _WorkerCollector | None = None

    def watch_workers(self, statuses: Callable[[], Iterable["WorkerStatus"]]) -> None:
        """Export the workers that `statuses` returns at each scrape."""
        self._workers = _WorkerCollector(statuses)
        self.registry.register(self._workers)

    @contextlib.contextmanager
    def stage(self, name: str, stats: RequestStats) -> Iterator[None]:
        """Count a request as being in a stage, and add the stage's duration to its statistics, also if it fails."""
        gauge = self.in_stage.labels(name)
        gauge.inc()
        started = time.monotonic()
        try:
            yield
        finally:
            gauge.dec()
            stats.add_stage(name, time.monotonic() - started)

    def record_request(self, stats: RequestStats, route: str, status: int) -> None:
        """Record a request that has ended."""
        self.requests.labels(route, status).inc()
        if stats.error_code is not None:
            self.errors.labels(stats.error_code).inc()
        for stage, seconds in stats.stages.items():
            self.stages.labels(stage).observe(seconds)
        if stats.seconds_to_engine is not None:
            self.to_engine.observe(stats.seconds_to_engine)
        if stats.generates_text and status == 200 and stats.error_code is None:
            self.request_seconds.labels(route).observe(stats.elapsed())

    def text(self) -> bytes:
        """Render all metrics in Prometheus' text format."""
        folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        if folder is None:
            return generate_latest(self.registry)
        _remove_dead_processes(Path(folder))
        merged = CollectorRegistry()
        MultiProcessCollector(merged)  # type: ignore[no-untyped-call]
        if self._workers:
            merged.register(self._workers)  # every process probes every worker, so any of them can export all
        return generate_latest(merged)


class EngineLoad(NamedTuple):
    """Load of one vLLM server: its requests, and the used share (0 to 1) of the KV cache of its fullest engine."""

    requests_waiting: float
    requests_running: float
    kv_cache_usage: float


class WorkerStatus(NamedTuple):
    """A worker as it is exported. `load` is None for a vision worker, or if vLLM does not report it."""

    kind: str
    address: str
    is_up: bool
    load: EngineLoad | None


class _WorkerCollector(Collector):
    """Collects the workers at each scrape, so that a removed one is not exported: multi-process files never forget a label."""

    _ENGINE_METRICS = (
        ("requests_waiting", "Requests waiting in a language worker's vLLM"),
        ("requests_running", "Requests running in a language worker's vLLM"),
        ("kv_cache_usage", "Used share of a language worker's KV cache, 0 to 1"),
    )

    def __init__(self, statuses: Callable[[], Iterable[WorkerStatus]]) -> None:
        self._statuses = statuses

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the metric families of all workers."""
        workers = list(self._statuses())
        up = GaugeMetricFamily("dvd_worker_up", "Whether a worker is up", labels=["kind", "address"])
        for worker in workers:
            up.add_metric([worker.kind, worker.address], worker.is_up)
        yield up
        for name, text in self._ENGINE_METRICS:
            family = GaugeMetricFamily(f"dvd_engine_{name}", text, labels=["address"])
            for worker in workers:
                if worker.load is not None:
                    family.add_metric([worker.address], getattr(worker.load, name))
            yield family


class StreamTimer:
    """Times the events of a streamed response, recognised by their bytes: nothing is parsed.

    Only events with generated content count. The first one gives the time to first token. Events that arrive in one piece have
    no time between them.
    """

    _CONTENT = re.compile(
        rb'"(?:content|reasoning|reasoning_content|text|delta|partial_json)"\s*:\s*"(?!")|"tool_calls"\s*:\s*\[\s*\{'
    )
    _DELTA = re.compile(rb"event: \S*delta\n|(?!event: )")  # Responses and Messages repeat the content when a part is complete

    def __init__(self, metrics: Metrics, stats: RequestStats) -> None:
        self._metrics, self._stats = metrics, stats
        self._last: float | None = None

    def record(self, events: bytes) -> None:
        """Record complete events that arrived now."""
        for event in events.split(b"\n\n"):
            if self._DELTA.match(event) and self._CONTENT.search(event):
                self._record_content(time.monotonic())

    def record_error(self, code: str) -> None:
        """Record that the stream ends with an error, although its status was 200."""
        self._stats.error_code = code

    def _record_content(self, now: float) -> None:
        if self._last is None:
            self._metrics.first_token.observe(now - self._stats.arrived)
        else:
            self._metrics.inter_token.observe(now - self._last)
        self._last = now


def _remove_dead_processes(folder: Path) -> None:
    """Remove the gauges of killed processes, which would report requests that are no longer served."""
    for file in folder.glob("gauge_live*.db"):
        pid = int(file.stem.rpartition("_")[2])
        if not Path(f"/proc/{pid}").exists():
            with contextlib.suppress(FileNotFoundError):  # another gateway process removed it
                mark_process_dead(pid)  # type: ignore[no-untyped-call]
