"""What happened to one HTTP request: kept while it runs, then one log line and the latency histograms."""

from __future__ import annotations

import logging
import time
import urllib.parse
from dataclasses import dataclass, field

from triptych.server.metrics import Metrics
from triptych.words import Delta, Usage

access = logging.getLogger("triptych.access")

CLIENT_LEFT = 499  # nobody sees this status; logs and metrics do


@dataclass(slots=True)
class Record:
    """Mutable notes on one request. Holds counts and times, never text."""

    request_id: str
    method: str
    path: str
    metrics: Metrics
    begin: float = field(default_factory=time.perf_counter)
    status: int = 0
    usage: Usage = field(default_factory=Usage)
    first: float | None = None
    _last: dict[int, float] = field(default_factory=dict)

    def saw_delta(self, choice: int, delta: Delta) -> None:
        """Note when tokens came and what the request cost so far."""
        if delta.token_ids:
            now = time.perf_counter()
            before = self._last.get(choice)
            if self.first is None:
                self.first = now
                self.metrics.first_token.observe(now - self.begin)
            if before is not None:
                self.metrics.between_tokens.observe(now - before)
            self._last[choice] = now

    def finish(self) -> None:
        """Write the log line and observe the whole."""
        seconds = time.perf_counter() - self.begin
        generates = self.method == "POST"
        if self.usage.prompt_tokens:  # it got as far as the engine
            self.metrics.whole.observe(seconds)
        self.metrics.requests.labels(self._endpoint(), str(self.status)).inc()
        access.log(
            logging.INFO if generates else logging.DEBUG,
            "id=%s %s %s status=%d prompt=%d cached=%d recomputed=%d completion=%d ttft=%s duration=%.3f",
            self.request_id,
            self.method,
            urllib.parse.quote(self.path[:200], safe="/"),
            self.status,
            self.usage.prompt_tokens,
            self.usage.cached_tokens,
            self.usage.recomputed_tokens,
            self.usage.completion_tokens,
            "-" if self.first is None else f"{self.first - self.begin:.3f}",
            seconds,
        )

    def _endpoint(self) -> str:
        """The path if it is one of ours; a scanner's guesses must not grow the metrics."""
        return self.path if self.path in ENDPOINTS else "other"


ENDPOINTS = frozenset(
    {
        *("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/health/live", "/metrics"),
        *("/dashboard", "/dashboard/data"),
    }
)
