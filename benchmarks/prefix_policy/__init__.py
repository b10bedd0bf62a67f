"""python -m benchmarks prefix_policy: keep every window, some, none, or the likely ones: what does each cost, and where
do they cross?

Full, periodic, none and adaptive over prefix length, reuse frequency (traffic.py: pressure) and the tier that keeps the
cache. The real cache manager replays made-up traffic; the planner's rates say how long the work takes (costs.py).
`--spot` runs some cells with the bundled checkpoint in an engine of this process: tokens as replayed, and time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from benchmarks import rows
from benchmarks.prefix_policy.costs import TIERS, Costs, priced, settings_of
from benchmarks.prefix_policy.traffic import SCENARIOS, Cell
from triptych.cache.geometry import CacheGeometry
from triptych.config import SHAPES
from triptych.planner.hardware import catalogue
from triptych.planner.models import model_named
from triptych.planner.rates import prefill_rates

POLICIES = ("full", "periodic:1024", "periodic:8192", "none", "adaptive")
LENGTHS = (2048, 8192, 32768, 131072)
PRESSURES = (0.06, 0.12, 0.25, 0.5, 1.0, 2.0)
BELOW_LENGTHS, BELOW_PRESSURES = LENGTHS[:3], (0.12, 0.5, 2.0)
"""Below the device fewer points: a device that hinders no policy is large, and so must the traffic be."""


def main(argv: list[str]) -> int:
    """Replay the grid or run the spot checks; print, write a row."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks prefix_policy", description=__doc__)
    parser.add_argument("--model", choices=sorted(SHAPES), default="flash")
    parser.add_argument("--hardware", default="hgx-h200", help="whose prefill rate the planner takes")
    parser.add_argument("--tiers", nargs="+", choices=TIERS, default=list(TIERS))
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--short", action="store_true", help="two cells, no row: does it work?")
    parser.add_argument("--spot", action="store_true", help="real engine runs with the bundled checkpoint instead")
    given = parser.parse_args(argv)
    if given.spot:
        return _spot()
    node = catalogue().node(given.hardware)
    one = prefill_rates(model_named(given.model), node.device)
    rates = one[0] / node.count, one[1] / node.count
    geometry = CacheGeometry.of(SHAPES[given.model], "fp8")
    found: list[dict[str, Any]] = []
    begun = time.monotonic()
    for tier, pressure, cell in _grid(given.tiers, given.scenarios, given.short):
        for policy in POLICIES:
            result = priced(settings_of(geometry, cell, policy, tier, pressure), cell, tier, rates)
            found.append(_row(tier, pressure, cell, policy, result))
        _show(found[-len(POLICIES) :], time.monotonic() - begun)
    if not given.short:
        values = {
            **{"part": "replay", "model": given.model, "hardware": node.describe(), "cells": found},
            **{"token_seconds": rates[0], "context_seconds": rates[1]},
            "tiers": {name: asdict(tier) if tier is not None else None for name, tier in TIERS.items()},
        }
        sizes = {"page": geometry.page_bytes, "snapshot": geometry.snapshot_bytes}
        rows.append("prefix_policy", values, kv_bytes=sizes, threads=1)
    return 0


def _grid(tiers: list[str], scenarios: list[str], short: bool) -> Iterator[tuple[str, float, Cell]]:
    if short:
        yield "device", 0.5, Cell("shared", 2048, 8, requests=60)
        yield "nvme", 0.5, Cell("turns", 2048, 8, requests=60)
        return
    for tier in tiers:
        on_device = tier == "device"
        for scenario in scenarios:
            for length in LENGTHS if on_device else BELOW_LENGTHS:
                cell = Cell(scenario, length, 24 if on_device else 120, requests=240 if on_device else 600)
                for pressure in PRESSURES if on_device else BELOW_PRESSURES:
                    yield tier, pressure, cell


def _row(tier: str, pressure: float, cell: Cell, policy: str, result: Costs) -> dict[str, Any]:
    numbers = {name: float(f"{value:.5g}") for name, value in asdict(result).items()}
    head = {"scenario": cell.scenario, "tier": tier, "length": cell.length, "pressure": pressure, "policy": policy}
    return {**head, "seconds": float(f"{result.seconds:.5g}"), **numbers}


def _show(cells: list[dict[str, Any]], seconds: float) -> None:
    one = cells[0]
    shown = "  ".join(f"{cell['policy']} {1e3 * cell['seconds']:.1f}" for cell in cells)
    place = f"{one['scenario']:<7}{one['tier']:<8}{one['length']:>7} pressure {one['pressure']:<5}"
    print(f"{seconds:6.0f} s  {place} ms: {shown}", flush=True)


def _spot() -> int:
    from benchmarks.prefix_policy.spot import spot_checks  # loads torch, which replays need not

    found = spot_checks()
    for one in found:
        print(
            f"{one['scenario']:<7}{one['policy']:<10} {one['cpu_ms']:7.1f} ms of CPU a returning prompt, "
            f"hit {one['hit']:.3f}, replayed {one['replayed_hit']:.3f}"
        )
    rows.append("prefix_policy", {"part": "spot", "model": "tiny", "cells": found}, kv_bytes={}, threads=1)
    return 0
