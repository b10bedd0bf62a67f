"""The engine's figures by what they are figures of: memory by tier and kind, prompt tokens by source, resume plans.

Metrics and the dashboard say the same because both ask here.
"""

from __future__ import annotations

from triptych.words import EngineStats, Panels

PLANS = {"snapshot": "snapshot_resumes", "trapezoid": "trapezoid_resumes", "bounded": "bounded_resumes"} | {
    "cold": "cold_starts"
}
"""Kinds of resume plan and the counter of each."""


def memory(stats: EngineStats, panels: Panels) -> dict[str, dict[str, int]]:
    """Bytes by tier and kind; the kinds of a tier add up to its room, where that is known.

    `csa`, `index`, `hca`: entries in pages. `snapshot`: windows stored at boundaries. `window`: slots of running
    requests. `loading`: being fetched. `object`: what a store holds, which does not tell kinds apart. `padding`: what
    pages and snapshots leave of their frames. `free`.
    """
    kinds = {"device": _device, "host": _host}
    return {tier: kinds.get(tier, _store)(tier, stats, panels) for tier in panels.room}


def room(stats: EngineStats, panels: Panels) -> dict[str, int]:
    """Bytes that each tier may hold; 0 where nobody knows. A disk may have less than it was given."""
    return {tier: _count(stats, f"{tier}_bytes_room") or size for tier, size in panels.room.items()}


def _device(tier: str, stats: EngineStats, panels: Panels) -> dict[str, int]:
    page = sum(panels.page.values())
    out = _pages(_count(stats, "pages_held") + _count(stats, "pages_cached"), panels)
    out["snapshot"] = _count(stats, "snapshot_bytes_used")
    out["window"] = (_count(stats, "slots") - _count(stats, "slots_free")) * panels.slot
    out["loading"] = _count(stats, "frames_loading") * page
    return _filled(out, _count(stats, "frames_free") * page + _count(stats, "slots_free") * panels.slot, panels, tier)


def _host(tier: str, stats: EngineStats, panels: Panels) -> dict[str, int]:
    out = _pages(_count(stats, "host_pages"), panels)
    out["snapshot"] = _count(stats, "host_snapshots") * panels.snapshot
    return _filled(out, _count(stats, "host_frames_free") * sum(panels.page.values()), panels, tier)


def _store(tier: str, stats: EngineStats, panels: Panels) -> dict[str, int]:
    used = _count(stats, f"{tier}_bytes_used")
    return {"object": used, "free": max(0, room(stats, panels)[tier] - used)}


def _pages(pages: int, panels: Panels) -> dict[str, int]:
    return {kind: pages * size for kind, size in panels.page.items()}


def _filled(out: dict[str, int], free: int, panels: Panels, tier: str) -> dict[str, int]:
    rest = max(0, panels.room[tier] - free - sum(out.values()))
    padding = out.pop("padding", 0) + rest
    return out | {"padding": padding, "free": free}


def _count(stats: EngineStats, name: str) -> int:
    return int(stats.cache.get(name, 0))


def sources(stats: EngineStats) -> dict[str, int]:
    """Prompt tokens since start by where they came from: a tier by name, recomputed, or computed.

    A request that was preempted counts again each time it is admitted.
    """
    fetched = {name.removesuffix("_tokens_found"): int(n) for name, n in found(stats).items()}
    cached, recomputed = _count(stats, "cached_tokens"), _count(stats, "recomputed_tokens")
    return {
        "device": cached - sum(fetched.values()),
        **fetched,
        "recomputed": recomputed,
        "computed": _count(stats, "admitted_tokens") - cached - recomputed,
    }


def found(stats: EngineStats) -> dict[str, float]:
    """The counters of tokens found below the device."""
    return {name: value for name, value in sorted(stats.cache.items()) if name.endswith("_tokens_found")}


def plans(stats: EngineStats) -> dict[str, int]:
    """Resume plans since start, by kind."""
    return {plan: _count(stats, name) for plan, name in PLANS.items()}


def moved(stats: EngineStats, panels: Panels) -> dict[str, dict[str, int]]:
    """Bytes written into and read out of each tier below the device, since start."""
    return {
        tier: {way: _count(stats, f"{tier}_bytes_{way}") for way in ("in", "out")}
        for tier in panels.room
        if tier != "device"
    }
