"""The server's metrics, in Prometheus's text format."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from treadle.serving.models import ServedWriter

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_SHORT = (0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 3, 10)


class Metrics:
    """Metrics of one server, in a separate registry."""

    def __init__(self, writers: Sequence[ServedWriter]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter("treadle_requests", "Requests", ["route", "status"], registry=self._registry)
        self._seconds = self._histogram(
            "request_seconds", "Seconds until the response, or a stream's first part", "route"
        )
        self._whole = self._histogram("whole_request_seconds", "Seconds until the end of the response", "route")
        self._first = self._histogram("first_token_seconds", "Seconds until the first token", "model")
        self._queue = self._histogram("queue_seconds", "Seconds in which a text waited for a row", "model")
        self._between = self._histogram("inter_token_seconds", "Seconds between two tokens of a text", "model", _SHORT)
        self._registry.register(_Loads(writers))
        ProcessCollector(registry=self._registry)

    def _histogram(self, name: str, what: str, label: str, buckets: Sequence[float] = _SECONDS) -> Histogram:
        return Histogram(f"treadle_{name}", what, [label], buckets=buckets, registry=self._registry)

    def count(self, route: str, status: int, seconds: float) -> None:
        """Record a response: its route, its status, and the seconds until it, or until the first part of a stream."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def first(self, model: str, seconds: float) -> None:
        """Record the time of a request's first token."""
        self._first.labels(model).observe(seconds)

    def whole(self, route: str, seconds: float) -> None:
        """Record the time of a whole request, to the end of its response."""
        self._whole.labels(route).observe(seconds)

    def queued(self, model: str, seconds: float) -> None:
        """Record the time in which a text waited for a row."""
        self._queue.labels(model).observe(seconds)

    def between(self, model: str, seconds: float) -> None:
        """Record the time between two tokens of a text."""
        self._between.labels(model).observe(seconds)

    def text(self) -> bytes:
        """Return all metrics as text in UTF-8."""
        found: bytes = generate_latest(self._registry)
        return found


class _Loads(Collector):
    """A collector of the schedulers' loads, which are read when metrics are scraped."""

    def __init__(self, writers: Sequence[ServedWriter]) -> None:
        self._writers = writers

    def collect(self) -> Iterable[Metric]:
        rows = GaugeMetricFamily("treadle_rows", "Texts in generation", labels=["model"])
        waiting = GaugeMetricFamily("treadle_waiting", "Requests that wait for a row", labels=["model"])
        tokens = CounterMetricFamily("treadle_tokens", "Tokens processed and generated", labels=["model", "kind"])
        steps = CounterMetricFamily("treadle_steps", "Decoding steps; each advances all rows", labels=["model"])
        cache = GaugeMetricFamily("treadle_cache_tokens", "Filled positions of the rows in use", labels=["model"])
        size = GaugeMetricFamily("treadle_cache_capacity_tokens", "Positions of all rows", labels=["model"])
        cached = GaugeMetricFamily("treadle_prefix_cache_bytes", "Prefixes in host memory", labels=["model"])
        for each in self._writers:
            load = each.scheduler.load()
            rows.add_metric([each.name], load.running)
            waiting.add_metric([each.name], load.waiting)
            tokens.add_metric([each.name, "prompt"], load.prefilled)
            tokens.add_metric([each.name, "reused"], load.reused)
            tokens.add_metric([each.name, "generated"], load.generated)
            steps.add_metric([each.name], load.steps)
            cache.add_metric([each.name], load.filled)
            size.add_metric([each.name], each.scheduler.positions)
            cached.add_metric([each.name], load.cached)
        return [rows, waiting, tokens, steps, cache, size, cached]
