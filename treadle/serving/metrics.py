"""The server's metrics, in Prometheus's text format."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from treadle.serving.models import ServedWriter

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Metrics of one server, in a separate registry."""

    def __init__(self, writers: Sequence[ServedWriter]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter("treadle_requests", "Requests", ["route", "status"], registry=self._registry)
        self._seconds = Histogram(
            "treadle_request_seconds",
            "Seconds until the response, or the first part of a stream",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._first = Histogram(
            "treadle_first_token_seconds",
            "Seconds until the first token",
            ["model"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._registry.register(_Loads(writers))

    def count(self, route: str, status: int, seconds: float) -> None:
        """Record a response: its route, its status, and the seconds until it, or until the first part of a stream."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def first(self, model: str, seconds: float) -> None:
        """Record the time of a request's first token."""
        self._first.labels(model).observe(seconds)

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
        for each in self._writers:
            load = each.scheduler.load()
            rows.add_metric([each.name], load.running)
            waiting.add_metric([each.name], load.waiting)
            tokens.add_metric([each.name, "prompt"], load.prefilled)
            tokens.add_metric([each.name, "reused"], load.reused)
            tokens.add_metric([each.name, "generated"], load.generated)
            steps.add_metric([each.name], load.steps)
        return [rows, waiting, tokens, steps]
