"""Who is better at what a workload wants, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from triptych.workload.load_report import Slo
from triptych.workload.objectives import Objective
from triptych.workload.trials import Contender

# Student's t at 97.5 % for 1, 2, ... degrees of freedom
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120)


@dataclass(frozen=True, slots=True)
class Gain:
    """How many times better one contender is than another: geometric mean over rounds and its 95 % interval.

    The interval is that of Student's t on the logarithms of the rounds' ratios; infinitely wide with one round.
    """

    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """better, worse or equal (not to be told apart)."""
        return "better" if self.low > 1 else "worse" if self.high < 1 else "equal"

    def to_dict(self) -> dict[str, Any]:
        """JSON data; an infinite interval is null."""
        known = math.isfinite(self.high)
        told = self.ratio if math.isfinite(self.ratio) else None  # JSON knows no infinity
        return {"gain": told, "gain_95": [self.low, self.high] if known else None, "verdict": self.verdict}


def values(contender: Contender, objective: Objective, slo: Slo) -> list[float]:
    """The objective of each round."""
    return [objective.of(timings, slo) for timings in contender.rounds]


def gain(objective: Objective, one: Sequence[float], other: Sequence[float]) -> Gain:
    """How much better the rounds of `one` are than those of `other`, round by round."""
    mine, theirs = (sum(not 0 < value < math.inf for value in rounds) for rounds in (one, other))
    if mine or theirs:  # a round with failures has no ratio: whoever fails less often is better
        edge = math.inf if mine < theirs else 0.0 if theirs < mine else 1.0
        return Gain(edge, edge, edge) if edge != 1.0 else Gain(1.0, 0.0, math.inf)
    logs = np.log([objective.gain(a, b) for a, b in zip(one, other, strict=True)])
    middle = float(logs.mean())
    if len(logs) < 2:
        return Gain(math.exp(middle), 0.0, math.inf)
    freedom = len(logs) - 1
    t = _T[freedom - 1] if freedom <= len(_T) else 1.96 + 2.4 / freedom
    half = t * float(logs.std(ddof=1)) / math.sqrt(len(logs))
    return Gain(math.exp(middle), math.exp(middle - half), math.exp(middle + half))


def geometric(rounds: Sequence[float]) -> float:
    """Geometric mean; 0 or infinity if one of them is."""
    if any(value <= 0 for value in rounds):
        return 0.0
    if math.inf in rounds:
        return math.inf
    return math.exp(sum(math.log(value) for value in rounds) / len(rounds))


def best(objective: Objective, by_name: dict[str, list[float]]) -> str:
    """The contender whose rounds are best on average."""
    sign = 1.0 if objective.higher_is_better else -1.0
    return max(by_name, key=lambda name: sign * geometric(by_name[name]))


def objective_lines(objective: Objective, by_name: dict[str, list[float]], first: str) -> str:
    """Each contender's objective, and how much better `first` is than the others, for a terminal."""
    wanted = "higher is better" if objective.higher_is_better else "lower is better"
    rounds = len(by_name[first])
    lines = [f"{objective.label} ({wanted}), geometric mean of {rounds} round{'s' if rounds != 1 else ''}"]
    for name, found in by_name.items():
        failed = sum(not 0 < value < math.inf for value in found)
        if failed:  # such a round has no objective, and so no mean
            lines.append(f"  {name:<40} requests failed in {failed} of {rounds} round{'s' if rounds != 1 else ''}")
            continue
        line = f"  {name:<40} {geometric(found):9.4g}"
        if name != first:
            one = gain(objective, by_name[first], found)
            span = f", 95 % {one.low:.3f} to {one.high:.3f}: {one.verdict}" if math.isfinite(one.high) else ""
            line += f"   {first} is {one.ratio:.3f} times as good{span}"
        lines.append(line)
    return "\n".join(lines)
