"""What every process counts alike: what it is, how late its event loop is, what its caches do; and a port to read it at."""

import asyncio
import errno
import importlib.metadata
import time
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

STAGE_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Seconds, from a cut of one small image to a fetch that is given up."""

_LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_LAG_EVERY = 0.25

CACHE_EVENTS = "dvd_cache_events"
"""Counted where they happen: of the sink by the gateway that asks it (evictions by itself), of the others by vision workers."""
CACHE_TEXT = "What the caches of embeddings did"
CACHE_LABELS = ("tier", "event")


class ProcessMetrics:
    """The metrics that each process has."""

    def __init__(self, registry: CollectorRegistry, process: str) -> None:
        # gauges that are always 1, not Info: that cannot be had where several processes count together
        build = Gauge(
            "dvd_build_info", "1; which program this is", ["process", "version"], registry=registry, multiprocess_mode="livemax"
        )
        build.labels(process, importlib.metadata.version("dvd-serve")).set(1)
        self._model = Gauge(
            "dvd_model_info", "1 for the checkpoint that is served", ["fingerprint", "family", "dtype"], registry=registry,
            multiprocess_mode="livemax",
        )  # fmt: skip
        self._serving: tuple[str, str, str] | None = None
        self.lag = Histogram(
            "dvd_event_loop_lag_seconds", "Seconds that the event loop came too late to a timer", registry=registry,
            buckets=_LAG_BUCKETS,
        )  # fmt: skip

    def set_model(self, fingerprint: str, family: str, dtype: str) -> None:
        """Say which checkpoint; `dtype` is that of its computation here."""
        now = (fingerprint[:12], family, dtype)
        if now == self._serving:
            return
        if self._serving is not None:
            self._model.labels(*self._serving).set(0)
        self._model.labels(*now).set(1)
        self._serving = now

    async def measure_loop_lag(self) -> None:
        """Measure how late this event loop is, for ever."""
        while True:
            due = time.monotonic() + _LAG_EVERY
            await asyncio.sleep(_LAG_EVERY)
            self.lag.observe(max(0.0, time.monotonic() - due))


def cache_counter(registry: CollectorRegistry) -> Counter:
    """For who counts a cache's events as they happen."""
    return Counter(CACHE_EVENTS, CACHE_TEXT, CACHE_LABELS, registry=registry)


class CacheEventsCollector(Collector):
    """The events of a cache that counts by itself: `counts()` has a number for each. Only for a process that counts alone."""

    def __init__(self, tier: str, counts: Callable[[], Mapping[str, int]]) -> None:
        self._tier, self._counts = tier, counts

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(CACHE_EVENTS, CACHE_TEXT, labels=CACHE_LABELS)
        for event, count in self._counts().items():
            family.add_metric([self._tier, event], count)
        yield family


def serve_metrics(registry: CollectorRegistry, port: int) -> None:
    """At `/metrics` of a port of every address, from a thread of its own. Raises `OSError` naming the port."""
    try:
        start_http_server(port, registry=registry)
    except OSError as error:
        why = "another process does" if error.errno == errno.EADDRINUSE else error.strerror
        raise OSError(f"cannot serve metrics on port {port}: {why}; choose another --metrics-port") from None
