"""What the cache tells about itself, as one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triptych.cache.manager import CacheManager
    from triptych.cache.resume import ResumePlan


@dataclass
class Counters:
    """Running totals of one manager; only the manager changes them."""

    admissions: int = 0
    cold_starts: int = 0
    snapshot_resumes: int = 0
    trapezoid_resumes: int = 0
    bounded_resumes: int = 0
    admitted_tokens: int = 0
    cached_tokens: int = 0
    recomputed_tokens: int = 0
    recomputed_equivalents: float = 0.0
    pages_sealed: int = 0
    pages_adopted: int = 0
    snapshots_written: int = 0
    snapshots_refused: int = 0
    requests_held: int = 0
    held_tokens_saved: int = 0

    def admitted(self, plan: ResumePlan) -> None:
        """A request was admitted with `plan`."""
        self.admissions += 1
        self.cold_starts += plan.kind == "cold"
        self.snapshot_resumes += plan.kind == "snapshot"
        self.trapezoid_resumes += plan.kind == "trapezoid"
        self.bounded_resumes += plan.kind == "bounded"
        self.admitted_tokens += plan.length
        self.cached_tokens += plan.cached_tokens
        self.recomputed_tokens += plan.recomputed_tokens
        self.recomputed_equivalents += plan.equivalents


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Gauges (objects now, bytes now) and counters (since start).

    frames_free + pages_held + pages_cached + frames of snapshots (published or being written) + frames_loading (being
    fetched) = frames; evictable
    frames are a part of the cached ones. `useful_bytes_share`: bytes of pages and snapshots over bytes of the frames
    they take. `snapshots_refused`: wanted by the policy while no frames could be had. `admitted_tokens` counts a
    preempted request again each time it comes back. `requests_held` waited for what another one was computing, and did
    not have to run `held_tokens_saved` tokens therefore.
    """

    frames: int
    frames_free: int
    frames_evictable: int
    pages_held: int
    pages_cached: int
    snapshots_cached: int
    frames_loading: int
    slots: int
    slots_free: int
    page_bytes_used: int
    snapshot_bytes_used: int
    useful_bytes_share: float
    peak_bytes: int
    pages_evicted: int
    snapshots_evicted: int
    pins_refused: int
    pins_broken: int
    admissions: int
    cold_starts: int
    snapshot_resumes: int
    trapezoid_resumes: int
    bounded_resumes: int
    admitted_tokens: int
    cached_tokens: int
    recomputed_tokens: int
    recomputed_equivalents: float
    pages_sealed: int
    pages_adopted: int
    snapshots_written: int
    snapshots_refused: int
    requests_held: int
    held_tokens_saved: int


def collect(manager: CacheManager) -> CacheStats:
    """The stats of `manager` now."""
    memory, geometry, capacity = manager.memory, manager.geometry, manager.capacity
    reserved = sum(len(holding.reserved) for holding in manager.holdings.values())
    used = capacity.frames - len(memory.free)
    snapshots = len(memory.snapshots) + reserved
    loading = sum(len(frames) for frames in manager.tiers.frames_loading())
    pages = used - loading - snapshots * memory.snapshot_frames
    page_bytes, snapshot_bytes = pages * geometry.page_bytes, snapshots * geometry.snapshot_bytes
    return CacheStats(
        frames=capacity.frames,
        frames_free=len(memory.free),
        frames_evictable=memory.evictable,
        pages_held=pages - len(memory.tree.nodes),
        pages_cached=len(memory.tree.nodes),
        snapshots_cached=len(memory.snapshots),
        frames_loading=loading,
        slots=capacity.slots,
        slots_free=len(manager.free_slots),
        page_bytes_used=page_bytes,
        snapshot_bytes_used=snapshot_bytes,
        useful_bytes_share=(page_bytes + snapshot_bytes) / (used * geometry.page_bytes) if used else 1.0,
        peak_bytes=memory.peak * geometry.page_bytes + capacity.slots * geometry.slot_bytes,
        pages_evicted=memory.pages_evicted,
        snapshots_evicted=memory.snapshots_evicted,
        pins_refused=manager.leases.refused,
        pins_broken=manager.leases.broken,
        **vars(manager.counters),
    )
