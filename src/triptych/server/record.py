"""What happened to one HTTP request: kept while it runs, then one log line and the latency histograms."""

from __future__ import annotations

import logging
import time
import urllib.parse
from dataclasses import dataclass, field

from triptych.server.keys import Caller, anonymous
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
    caller: Caller = field(default_factory=anonymous)
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

    def bill(self, usage: Usage) -> None:
        """Note what the request cost so far, and charge it to the caller's key."""
        before, self.usage = self.usage, usage
        self.caller.limits.spend(usage.total_tokens - before.total_tokens)

    def finish(self) -> None:
        """Write the log line and observe the whole."""
        seconds = time.perf_counter() - self.begin
        if self.usage.prompt_tokens:  # it got as far as the engine
            self.metrics.whole.observe(seconds)
        self.metrics.requests.labels(self._endpoint(), str(self.status)).inc()
        level = logging.INFO if self.method == "POST" else logging.DEBUG
        if not access.isEnabledFor(level):
            return
        path = urllib.parse.quote(self.path[:200], safe="/")
        usage, ttft = self.usage, None if self.first is None else round(self.first - self.begin, 3)
        line = (
            f"id={self.request_id} {self.method} {path} status={self.status} prompt={usage.prompt_tokens} "
            f"cached={usage.cached_tokens} recomputed={usage.recomputed_tokens} completion={usage.completion_tokens} "
            f"ttft={'-' if ttft is None else format(ttft, '.3f')} duration={seconds:.3f}"
        )
        fields = {
            **{"request_id": self.request_id, "method": self.method, "path": path, "status": self.status},
            **{"prompt_tokens": usage.prompt_tokens, "cached_tokens": usage.cached_tokens},
            **{"recomputed_tokens": usage.recomputed_tokens, "completion_tokens": usage.completion_tokens},
            **{"ttft": ttft, "duration": round(seconds, 3)},
        }
        if self.caller.name:
            line += f" key={self.caller.name}"
            fields["key"] = self.caller.name
        access.log(level, "%s", line, extra={"fields": fields})

    def _endpoint(self) -> str:
        """The path if it is one of ours; a scanner's guesses must not grow the metrics."""
        if self.path.startswith("/v1/responses/"):
            return "/v1/responses/*"
        return self.path if self.path in ENDPOINTS else "other"


ENDPOINTS = frozenset(
    {
        *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"),
        *("/v1/models", "/v1/embeddings", "/tokenize", "/detokenize", "/openapi.json"),
        *("/health", "/health/live", "/metrics", "/dashboard", "/dashboard/data"),
        *("/admin/state", "/admin/pause", "/admin/resume", "/admin/update_weights"),
    }
)
