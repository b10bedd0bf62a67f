"""What the cache tells about itself, as one value."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """Running totals of one manager; only the manager changes them."""

    admissions: int = 0
    cold_starts: int = 0
    snapshot_resumes: int = 0
    replay_resumes: int = 0
    admitted_tokens: int = 0
    cached_tokens: int = 0
    recomputed_tokens: int = 0
    pages_sealed: int = 0
    pages_adopted: int = 0
    pages_evicted: int = 0
    snapshots_written: int = 0
    snapshots_refused: int = 0


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Gauges (objects now, bytes now) and counters (since start).

    pages_free + pages_held + pages_cached = pages; evictable pages are a part of the cached ones.
    `snapshots_refused`: wanted by the policy while every snapshot was in use.
    `admitted_tokens` counts a preempted request again each time it comes back.
    """

    pages: int
    pages_free: int
    pages_held: int
    pages_cached: int
    pages_evictable: int
    snapshots: int
    snapshots_free: int
    snapshots_cached: int
    slots: int
    slots_free: int
    page_bytes_used: int
    snapshot_bytes_used: int
    admissions: int
    cold_starts: int
    snapshot_resumes: int
    replay_resumes: int
    admitted_tokens: int
    cached_tokens: int
    recomputed_tokens: int
    pages_sealed: int
    pages_adopted: int
    pages_evicted: int
    snapshots_written: int
    snapshots_evicted: int
    snapshots_refused: int
