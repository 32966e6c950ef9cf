"""What the gateway counts: one registry a process, every metric declared here. Several processes are shown as one.

`docs/metrics.md` lists them for people.
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

from common.metrics import STAGE_BUCKETS, ProcessMetrics, cache_counter
from server.request_stats import Account

_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
_BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0)
_WHOLE = (0.03, 0.1, 0.3, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_TILES = (1, 2, 3, 5, 7, 9, 13, 21, 31, 41)

_COUNTED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
"""Routes whose answers are timed: the others are not what anybody waits for."""


class Metrics:
    def __init__(self) -> None:
        self.registry = made = CollectorRegistry()
        self.common = ProcessMetrics(made, "gateway")
        self.requests = Counter("dvd_requests", "Answered requests", ["route", "code"], registry=made)
        self.errors = Counter("dvd_errors", "Requests that ended in an error, streams too", ["code"], registry=made)
        self.in_flight = Gauge("dvd_requests_in_flight", "Requests being served", registry=made, multiprocess_mode="livesum")
        self.in_stage = Gauge(
            "dvd_stage_requests", "Requests in a stage now", ["stage"], registry=made, multiprocess_mode="livesum"
        )
        self.stages = Histogram("dvd_stage_seconds", "Seconds in a stage", ["stage"], registry=made, buckets=STAGE_BUCKETS)
        self.to_engine = Histogram(
            "dvd_time_to_engine_seconds",
            "Seconds from arrival until vLLM is asked",
            registry=made,
            buckets=STAGE_BUCKETS,
        )
        self.first_token = Histogram(
            "dvd_time_to_first_token_seconds", "Seconds from arrival to a stream's first event with content", registry=made,
            buckets=_FIRST_TOKEN,
        )  # fmt: skip
        self.between_tokens = Histogram(
            "dvd_inter_token_seconds", "Seconds between two events with content of a stream", registry=made,
            buckets=_BETWEEN_TOKENS,
        )  # fmt: skip
        self.whole = Histogram(
            "dvd_request_seconds", "Seconds from arrival to the last byte of a good answer", ["route"], registry=made,
            buckets=_WHOLE,
        )  # fmt: skip
        self.images = Counter("dvd_images", "Images in accepted requests", registry=made)
        self.cache = cache_counter(made)
        self.encodes = Counter("dvd_encodes", "Encode calls made", registry=made)
        self.joined = Counter("dvd_encodes_joined", "Images that shared an encode in flight", registry=made)
        self.tiles = Counter("dvd_tiles", "Encoded tiles", ["resolution"], registry=made)
        self.image_tiles = Histogram("dvd_image_tiles", "Tiles of an encoded image", registry=made, buckets=_TILES)
        self.visual_tokens = Counter("dvd_visual_tokens", "Visual tokens sent to language models", registry=made)
        self.saved_tokens = Counter("dvd_visual_tokens_saved", "Visual tokens that compression left out", registry=made)
        self._workers: _Workers | None = None

    def watch(self, workers: Callable[[], Iterable["Worker"]]) -> None:
        """Show whom `workers` lists when somebody looks."""
        self._workers = _Workers(workers)
        self.registry.register(self._workers)

    @contextlib.contextmanager
    def stage(self, name: str, account: Account) -> Iterator[None]:
        """A request is in a stage: counted while it is; the seconds go to its account, also where it fails."""
        inside = self.in_stage.labels(name)
        inside.inc()
        began = time.monotonic()
        try:
            yield
        finally:
            inside.dec()
            account.add(name, time.monotonic() - began)

    def count(self, account: Account, route: str, status: int) -> None:
        """A request has ended."""
        self.requests.labels(route, status).inc()
        if account.error is not None:
            self.errors.labels(account.error).inc()
        for stage, seconds in account.stages.items():
            self.stages.labels(stage).observe(seconds)
        if account.to_engine is not None:
            self.to_engine.observe(account.to_engine)
        if route in _COUNTED and status == 200 and account.error is None:
            self.whole.labels(route).observe(account.elapsed())

    def text(self) -> bytes:
        """In Prometheus' text format."""
        folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        if folder is None:
            return generate_latest(self.registry)
        _forget_the_dead(Path(folder))
        everybody = CollectorRegistry()
        MultiProcessCollector(everybody)  # type: ignore[no-untyped-call]
        if self._workers:
            everybody.register(self._workers)  # every process asks every worker: any of them knows
        return generate_latest(everybody)


class Load(NamedTuple):
    """Of one vLLM: its requests, and the used part of its KV cache, 0 to 1, of its fullest engine."""

    requests_waiting: float
    requests_running: float
    kv_cache_usage: float


class Worker(NamedTuple):
    """What is shown of one. `load` is None where it is no language worker, or its vLLM does not say."""

    kind: str
    address: str
    up: bool
    load: Load | None


class _Workers(Collector):
    """Read when somebody looks, so that a worker that has left is not shown: the files of several processes forget nothing."""

    _ENGINE = (
        ("requests_waiting", "Requests that wait in a language worker's vLLM"),
        ("requests_running", "Requests that a language worker's vLLM computes"),
        ("kv_cache_usage", "Used part of a language worker's KV cache, 0 to 1"),
    )

    def __init__(self, workers: Callable[[], Iterable[Worker]]) -> None:
        self._workers = workers

    def collect(self) -> Iterator[GaugeMetricFamily]:
        workers = list(self._workers())
        up = GaugeMetricFamily("dvd_worker_up", "Whether a worker answers", labels=["kind", "address"])
        for worker in workers:
            up.add_metric([worker.kind, worker.address], worker.up)
        yield up
        for name, text in self._ENGINE:
            family = GaugeMetricFamily(f"dvd_engine_{name}", text, labels=["address"])
            for worker in workers:
                if worker.load is not None:
                    family.add_metric([worker.address], getattr(worker.load, name))
            yield family


class Listener:
    """Hears a streamed answer go by, and times its events. They are told by their bytes: nothing is parsed.

    An event counts that has something of the answer in it. The first one's time is the TTFT; events that come in one piece
    have no time between them.
    """

    _CONTENT = re.compile(
        rb'"(?:content|reasoning|reasoning_content|text|delta|partial_json)"\s*:\s*"(?!")|"tool_calls"\s*:\s*\[\s*\{'
    )
    _NAMED = re.compile(rb"event: \S*delta\n|(?!event: )")  # responses and messages say it all again when a part is done

    def __init__(self, metrics: Metrics, account: Account) -> None:
        self._metrics, self._account = metrics, account
        self._last: float | None = None

    def saw(self, events: bytes) -> None:
        """Whole events, each with its end."""
        for event in events.split(b"\n\n"):
            if self._NAMED.match(event) and self._CONTENT.search(event):
                self._came(time.monotonic())

    def failed(self, code: str) -> None:
        """The answer ends in an error, though its head said 200."""
        self._account.error = code

    def _came(self, now: float) -> None:
        if self._last is None:
            self._metrics.first_token.observe(now - self._account.arrived)
        else:
            self._metrics.between_tokens.observe(now - self._last)
        self._last = now


def _forget_the_dead(folder: Path) -> None:
    """A process that was killed leaves its gauges behind, and with them requests in flight that nobody serves."""
    for file in folder.glob("gauge_live*.db"):
        pid = int(file.stem.rpartition("_")[2])
        if not Path(f"/proc/{pid}").exists():
            with contextlib.suppress(FileNotFoundError):  # another process of the gateway was faster
                mark_process_dead(pid)  # type: ignore[no-untyped-call]
