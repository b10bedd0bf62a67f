"""The engine's own cache manager driven by a trace, without a model: what would be found in the cache, and what not.

Requests are admitted in the order of arrival; up to `in_flight` are held at once, and the oldest ends when one more is
wanted or when memory does not suffice. What a session asked before has ended when it asks again. A prompt is run in
chunks, its output appended in one go. The manager's clock is the trace's. There is no timing model: what overlaps in
reality is only as true as `in_flight`, and copies between tiers take no time.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from triptych.cache.geometry import CacheGeometry, plan_capacity
from triptych.cache.jobs import Done, Jobs
from triptych.cache.manager import CacheManager
from triptych.cache.policies import Below, policies_named
from triptych.cache.resume import ResumePlan
from triptych.cache.retention import NextUse
from triptych.cache.store.protocol import Buffer, ObjectKey, StoreStats
from triptych.config import PAGE
from triptych.words import CacheHints, TokenIds
from triptych.workload.oracle import Future
from triptych.workload.traces import Trace, TraceRequest

POLICIES = ("none", "full", "periodic:4096", "adaptive", "bounded", "lru", "belady")
"""What `--policy all` compares."""


@dataclass(frozen=True, slots=True)
class ReplaySettings:
    """One replay. Sizes in bytes; `memory` holds window slots for `in_flight` requests, pages and snapshots."""

    geometry: CacheGeometry
    memory: int
    policy: str = "adaptive"
    host_memory: int = 0
    disk: int = 0
    in_flight: int = 16
    chunk: int = 8192


@dataclass(slots=True)
class ReplayResult:
    """What came out. cached + recomputed + computed = prompt tokens.

    hit_rate: tokens that were not run at all over prompt tokens. page_hit_rate also counts those whose pages were
    found but that ran again, in some layers at least, to rebuild windows. unservable: requests longer than the memory,
    whose prompts count as computed. computed_share: the work that was left,
    (computed + recomputed token equivalents) / prompt tokens. ideal_hit_rate: an infinite cache, whole pages.
    """

    policy: str
    requests: int = 0
    unservable: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    recomputed_tokens: int = 0
    recomputed_token_equivalents: float = 0.0
    computed_tokens: int = 0
    hit_rate: float = 0.0
    page_hit_rate: float = 0.0
    ideal_hit_rate: float = 0.0
    computed_share: float = 0.0
    cached_by_tier: dict[str, int] = field(default_factory=dict)
    resumes: dict[str, int] = field(default_factory=dict)
    evictions: int = 0
    pages_evicted: int = 0
    snapshots_evicted: int = 0
    bytes_by_kind: dict[str, int] = field(default_factory=dict)
    peak_bytes: int = 0
    bytes_moved_by_tier: dict[str, dict[str, int]] = field(default_factory=dict)
    write_amplification: float | None = None
    useful_bytes_share: float = 0.0
    manager_seconds: float = 0.0
    match_us_p50: float = 0.0
    match_us_p99: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """One flat object for JSON."""
        return asdict(self)


class SimulatedDisk:
    """Objects by size only, the least recently used given up: a `Store` whose copies take no time."""

    name = "disk"

    def __init__(self, limit: int, size: Callable[[ObjectKey], int]) -> None:
        self._limit, self._size = limit, size
        self._objects: OrderedDict[ObjectKey, int] = OrderedDict()
        self._used = self._written = 0

    def put(self, key: ObjectKey, payload: object) -> bool:
        """Take note of `key`. False if it is larger than the whole disk."""
        size = self._size(key)
        if key not in self._objects and size <= self._limit:
            while self._used + size > self._limit:
                self._used -= self._objects.popitem(last=False)[1]
            self._objects[key] = size
            self._used += size
            self._written += size
        return self.get(key, payload)

    def get(self, key: ObjectKey, into: object) -> bool:
        """Whether it is there."""
        self.touch(key)
        return key in self._objects

    def __contains__(self, key: ObjectKey) -> bool:
        return key in self._objects

    def touch(self, key: ObjectKey) -> None:
        """It was used."""
        if key in self._objects:
            self._objects.move_to_end(key)

    def discard(self, key: ObjectKey) -> None:
        """Forget it."""
        self._used -= self._objects.pop(key, 0)

    def stats(self) -> StoreStats:
        """Bytes and objects now."""
        return StoreStats(self._used, len(self._objects), self._written)

    def close(self) -> None:
        """Nothing to close."""


_NO_BYTES: tuple[Buffer, ...] = ()


class Replay:
    """One run of one trace through one manager."""

    def __init__(self, settings: ReplaySettings, future: NextUse | None = None) -> None:
        geometry = settings.geometry
        capacity = plan_capacity(geometry, settings.memory, settings.in_flight)
        sizes = {"page": geometry.page_bytes, "snapshot": geometry.snapshot_bytes}
        self._disk = SimulatedDisk(settings.disk, lambda key: sizes[key.kind]) if settings.disk else None
        below = Below(settings.host_memory // geometry.page_bytes, (self._disk,) if self._disk else ())
        self._now = 0.0
        self.manager = CacheManager(
            geometry,
            capacity,
            geometry.layers,
            policies=policies_named(settings.policy, future),
            below=below,
            clock=lambda: self._now,
        )
        self._settings = settings
        self._running: deque[str] = deque()
        self._lookups: list[float] = []
        self._seen: set[bytes] = set()
        self._ideal = 0
        self.result = ReplayResult(settings.policy)

    def run(self, trace: Trace, on_request: Callable[[], None] = lambda: None) -> ReplayResult:
        """Go through `trace`; `on_request` is called after each request."""
        for index, (now, request) in enumerate(timed(trace)):
            self._now = now
            self._serve(str(index), request)
            on_request()
        while self._running:
            self._end(self._running.popleft())
        return self._finish()

    def _serve(self, name: str, request: TraceRequest) -> None:
        result, manager = self.result, self.manager
        prompt, total = request.prompt, len(request.prompt) + len(request.output)
        result.requests += 1
        result.prompt_tokens += len(prompt)
        if total > manager.capacity.tokens:
            result.unservable += 1
            result.computed_tokens += len(prompt)
            return
        began = time.thread_time()
        self._end_turns_before(request)
        while len(self._running) >= self._settings.in_flight:
            self._end(self._running.popleft())
        plan = self._admit(name, request, total)
        self._count(name, plan)
        self._prefill(name, prompt, plan)
        if len(request.output):
            self._grow(name, total)
            manager.advance(name, np.concatenate([prompt, request.output]), total)
        self._seen.update(manager.holdings[name].keys)
        self._running.append(name)
        result.manager_seconds += time.thread_time() - began

    def _admit(self, name: str, request: TraceRequest, total: int) -> ResumePlan:
        hints = CacheHints(marks=request.marks, session=request.session)
        while True:
            while not self.manager.ready(name, request.prompt, request.tenant):
                self._move()
            began = time.thread_time()
            plan = self.manager.admit(name, request.prompt, request.tenant, total, hints)
            if plan is not None:
                self._lookups.append(time.thread_time() - began)
                return plan
            self._end(self._running.popleft())

    def _prefill(self, name: str, prompt: TokenIds, plan: ResumePlan) -> None:
        start = plan.start
        while start < len(prompt):
            end = min(len(prompt), start + self._settings.chunk)
            self._grow(name, end)
            self.manager.snapshot_writes(name, start, end)
            self.manager.advance(name, prompt, end)
            start = end

    def _grow(self, name: str, upto: int) -> None:
        while not self.manager.grow(name, upto):
            self._end(self._running.popleft())

    def _end_turns_before(self, request: TraceRequest) -> None:
        """A prompt repeats the output of the turn before, so that one has ended whatever is in flight."""
        holdings = self.manager.holdings
        for name in tuple(self._running) if request.session else ():
            before = holdings[name]
            if (before.hints.session, before.branch.tenant.salt) == (request.session, request.tenant):
                self._running.remove(name)
                self._end(name)

    def _end(self, name: str) -> None:
        write = self.manager.boundary_snapshot(name)
        if write is not None:
            self.manager.publish_snapshot(name, write)
        self.manager.release(name)
        self._move()

    def _move(self) -> None:
        """Carry out all copies that are due; they take no time."""
        tiers = self.manager.tiers
        while tiers.enabled:
            for done in self._carry_out(self.manager.due()):
                self.manager.end(done)
            # one look starts so many saves, and no snapshot that was written just now
            if not tiers.busy:
                return

    def _carry_out(self, jobs: Jobs) -> Iterator[Done]:
        for fetch in jobs.fetches:
            yield Done(fetch.job, tuple(bool(part.host_frames) or self._get(part.key) for part in fetch.parts))
        for save in jobs.saves:
            yield Done(save.job, (self._disk is not None and self._disk.put(save.key, _NO_BYTES),))

    def _get(self, key: ObjectKey) -> bool:
        return self._disk is not None and self._disk.get(key, _NO_BYTES)

    def _count(self, name: str, plan: ResumePlan) -> None:
        result = self.result
        result.cached_tokens += plan.cached_tokens
        result.recomputed_tokens += plan.recomputed_tokens
        result.recomputed_token_equivalents += plan.equivalents
        result.computed_tokens += plan.computed_tokens
        result.resumes[plan.kind] = result.resumes.get(plan.kind, 0) + 1
        for tier, tokens in plan.by_tier.items():
            result.cached_by_tier[tier] = result.cached_by_tier.get(tier, 0) + tokens
        keys = self.manager.holdings[name].keys
        known = next((index for index, key in enumerate(keys) if key not in self._seen), len(keys))
        self._ideal += min(known * PAGE, plan.length - 1)

    def _finish(self) -> ReplayResult:
        result, manager = self.result, self.manager
        stats, moved = manager.stats(), manager.tiers.moved
        prompt = max(1, result.prompt_tokens)
        result.hit_rate = result.cached_tokens / prompt
        result.page_hit_rate = (result.cached_tokens + result.recomputed_tokens) / prompt
        result.ideal_hit_rate = self._ideal / prompt
        result.computed_share = (result.computed_tokens + result.recomputed_token_equivalents) / prompt
        result.pages_evicted, result.snapshots_evicted = stats.pages_evicted, stats.snapshots_evicted
        result.evictions = stats.pages_evicted + stats.snapshots_evicted
        result.bytes_by_kind = {
            "pages": stats.page_bytes_used,
            "snapshots": stats.snapshot_bytes_used,
            "slots": manager.capacity.slots * manager.geometry.slot_bytes,
        }
        result.peak_bytes, result.useful_bytes_share = stats.peak_bytes, stats.useful_bytes_share
        tiers = sorted({*moved.bytes_in, *moved.bytes_out})
        result.bytes_moved_by_tier = {
            tier: {"in": moved.bytes_in[tier], "out": moved.bytes_out[tier]} for tier in tiers
        }
        result.write_amplification = self._amplification(stats.pages_sealed)
        lookups = sorted(self._lookups) or [0.0]  # JSON knows no NaN
        result.match_us_p50 = 1e6 * lookups[len(lookups) // 2]
        result.match_us_p99 = 1e6 * lookups[min(len(lookups) - 1, len(lookups) * 99 // 100)]
        return result

    def _amplification(self, pages: int) -> float | None:
        """Bytes written to disk over bytes of pages that were made; None without a disk."""
        written: Counter[str] = self.manager.tiers.moved.bytes_in
        if self._disk is None or not pages:
            return None
        return written["disk"] / (pages * self.manager.geometry.page_bytes)


def timed(trace: Trace) -> Iterator[tuple[float, TraceRequest]]:
    """The requests with strictly rising times, so that an order of use exists among those of one moment."""
    now = 0.0
    for request in trace:
        now = max(now + 1e-6, request.time)
        yield now, request


def replay(trace: Trace, settings: ReplaySettings, on_request: Callable[[], None] = lambda: None) -> ReplayResult:
    """Run `trace` through a new manager. Raises ConfigError for an unknown policy or too little memory."""
    future = None
    if settings.policy == "belady":
        root = Replay(ReplaySettings(settings.geometry, settings.memory, in_flight=settings.in_flight)).manager.root
        future = Future(timed(trace), root)
    return Replay(settings, future).run(trace, on_request)
