"""Which settings suit a trace: candidates simulated one after the other, the Pareto front of what they cost.

    1  the shipped profiles                        2  max_running x step_tokens around the default policy
    3  from the best of both: other places for snapshots, another retention

The objective is the workload's own. Two settings whose objectives differ by less than `CLOSE` count as equal: the
shipped profile is preferred then, and after that what needs less memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from triptych.config import EngineConfig
from triptych.errors import ConfigError
from triptych.workload.load import Timing
from triptych.workload.load_report import Slo, cache_figures
from triptych.workload.objectives import Objective
from triptych.workload.sessions import SessionRequest
from triptych.workload.simulate import Simulation, World

CLOSE = 0.02
RUNNING = (1, 2, 4, 6, 8, 16, 32, 64)
BUDGETS = (128, 256, 512, 2048, 8192)
POLICIES = ("full", "none", "periodic:4096")


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests of one or more rounds, how they arrive, what is wanted of them. `hourly`: USD of all that answers."""

    rounds: Sequence[Sequence[SessionRequest]]
    closed: int
    speed: float
    objective: Objective
    slo: Slo
    hourly: float | None = None


@dataclass(slots=True)
class Outcome:
    """One candidate: its options, whether it is a shipped profile, what it came to; `refused` says why it cannot run.

    figures: objective, ttft_mean_s, ttft_p95_s, tpot_p95_s, end_to_end_mean_s, requests_per_s, output_tokens_per_s,
    usd_per_session (None without a price), hit_rate, computed_share (prompt tokens that were run), peak_bytes (all
    caches, window slots included).
    """

    name: str
    options: dict[str, Any]
    shipped: bool
    figures: dict[str, float | None]
    refused: str = ""
    front: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        about = {"name": self.name, "shipped": self.shipped, "options": self.options, "front": self.front}
        return about | ({"refused": self.refused} if self.refused else self.figures)


@dataclass(frozen=True, slots=True)
class Fit:
    """All outcomes, the recommended settings, and the shipped profile that comes nearest to them."""

    outcomes: list[Outcome]
    recommended: Outcome
    profile: Outcome


WorldOf = Callable[[EngineConfig], World]


def fit(
    traffic: Traffic,
    world: WorldOf,
    profiles: Mapping[str, Mapping[str, Any]],
    given: Mapping[str, Any],
    on_candidate: Callable[[str], None] = lambda name: None,
) -> Fit:
    """Search. `profiles` are the shipped ones' options by name; `given` wins over every candidate's."""
    found: list[Outcome] = []

    def attempt(name: str, options: Mapping[str, Any], shipped: bool = False) -> None:
        merged = dict(options) | dict(given)
        if not shipped and any(merged == one.options for one in found if not one.shipped):
            return
        on_candidate(name)
        found.append(_outcome(name, merged, shipped, traffic, world))

    for name, options in profiles.items():
        attempt(name, options, shipped=True)
    for running, budget in product(RUNNING, BUDGETS):
        if running <= budget:
            attempt(f"run {running}, step {budget}", {"max_running": running, "step_tokens": budget})
    start = _best(found, traffic.objective)
    for policy in POLICIES:
        attempt(f"{start.name}, {policy}", start.options | {"policy": policy})
    attempt(f"{start.name}, lru", start.options | {"retention": "lru"})
    _mark_front([one for one in found if not one.refused])
    best = _best(found, traffic.objective)
    shipped = [one for one in found if one.shipped]
    nearest = _best(shipped, traffic.objective) if any(not one.refused for one in shipped) else best
    close = [one for one in found if not one.refused and _loss(one, best, traffic.objective) <= CLOSE]
    close.sort(key=lambda one: (not one.shipped, one.figures["peak_bytes"] or 0.0))
    return Fit(found, close[0], nearest)


def _outcome(name: str, options: dict[str, Any], shipped: bool, traffic: Traffic, world: WorldOf) -> Outcome:
    try:
        config = EngineConfig.from_options(**options)
        runs = [Simulation(world(config), config, traffic.closed, traffic.speed).run(one) for one in traffic.rounds]
    except ConfigError as error:
        return Outcome(name, options, shipped, {}, refused=str(error))
    timings = [timing for run in runs for timing in run.timings]
    failed = [timing.error for timing in timings if timing.error]
    if failed:
        return Outcome(name, options, shipped, {}, refused=f"{len(failed)} requests fail: {failed[0]}")
    figures = _figures([run.timings for run in runs], traffic)
    figures["peak_bytes"] = float(max(run.peak_bytes for run in runs))
    return Outcome(name, options, shipped, figures)


def _figures(runs: Sequence[Sequence[Timing]], traffic: Traffic) -> dict[str, float | None]:
    timings = [timing for run in runs for timing in run]
    seconds = sum(max(one.end for one in run) - min(one.intended for one in run) for run in runs)
    sessions = sum(len({one.session for one in run}) for run in runs)
    cache = cache_figures(timings)
    firsts = [one.first for one in timings]
    slow = [one.per_token for one in timings if one.per_token == one.per_token] or [0.0]
    return {
        "objective": float(np.exp(np.mean([np.log(traffic.objective.of(run, traffic.slo)) for run in runs]))),
        "ttft_mean_s": float(np.mean(firsts)),
        "ttft_p95_s": float(np.percentile(firsts, 95)),
        "tpot_p95_s": float(np.percentile(slow, 95)),
        "end_to_end_mean_s": float(np.mean([one.total for one in timings])),
        "requests_per_s": len(timings) / seconds,
        "output_tokens_per_s": sum(one.counts.output for one in timings) / seconds,
        "usd_per_session": None if traffic.hourly is None else traffic.hourly * seconds / 3600 / sessions,
        "hit_rate": cache["hit_rate"],
        "computed_share": 1.0 - cache["cached_tokens"] / max(1, cache["prompt_tokens"]),
    }


def _value(one: Outcome, objective: Objective) -> float:
    value = one.figures["objective"]
    assert value is not None
    return value if objective.higher_is_better else 1.0 / value


def _loss(one: Outcome, best: Outcome, objective: Objective) -> float:
    return 1.0 - _value(one, objective) / _value(best, objective)


def _best(found: Sequence[Outcome], objective: Objective) -> Outcome:
    """The best that runs. ConfigError, with the reason, if none does."""
    usable = [one for one in found if not one.refused]
    if not usable:
        raise ConfigError(f"No settings can run this traffic: {found[0].refused}")
    return max(usable, key=lambda one: _value(one, objective))


def _mark_front(found: Sequence[Outcome]) -> None:
    """Who is beaten by nobody in 95th percentile of first token, requests a second and memory at once."""

    def costs(one: Outcome) -> tuple[float, float, float]:
        figures = one.figures
        return figures["ttft_p95_s"] or 0.0, -(figures["requests_per_s"] or 0.0), figures["peak_bytes"] or 0.0

    for one in found:
        mine = costs(one)
        others = (costs(other) for other in found if other is not one)
        one.front = not any(all(a <= b for a, b in zip(c, mine, strict=True)) and c != mine for c in others)
