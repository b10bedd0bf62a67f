"""Prometheus metrics of one server, in a registry of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from triptych.words import EngineStats

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)
_BETWEEN = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)

_GAUGES = {"running": "Requests that run now.", "waiting": "Requests that wait for a slot or memory."}
_COUNTERS = {
    "steps": "Steps that the engine ran.",
    "prompt_tokens": "Prompt tokens of all requests.",
    "cached_tokens": "Prompt tokens found in the cache.",
    "recomputed_tokens": "Prompt tokens that were cached but ran again to rebuild window state.",
    "generated_tokens": "Tokens generated.",
}


class Metrics:
    """Histograms and counters that the server feeds, beside the engine's own figures."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(stats))
        self.requests = Counter(
            "triptych_requests",
            "HTTP requests by endpoint and status.",
            ("endpoint", "status"),
            registry=self._registry,
        )
        self.in_flight = Gauge(
            "triptych_requests_in_flight", "Generation requests being answered.", registry=self._registry
        )
        self.first_token = Histogram(
            "triptych_time_to_first_token_seconds",
            "From the request's arrival to its first token.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.between_tokens = Histogram(
            "triptych_inter_token_seconds",
            "Between two deltas of one choice.",
            buckets=_BETWEEN,
            registry=self._registry,
        )
        self.whole = Histogram(
            "triptych_request_seconds", "From arrival to the last byte.", buckets=_SECONDS, registry=self._registry
        )

    def text(self) -> bytes:
        """The exposition in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Reads the engine's figures when scraped."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"triptych_{name}_requests", text, value=getattr(stats, name))
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"triptych_{name}", text, value=getattr(stats, name))
        for name, value in sorted(stats.cache.items()):
            metric = "triptych_cache_" + re.sub(r"\W", "_", name, flags=re.ASCII)
            yield GaugeMetricFamily(metric, "A figure of the cache manager.", value=value)
