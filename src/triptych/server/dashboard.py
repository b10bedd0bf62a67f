"""The dashboard: one static page and the figures it draws.

The page asks again and again instead of holding a stream open: a browser's EventSource cannot send an API key, an
answer can be shared by all who look, and a page that nobody sees stops asking. Only then does the engine gather facts.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from triptych.server import panels as by
from triptych.server.http import json_response
from triptych.server.state import ServerState
from triptych.words import EngineStats, Facts

logger = logging.getLogger(__name__)

PAGE, DATA = "/dashboard", "/dashboard/data"
_FILES = {
    PAGE: ("dashboard.html", "text/html"),
    "/dashboard/style.css": ("dashboard.css", "text/css"),
    "/dashboard/page.js": ("dashboard.js", "text/javascript"),
    "/dashboard/icon.svg": ("dashboard.svg", "image/svg+xml"),
}
STATIC = frozenset(_FILES)
"""Paths that are the same for everyone and hold nothing of this server. A browser opens them without a key."""

EVERY = 2.0  # seconds between two samples
KEPT = 450  # samples: a quarter of an hour
_FRESH = 0.5  # seconds for which facts are shared by all who look
_PATIENCE = 2.0  # a long step may hold facts up: then the last ones are told, with their age

_HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_TOTALS = (
    *("preemptions", "rerun_tokens", "pages_evicted", "snapshots_evicted", "snapshots_refused", "pins_refused"),
    *("requests_held", "held_tokens_saved"),
    *("saves_failed", "fetches_failed", "canary_checked", "canary_failed"),
)


class History:
    """What happened in each interval of the last while: differences of the engine's counters, and gauges."""

    def __init__(self, panels_of: ServerState) -> None:
        self._state = panels_of
        self._rows: deque[dict[str, float]] = deque(maxlen=KEPT)
        self._count = 0
        self._before: tuple[float, EngineStats] | None = None

    def sample(self, now: float) -> None:
        """Note what changed since the last sample, at monotonic time `now`."""
        stats = self._state.engine.stats()
        if self._before is not None:
            self._count += 1
            self._rows.append({"number": self._count, "time": round(time.time(), 1)} | self._row(now, stats))
        self._before = (now, stats)

    def _row(self, now: float, stats: EngineStats) -> dict[str, float]:
        assert self._before is not None
        then, old = self._before
        device = by.memory(stats, self._state.engine.panels).get("device", {})
        gained = {name: count - by.sources(old).get(name, 0) for name, count in by.sources(stats).items()}
        return {
            "seconds": round(now - then, 3),
            "prefill": stats.prefill_rows - old.prefill_rows,
            "decode": stats.generated_tokens - old.generated_tokens,
            "running": stats.running,
            "waiting": stats.waiting,
            "used": sum(device.values()) - device.get("free", 0),
            **{f"from_{name}": count for name, count in gained.items()},
            **{f"plan_{plan}": count - by.plans(old)[plan] for plan, count in by.plans(stats).items()},
        }

    def since(self, number: int) -> list[dict[str, float]]:
        """The samples after the one with this number, oldest first."""
        return [row for row in self._rows if row["number"] > number]


class Dashboard:
    """The routes of the dashboard and what they answer."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._history = History(state)
        self._facts = Facts()
        self._gathered = float("-inf")
        folder = Path(__file__).parent / "static"
        self._files = {path: (folder / name).read_bytes() for path, (name, _) in _FILES.items()}

    def routes(self) -> list[Route]:
        """Where the page and its figures are."""
        pages = [Route(path, self._file, methods=["GET"]) for path in _FILES]
        return [*pages, Route(DATA, self._data, methods=["GET"])]

    @asynccontextmanager
    async def recording(self) -> AsyncIterator[None]:
        """Samples are taken inside this context, so that who opens the page sees the last while at once."""
        task = asyncio.create_task(self._record())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _record(self) -> None:
        while True:
            try:
                self._history.sample(time.monotonic())
            except Exception:  # a figure that cannot be read must not end the recording of all others
                logger.exception("a sample for the dashboard could not be taken")
            await asyncio.sleep(EVERY)

    async def _file(self, request: Request) -> Response:
        path = request.scope["path"]
        return Response(self._files[path], media_type=_FILES[path][1], headers=_HEADERS)

    async def _data(self, request: Request) -> Response:
        await self._look()
        asked = request.query_params.get("since", "0")
        number = int(asked) if asked.isascii() and asked.isdigit() and len(asked) < 16 else 0
        return json_response(self._document(number), headers={**_HEADERS, "cache-control": "no-store"})

    async def _look(self) -> None:
        """Facts no older than `_FRESH`, if the engine can tell them soon."""
        if time.monotonic() - self._gathered < _FRESH:
            return
        with suppress(TimeoutError):
            self._facts = await asyncio.wait_for(self._state.engine.facts(), _PATIENCE)
            self._gathered = time.monotonic()

    def _document(self, number: int) -> dict[str, object]:
        state, engine = self._state, self._state.engine
        stats, panels = engine.stats(), engine.panels
        return {
            "model": state.names[0],
            "born": state.born,
            "now": round(time.time(), 1),
            "draining": state.draining,
            "state": stats.state,
            "weights": stats.weights,
            "max_context": engine.max_context,
            "limits": {"running": engine.config.max_running, "waiting": engine.config.max_waiting},
            "running": stats.running,
            "waiting": stats.waiting,
            "generated": stats.generated_tokens,
            "prefilled": stats.prefill_rows,
            "memory": by.memory(stats, panels),
            "room": by.room(stats, panels),
            "evictable": int(stats.cache.get("frames_evictable", 0)) * sum(panels.page.values()),
            "sources": by.sources(stats),
            "plans": by.plans(stats),
            "moved": by.moved(stats, panels),
            "first_token": state.metrics.first_token.lately(EVERY * KEPT),
            "totals": {name: stats.cache[name] for name in _TOTALS if name in stats.cache},
            "facts": self._facts,
            "facts_age": round(min(time.monotonic() - self._gathered, 1e6), 1),
            "every": EVERY,
            "kept": KEPT,
            "history": self._history.since(number),
        }
