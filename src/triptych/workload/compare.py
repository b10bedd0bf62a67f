"""Profiles run against each other, each workload by its own objective: the trials, and what they came to as data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from triptych.cache.geometry import CacheGeometry, plan_capacity
from triptych.config import EngineConfig
from triptych.engine.sizes import parse_size
from triptych.errors import ConfigError
from triptych.workload.fit import Fit, Outcome, Traffic, fit
from triptych.workload.load import LoadSettings, Timing, scaled
from triptych.workload.load_report import Slo, summary
from triptych.workload.named import retimed, users, workload
from triptych.workload.objectives import Objective, objective_for
from triptych.workload.sessions import SessionRequest
from triptych.workload.simulate import MachineCosts
from triptych.workload.trials import Contender, Trial, keep_whole_rounds, run_trial
from triptych.workload.verdicts import best, gain, geometric, values


@dataclass(frozen=True, slots=True)
class Setup:
    """One workload as a small machine can run it: how many requests, lengths times `scale`, arrivals, cache memory.

    `why`: what the setup stands for.
    """

    requests: int
    scale: float
    arrivals: str
    memory: str
    why: str


SETUPS = {
    "chat": Setup(80, 0.03, "closed:20", "28MiB", "more people than may run at once"),
    "coding-agent": Setup(
        72, 0.03, "closed:16", "15MiB", "sixteen agents whose sessions do not all fit into the memory"
    ),
    "research-agent": Setup(60, 0.04, "closed:12", "10MiB", "contexts that fill the memory when few are held"),
    "rl-rollout": Setup(128, 0.005, "trace", "28MiB", "all samples of a training step at once"),
}
"""The four workloads for the bundled checkpoint on a processor. Without pauses: agents and people are always due."""

SPEED = 1e6
"""How much faster than the trace pauses run: there are none."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How to compare. `costs`: of this machine's steps, for the fit. `profiles`: options by name. Round r of the runs
    draws the workload with seed + r; the fit sees other seeds. `slo` is that of MLPerf Inference's server scenario of
    Llama 2 70B. `on_answer` gets workload and profile at each answer.
    """

    model: str
    costs: MachineCosts
    profiles: Mapping[str, Mapping[str, Any]]
    rounds: int
    seed: int = 0
    clock: Literal["wall", "cpu"] = "cpu"
    slo: Slo = field(default_factory=lambda: Slo(2.0, 0.2))
    on_answer: Callable[[str, str], None] = lambda workload, profile: None


FIT_SEED = 1000
"""Added to the seed for what the fit sees."""

FIT_DRAWS = 4
"""How many draws of the workload the fit sees: a single one is a matter of luck."""


def compare(name: str, setup: Setup, plan: Plan, geometry: CacheGeometry) -> tuple[Fit, Compared]:
    """Fit settings to the workload `name`, then run all profiles on it. The first one is what the fit recommends.

    An interrupt ends it after the rounds that all profiles have run; KeyboardInterrupt if there is none.
    """
    objective = objective_for(name)
    memory = parse_size(setup.memory, "memory")
    seen = [requests_of(name, setup, plan.seed + FIT_SEED + number) for number in range(FIT_DRAWS)]
    closed = users(setup.arrivals)
    traffic = Traffic(seen, closed, SPEED, objective, plan.slo)
    found = fit(traffic, lambda config: plan.costs.world(config, geometry, memory), plan.profiles, {})
    failed = {one.name: one.refused for one in found.outcomes if one.shipped and _cannot_start(one, geometry, memory)}
    contenders = [
        Contender(one, {"kv_memory": memory, "device": "cpu", **options})
        for one, options in plan.profiles.items()
        if one not in failed
    ]
    contenders.sort(key=lambda one: one.name != found.profile.name)
    trial = Trial(
        plan.model,
        lambda number: requests_of(name, setup, plan.seed + number),
        LoadSettings(SPEED, closed, plan.clock),
        plan.rounds,
    )
    cut = False
    try:
        run_trial(trial, contenders, lambda profile, timing: plan.on_answer(name, profile))
    except KeyboardInterrupt:
        if not keep_whole_rounds(contenders):
            raise
        cut = True
    return found, Compared(name, objective, plan.slo, found.profile.name, contenders, failed, cut)


def requests_of(name: str, setup: Setup, seed: int) -> list[SessionRequest]:
    """The workload at the setup's size."""
    return scaled(retimed(workload(name, setup.requests, seed).requests, setup.arrivals, seed), setup.scale)


def _cannot_start(one: Outcome, geometry: CacheGeometry, memory: int) -> bool:
    """Whether an engine refuses these options in this memory, whatever it is asked."""
    try:
        plan_capacity(geometry, memory, EngineConfig.from_options(**one.options).max_running)
    except ConfigError:
        return True
    return False


@dataclass(slots=True)
class Compared:
    """One workload's trial. `failed`: why a contender could not run at all, by name. `cut_short`: by an interrupt."""

    workload: str
    objective: Objective
    slo: Slo
    first: str
    contenders: Sequence[Contender]
    failed: Mapping[str, str]
    cut_short: bool = False

    def rounds(self) -> dict[str, list[float]]:
        """The objective by contender and round."""
        return {one.name: values(one, self.objective, self.slo) for one in self.contenders}

    def figures(self) -> dict[str, tuple[dict[str, Any], list[Timing]]]:
        """Summary and timings by contender, all rounds as one run."""
        pooled = {one.name: one.timings() for one in self.contenders}
        return {name: (summary(timings, self.slo), timings) for name, timings in pooled.items()}

    def to_dict(self) -> dict[str, Any]:
        """JSON data: objective, contenders with figures, gains of the first over the others."""
        rounds, figures = self.rounds(), self.figures()
        about = {
            "key": self.objective.key,
            "label": self.objective.label,
            "meaning": self.objective.meaning,
            "higher_is_better": self.objective.higher_is_better,
        }
        profiles = {
            one.name: {
                "options": dict(one.options),
                "objective": [_finite(value) for value in rounds[one.name]],
                "mean": _finite(geometric(rounds[one.name])),
                "figures": _short(figures[one.name][0]),
            }
            for one in self.contenders
        }
        mine = rounds[self.first]
        gains = {name: gain(self.objective, mine, found).to_dict() for name, found in rounds.items()}
        del gains[self.first]
        return {
            "workload": self.workload,
            "objective": about,
            "recommended": self.first,
            "measured_best": best(self.objective, rounds),
            "profiles": profiles,
            "refused": dict(self.failed),
            "cut_short": self.cut_short,
            "gains": gains,
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _short(found: dict[str, Any]) -> dict[str, Any]:
    cache = found["cache"]
    return {
        "failed": found["failed"],
        "ttft_s_mean": found["ttft_s"]["mean"] if found["ttft_s"] else None,
        "ttft_s_p90": found["ttft_s"]["p90"] if found["ttft_s"] else None,
        "tpot_s_mean": found["tpot_s"]["mean"] if found["tpot_s"] else None,
        "end_to_end_s_mean": found["end_to_end_s"]["mean"] if found["end_to_end_s"] else None,
        "output_tokens_per_s": found["output_tokens_per_s"],
        "requests_per_s": found["requests"] / found["seconds"],
        "seconds": found["seconds"],
        "hit_rate": cache["hit_rate"],
        "prompt_tokens": cache["prompt_tokens"],
        "recomputed_tokens": cache["recomputed_tokens"],
        "computed_tokens": cache["computed_tokens"],
    }
