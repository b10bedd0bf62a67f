"""Two runs of the same requests against each other: each request is compared with itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from triptych.workload.load import Timing

_RESAMPLES, _SEED = 2000, 0
_FIGURES: dict[str, Callable[[Timing], float]] = {
    "ttft_s": lambda one: one.first,
    "tpot_s": lambda one: one.per_token,
    "end_to_end_s": lambda one: one.total,
}


def paired(one: Sequence[Timing], other: Sequence[Timing]) -> dict[str, Any]:
    """By figure the ratio other / one: geometric mean over the requests that both answered, with its 95 % interval.

    Requests are resampled by session, because those of one session share their fate.
    """
    mine, theirs = _by_place(one), _by_place(other)
    both = [place for place in mine if place in theirs]
    found: dict[str, Any] = {"pairs": len(both)}
    for name, figure in _FIGURES.items():
        logs: dict[str, list[float]] = {}
        for place in both:
            a, b = figure(mine[place]), figure(theirs[place])
            if a > 0 and b > 0:
                logs.setdefault(place[0], []).append(float(np.log(b / a)))
        found[name] = _ratio(list(logs.values()))
    return found


def _by_place(timings: Sequence[Timing]) -> dict[tuple[str, int], Timing]:
    """Answered requests by session and number in it."""
    numbers: dict[str, int] = {}
    found = {}
    for timing in timings:
        number = numbers.get(timing.session, 0)
        numbers[timing.session] = number + 1
        if timing.error is None:
            found[timing.session, number] = timing
    return found


def _ratio(sessions: list[list[float]]) -> dict[str, Any] | None:
    if not sessions:
        return None
    sums, counts = np.array([sum(one) for one in sessions]), np.array([len(one) for one in sessions])
    drawn = np.random.default_rng(_SEED).integers(len(sessions), size=(_RESAMPLES, len(sessions)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.exp(np.percentile(means, (2.5, 97.5))).tolist()
    return {"ratio": float(np.exp(sums.sum() / counts.sum())), "ratio_95": [low, high]}


def pair_lines(found: dict[str, Any], one: str, other: str) -> str:
    """The ratios for a terminal."""
    lines = [f"{other} over {one}, {found['pairs']} requests each compared with itself (below 1: {other} is faster)"]
    for name in _FIGURES:
        ratio = found[name]
        if ratio is not None:
            low, high = ratio["ratio_95"]
            lines.append(f"  {name:<14} {ratio['ratio']:.3f}   95 % {low:.3f} to {high:.3f}")
    return "\n".join(lines)
