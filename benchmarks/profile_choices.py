"""python -m benchmarks profile_choices: what the profiles leave alone, or set without speed in mind, and why.

Prompt tokens that were run, by snapshot policy, retention and time to live: the scheduler and the cache manager that
serve, on simulated steps, so the figures are the same on every machine. Policies and retention in the memory of the
comparison (workload/compare.py); times to live with the pauses of the trace, with four requests at once in 10 MiB.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks import rows
from triptych.cache.geometry import CacheGeometry
from triptych.cli.profile import costs_of
from triptych.config import EngineConfig
from triptych.engine.profiles import PROFILES
from triptych.engine.sizes import parse_size
from triptych.planner import model_named
from triptych.workload.compare import SETUPS, SPEED, requests_of
from triptych.workload.load import scaled
from triptych.workload.load_report import cache_figures
from triptych.workload.named import users, workload
from triptych.workload.sessions import SessionRequest
from triptych.workload.simulate import Simulation, StepCosts, World

_POLICIES = ("adaptive", "full", "periodic:1024", "none")
_TTLS = (None, 60.0, 300.0, 1200.0, 3600.0)
_PAUSED = {"chat": (400, 0.05, "10MiB"), "coding-agent": (400, 0.01, "10MiB"), "research-agent": (60, 0.02, "10MiB")}


def main(argv: list[str]) -> int:
    """Simulate, print, write a row."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks profile_choices", description=__doc__)
    parser.add_argument("--steps", type=Path, required=True, help="from `triptych profile measure`")
    parser.add_argument("--dry", action="store_true", help="write no row")
    given = parser.parse_args(argv)
    shape = model_named("tiny", "float32").shape
    assert shape is not None
    geometry, costs = CacheGeometry.of(shape), costs_of(given.steps).usual
    found: dict[str, Any] = {"run_share_by_policy": {}, "run_share_by_retention": {}, "run_share_by_ttl_s": {}}
    for name, setup in SETUPS.items():
        own = PROFILES[name].on("cpu")
        seen = [requests_of(name, setup, seed) for seed in range(2)]
        closed, memory = users(setup.arrivals), parse_size(setup.memory, "memory")
        for key, option, values in (
            ("run_share_by_policy", "policy", _POLICIES),
            ("run_share_by_retention", "retention", ("value", "lru")),
        ):
            world = World(geometry, memory, costs.seconds, costs.rates())
            found[key][name] = {value: _run_share(seen, own | {option: value}, world, closed) for value in values}
        print(name, found["run_share_by_policy"][name], found["run_share_by_retention"][name], flush=True)
    for name, (count, scale, memory_text) in _PAUSED.items():
        seen = [scaled(workload(name, count, seed).requests, scale) for seed in range(2)]
        found["run_share_by_ttl_s"][name] = _by_ttl(name, seen, parse_size(memory_text, "memory"), geometry, costs)
        print(name, found["run_share_by_ttl_s"][name], flush=True)
    if not given.dry:
        rows.append("profile_choices", found, kv_bytes={}, threads=1)
    return 0


def _by_ttl(
    name: str, seen: list[list[SessionRequest]], memory: int, geometry: CacheGeometry, costs: StepCosts
) -> dict[str, float]:
    own = PROFILES[name].on("cpu") | {"max_running": 4}  # so that nearly all of the memory is cache
    world = World(geometry, memory, costs.seconds, costs.rates())
    return {str(ttl): _run_share(seen, own | {"ttl": ttl}, world, 0, speed=1.0) for ttl in _TTLS}


def _run_share(
    seen: list[list[SessionRequest]], options: dict[str, Any], world: World, closed: int, speed: float = SPEED
) -> float:
    """Prompt tokens that were run, whole or to rebuild windows, over all prompt tokens."""
    config = EngineConfig.from_options(**options)
    timings = [one for requests in seen for one in Simulation(world, config, closed, speed).run(requests).timings]
    cache = cache_figures(timings)
    return round(1.0 - cache["cached_tokens"] / cache["prompt_tokens"], 4)
