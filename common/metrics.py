"""Prometheus metrics that all processes have: build, checkpoint, event-loop lag, cache events; and the endpoint for them."""

import asyncio
import errno
import importlib.metadata
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from common import small_http

STAGE_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""In seconds: from the tiling of a small image to a fetch that times out."""

_LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_LAG_INTERVAL_SECONDS = 0.25

# counted where it happens: sink hits and misses by the gateway, sink evictions by the sink, all others by vision workers
_CACHE_EVENTS = "dvd_cache_events"
_CACHE_HELP = "Events of the caches of embeddings"
_CACHE_LABELS = ("tier", "event")


class ProcessMetrics:
    """The metrics that every process has.

    Args:
        registry: registry that they are added to.
        process: `gateway`, `vision` or `sink`.
    """

    def __init__(self, registry: CollectorRegistry, process: str) -> None:
        # gauges that are always 1 instead of Info, which prometheus-client does not support in multiprocess mode
        build = Gauge(
            "dvd_build_info",
            "1, labelled with the process and its version",
            ["process", "version"],
            registry=registry,
            multiprocess_mode="livemax",
        )
        build.labels(process, importlib.metadata.version("dvd-serve")).set(1)
        self._model = Gauge(
            "dvd_model_info", "1 for the served checkpoint, 0 for earlier ones", ["fingerprint", "family", "dtype"],
            registry=registry, multiprocess_mode="livemax",
        )  # fmt: skip
        self._labels: tuple[str, str, str] | None = None
        self._loop_lag = Histogram(
            "dvd_event_loop_lag_seconds", "Seconds by which the event loop is late for a timer", registry=registry,
            buckets=_LAG_BUCKETS,
        )  # fmt: skip

    def set_model(self, fingerprint: str, family: str, dtype: str) -> None:
        """Set the served checkpoint. `dtype` is the one that this process computes in."""
        labels = (fingerprint[:12], family, dtype)
        if labels == self._labels:
            return
        if self._labels is not None:
            self._model.labels(*self._labels).set(0)
        self._model.labels(*labels).set(1)
        self._labels = labels

    async def measure_loop_lag(self) -> None:
        """Measure how late this event loop is, until cancelled."""
        while True:
            due = time.monotonic() + _LAG_INTERVAL_SECONDS
            await asyncio.sleep(_LAG_INTERVAL_SECONDS)
            self._loop_lag.observe(max(0.0, time.monotonic() - due))


class DecoderMetrics:
    """Metrics of the processes that decode images or videos (`common/decoder_processes.py`).

    Args:
        registry: registry that they are added to.
    """

    REASONS = ("abandoned", "cpu", "crash", "memory", "time")
    """Why a process ends before its time."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.seconds = Histogram(
            "dvd_decode_seconds", "Seconds to decode an image or video in a decoder process", registry=registry,
            buckets=STAGE_BUCKETS,
        )  # fmt: skip
        self.starts = Counter("dvd_decoder_starts", "Decoder processes started", registry=registry)
        self.ends = Counter("dvd_decoder_ends", "Decoder processes ended before their time", ["reason"], registry=registry)
        for reason in self.REASONS:
            self.ends.labels(reason)


def cache_counter(registry: CollectorRegistry) -> Counter:
    """Return a counter of cache events, for code that counts them as they happen."""
    return Counter(_CACHE_EVENTS, _CACHE_HELP, _CACHE_LABELS, registry=registry)


class CacheEventsCollector(Collector):
    """Exports the events of a cache that counts them itself. It cannot be used in multiprocess mode.

    Args:
        tier: label of the cache.
        counts: returns the number of events of each kind.
    """

    def __init__(self, tier: str, counts: Callable[[], Mapping[str, int]]) -> None:
        self._tier, self._counts = tier, counts

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Yield the counter in its current state."""
        family = CounterMetricFamily(_CACHE_EVENTS, _CACHE_HELP, labels=_CACHE_LABELS)
        for event, count in self._counts().items():
            family.add_metric([self._tier, event], count)
        yield family


class _MetricsHandler(small_http.RequestHandler):
    app: Callable[..., list[bytes]]

    def respond(self) -> None:
        """Answer as prometheus-client's own server does."""
        path, _, query = self.path.partition("?")
        environment = {
            "REQUEST_METHOD": self.command, "PATH_INFO": path, "QUERY_STRING": query,
            "HTTP_ACCEPT": self.headers.get("Accept"), "HTTP_ACCEPT_ENCODING": self.headers.get("Accept-Encoding"),
        }  # fmt: skip
        start: list[tuple[str, list[tuple[str, str]]]] = []
        body = self.app(environment, lambda *line: start.append(line))
        self.answer(int(start[0][0].split()[0]), b"".join(body), dict(start[0][1]))


def serve_metrics(registry: CollectorRegistry, port: int) -> None:
    """Serve `/metrics` on a port of every address, from threads of its own. Raises: `OSError` naming the port."""
    handler = type("Handler", (_MetricsHandler,), {"app": staticmethod(make_wsgi_app(registry))})
    try:
        server = small_http.Server(("0.0.0.0", port), handler)  # Prometheus runs elsewhere
    except OSError as error:
        reason = "another process uses it" if error.errno == errno.EADDRINUSE else error.strerror
        raise OSError(f"cannot serve metrics on port {port}: {reason}; choose another --metrics-port") from None
    threading.Thread(target=server.serve_forever, daemon=True).start()
