"""What each kind of traffic wants: one figure of a run by which settings are compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from triptych.errors import ConfigError, nearest
from triptych.workload.load import Timing
from triptych.workload.load_report import Slo


@dataclass(frozen=True, slots=True)
class Objective:
    """`of` makes one number of a run's timings; a run that failed in part is infinitely bad. `meaning`: a sentence."""

    key: str
    label: str
    meaning: str
    higher_is_better: bool
    of: Callable[[Sequence[Timing], Slo], float]

    def gain(self, one: float, other: float) -> float:
        """How many times better `one` is than `other`."""
        return one / other if self.higher_is_better else other / one


def _stretch(timings: Sequence[Timing], slo: Slo) -> float:
    if any(one.error for one in timings):
        return math.inf
    factors = [
        max(one.first / slo.ttft, 0.0 if one.per_token != one.per_token else one.per_token / slo.tpot)
        for one in timings
    ]
    return float(np.percentile(factors, 95))


def _task(timings: Sequence[Timing], slo: Slo) -> float:
    if any(one.error for one in timings):
        return math.inf
    return sum(one.total for one in timings) / len({one.session for one in timings})


def _long(timings: Sequence[Timing], slo: Slo) -> float:
    if any(one.error for one in timings):
        return math.inf
    middle = float(np.median([one.counts.prompt for one in timings]))
    return float(np.mean([one.total for one in timings if one.counts.prompt >= middle]))


def _rollouts(timings: Sequence[Timing], slo: Slo) -> float:
    if any(one.error for one in timings):
        return 0.0
    return len(timings) / (max(one.end for one in timings) - min(one.intended for one in timings))


def _mean(timings: Sequence[Timing], slo: Slo) -> float:
    if any(one.error for one in timings):
        return math.inf
    return float(np.mean([one.total for one in timings]))


_CHAT = Objective(
    "slo_stretch_p95",
    "SLO stretch, 95th percentile",
    "By what factor the SLO (seconds to the first token, seconds per further token) would have to be relaxed so that "
    "95 % of the requests keep it; 1 means that 95 % keep it as it is.",
    False,
    _stretch,
)
_CODING = Objective(
    "task_seconds",
    "seconds per task",
    "Seconds that an agent waits for the engine until its session is done: all its requests, end to end, added up.",
    False,
    _task,
)
_RESEARCH = Objective(
    "long_prompt_seconds",
    "end to end of long prompts, s",
    "Mean seconds from the intended time to the last token, over the longer half of the prompts.",
    False,
    _long,
)
_RL = Objective(
    "rollouts_per_s",
    "rollouts per second",
    "Finished samples per second from the first request to the last token.",
    True,
    _rollouts,
)
_MIXED = Objective(
    "end_to_end_mean_s", "mean end to end, s", "Mean seconds from the intended time to the last token.", False, _mean
)

OBJECTIVES = {
    "chat": _CHAT,
    "coding-agent": _CODING,
    "agents": _CODING,
    "research-agent": _RESEARCH,
    "rl-rollout": _RL,
    "mixed": _MIXED,
}


def objective_for(name: str) -> Objective:
    """The objective of the workload or profile `name`; of any other trace, that of mixed traffic."""
    return OBJECTIVES.get(name, _MIXED)


def objective_named(name: str) -> Objective:
    """The objective of the workload `name`, or the one with that key. ConfigError names the nearest."""
    by_key = {one.key: one for one in OBJECTIVES.values()} | OBJECTIVES
    if name not in by_key:
        raise ConfigError(f"There is no objective {name!r}.", nearest(name, by_key))
    return by_key[name]
