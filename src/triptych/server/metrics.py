"""Prometheus metrics of one server, in a registry of its own."""

from __future__ import annotations

import re
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from triptych.server import panels as by
from triptych.server.protocol import ServingEngine
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
    "prefill_rows": "Rows of prompts that ran, those that ran again among them.",
}
# figures of the cache manager that only grow
_CACHE_COUNTERS = {
    "preemptions": "Requests that had to give their memory back and start again.",
    "pages_evicted": "Pages given up by the device.",
    "snapshots_evicted": "Snapshots given up by the device.",
    "snapshots_refused": "Snapshots that the policy wanted while no memory could be had.",
    "pins_refused": "Pins refused because pins held enough already.",
    "requests_held": "Requests that waited for what another one was computing of their prompt.",
    "held_tokens_saved": "Prompt tokens that these did not have to run therefore.",
    "fetches_failed": "Fetches from a lower tier of which a part did not arrive whole.",
    "saves_failed": "Objects that a store did not take.",
    "canary_checked": "Resumed requests that were computed again and compared.",
    "canary_failed": "Of those, the ones that differed: what they resumed from is not served any more.",
}


STATES = ("running", "paused", "updating")


class Recent:
    """A histogram that also remembers its last values, for people who want a median now and not a bucket."""

    def __init__(self, histogram: Histogram) -> None:
        self._histogram = histogram
        self._values: deque[tuple[float, float]] = deque(maxlen=512)

    def observe(self, seconds: float) -> None:
        """One more."""
        self._histogram.observe(seconds)
        self._values.append((time.monotonic(), seconds))

    def lately(self, seconds: float) -> dict[str, float]:
        """How many came in the last `seconds` (512 are remembered), their median and 95th percentile if any."""
        since = time.monotonic() - seconds
        values = sorted(value for then, value in self._values if then >= since)
        if not values:
            return {"count": 0}
        last = len(values) - 1
        return {"count": len(values), "p50": values[round(0.5 * last)], "p95": values[round(0.95 * last)]}


class Tally(Collector):
    """A histogram that one thread feeds at every token: the library's locks and label lookups are left out."""

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self._name, self._text, self._bounds = name, text, tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """One more."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[Metric]:
        """The cumulative buckets, as Prometheus wants them."""
        names = [*map(str, map(float, self._bounds)), "+Inf"]
        buckets = list(zip(names, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=self._sum)


class Metrics:
    """Histograms and counters that the server feeds, beside the engine's own figures."""

    def __init__(self, engine: ServingEngine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        self.requests = Counter(
            "triptych_requests",
            "HTTP requests by endpoint and status.",
            ("endpoint", "status"),
            registry=self._registry,
        )
        self.in_flight = Gauge(
            "triptych_requests_in_flight", "Generation requests being answered.", registry=self._registry
        )
        self.first_token = Recent(
            Histogram(
                "triptych_time_to_first_token_seconds",
                "From the request's arrival to its first token.",
                buckets=_SECONDS,
                registry=self._registry,
            )
        )
        self.between_tokens = Tally("triptych_inter_token_seconds", "Between two deltas of one choice.", _BETWEEN)
        self._registry.register(self.between_tokens)
        self.whole = Histogram(
            "triptych_request_seconds", "From arrival to the last byte.", buckets=_SECONDS, registry=self._registry
        )

    def text(self) -> bytes:
        """The exposition in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Reads the engine's figures when scraped."""

    def __init__(self, engine: ServingEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"triptych_{name}_requests", text, value=getattr(stats, name))
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"triptych_{name}", text, value=getattr(stats, name))
        state = GaugeMetricFamily("triptych_engine_state", "1 for the state that the engine is in.", labels=["state"])
        for name in STATES:
            state.add_metric([name], stats.state == name)
        yield state
        yield CounterMetricFamily(
            "triptych_weights_updates", "How often the weights were replaced.", value=stats.weights
        )
        yield from self._labelled(stats)
        for name, text in _CACHE_COUNTERS.items():
            yield CounterMetricFamily(f"triptych_{name}", text, value=stats.cache.get(name, 0))
        for name, value in sorted(stats.cache.items()):
            metric = "triptych_cache_" + re.sub(r"\W", "_", name, flags=re.ASCII)
            yield GaugeMetricFamily(metric, "A figure of the cache manager.", value=value)

    def _labelled(self, stats: EngineStats) -> Iterator[Metric]:
        panels, config = self._engine.panels, self._engine.config
        most = GaugeMetricFamily("triptych_limit_requests", "Requests that may run or wait at once.", labels=["state"])
        most.add_metric(["running"], config.max_running)
        most.add_metric(["waiting"], config.max_waiting)
        room = GaugeMetricFamily("triptych_tier_capacity_bytes", "Room of a tier; 0: unknown.", labels=["tier"])
        for tier, size in by.room(stats, panels).items():
            room.add_metric([tier], size)
        held = GaugeMetricFamily("triptych_tier_bytes", "Bytes of a tier by what they hold.", labels=["tier", "kind"])
        for tier, kinds in by.memory(stats, panels).items():
            for kind, size in kinds.items():
                held.add_metric([tier, kind], size)
        text = "Prompt tokens by the tier they were found in, recomputed (only their windows), or computed."
        tokens = CounterMetricFamily("triptych_prompt_source_tokens", text, labels=["source"])
        for source, count in by.sources(stats).items():
            tokens.add_metric([source], count)
        resumes = CounterMetricFamily("triptych_resumes", "Admitted requests by resume plan.", labels=["plan"])
        for plan, count in by.plans(stats).items():
            resumes.add_metric([plan], count)
        moved = CounterMetricFamily(
            "triptych_tier_moved_bytes", "Bytes copied into and out of a tier.", labels=["tier", "direction"]
        )
        for tier, ways in by.moved(stats, panels).items():
            for way, size in ways.items():
                moved.add_metric([tier, way], size)
        yield from (most, room, held, tokens, resumes, moved)
