"""What a run of the load driver comes to: percentiles with confidence intervals, goodput, hit rate, cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from triptych.workload.energy import Energy
from triptych.workload.load import Timing, are_rollouts

_RESAMPLES, _SEED = 400, 0


@dataclass(frozen=True, slots=True)
class Slo:
    """What a user accepts: seconds to the first token and mean seconds per further token."""

    ttft: float = 2.0
    tpot: float = 0.1

    def met(self, timing: Timing) -> bool:
        """Whether a request kept both; one that failed did not."""
        slow = timing.per_token  # NaN with a single token, which no rate can miss
        return timing.error is None and timing.first <= self.ttft and not slow > self.tpot


def summary(
    timings: Sequence[Timing], slo: Slo, hourly: float | None = None, energy: Energy | None = None
) -> dict[str, Any]:
    """All figures as JSON data. `hourly`: USD per hour of everything that answers; `energy`: what the run took."""
    good = [one for one in timings if one.error is None]
    seconds = max((one.end for one in timings), default=0.0) - min((one.intended for one in timings), default=0.0)
    met = sum(slo.met(one) for one in timings)
    output = sum(one.counts.output for one in good)
    sessions = len({one.session for one in good})
    found = {
        "requests": len(timings),
        "failed": len(timings) - len(good),
        "errors": dict(Counter(one.error for one in timings if one.error).most_common(3)),
        "sessions": sessions,
        "seconds": seconds,
        "ttft_s": spread([one.first for one in good]),
        "itl_s": spread(_gaps(good), interval=False),
        "tpot_s": spread([one.per_token for one in good]),
        "end_to_end_s": spread([one.total for one in good]),
        "user_tokens_per_s": spread([1 / one.per_token for one in good if one.per_token > 0]),
        "output_tokens_per_s": _over(output, seconds),
        "prompt_tokens_per_s": _over(sum(one.counts.prompt for one in good), seconds),
        "goodput": {
            "ttft_s": slo.ttft,
            "tpot_s": slo.tpot,
            "share": _over(met, len(timings)),
            "requests_per_s": _over(met, seconds),
        },
        "cache": cache_figures(good),
        "late_s": spread([one.sent - one.intended for one in timings], interval=False),
    }
    if are_rollouts([one.prompt for one in timings]):
        found["rollouts"] = rollout_figures(good, seconds, hourly)
    if hourly is not None:
        spent = seconds / 3600 * hourly
        found["cost"] = {
            "usd_per_hour": hourly,
            "usd": spent,
            "usd_per_session": _over(spent, sessions),
            "usd_per_million_output_tokens": _over(1e6 * spent, output),
        }
    if energy is not None:
        found["energy"] = energy_figures(good, energy)
    return found


def energy_figures(timings: Sequence[Timing], energy: Energy) -> dict[str, Any]:
    """Joules in all, by device, per token and per session. `not_told`: why, if no device tells; else what is missing.

    A token is one of a prompt that was run, or one of an output; cached ones cost next to nothing.
    """
    output = sum(one.counts.output for one in timings)
    run = output + sum(one.counts.prompt - one.counts.cached for one in timings)
    if not energy.told:
        return {"joules": None, "not_told": energy.missing or "no device tells"}
    return {
        "joules": energy.total,
        "watts": _over(energy.total, energy.seconds),
        "joules_by_device": dict(energy.joules),
        "joules_per_output_token": _over(energy.total, output),
        "joules_per_token_run": _over(energy.total, run),
        "joules_per_session": _over(energy.total, len({one.session for one in timings})),
        "not_told": energy.missing,
    }


def energy_line(found: dict[str, Any]) -> str:
    """One sentence on energy."""
    if found["joules"] is None:
        return f"energy: not told by this device ({found['not_told']})"
    devices = ", ".join(f"{name} {joules:,.0f} J" for name, joules in found["joules_by_device"].items())
    return (
        f"energy {found['joules']:,.0f} J, {found['watts']:,.0f} W on average ({devices}): "
        f"{found['joules_per_output_token']:.3g} J per output token, "
        f"{found['joules_per_token_run']:.3g} per token run, {found['joules_per_session']:.3g} per session"
    )


def rollout_figures(good: Sequence[Timing], seconds: float, hourly: float | None) -> dict[str, Any]:
    """What a trainer wants to know of trajectories: how many a second, when the last of them came, what one costs.

    Rewards are not among it: nothing here judges an answer.
    """
    ends = sorted(one.end for one in good)
    begin = min((one.intended for one in good), default=0.0)
    found: dict[str, Any] = {
        "trajectories": len(good),
        "prompts": len({one.prompt for one in good}),
        "trajectories_per_s": _over(len(good), seconds),
        "tokens_per_trajectory": _over(sum(one.counts.output for one in good), len(good)),
        "half_done_s": ends[(len(ends) - 1) // 2] - begin if ends else 0.0,
        "all_done_s": ends[-1] - begin if ends else 0.0,
    }
    if hourly is not None:
        found["usd_per_trajectory"] = _over(seconds / 3600 * hourly, len(good))
    return found


def rollout_line(found: dict[str, Any]) -> str:
    """`rollout_figures` as a sentence."""
    cost = f", {found['usd_per_trajectory']:.3g} USD each" if "usd_per_trajectory" in found else ""
    return (
        f"rollouts {found['trajectories_per_s']:.3g} a second: {found['trajectories']:,} trajectories of "
        f"{found['prompts']:,} prompts, {found['tokens_per_trajectory']:,.0f} tokens on average{cost}; half were done "
        f"after {found['half_done_s']:.1f} s, all after {found['all_done_s']:.1f} s"
    )


def cache_figures(timings: Sequence[Timing]) -> dict[str, Any]:
    """Tokens by where they came from; hit rate None where the server does not tell."""
    prompt = sum(one.counts.prompt for one in timings)
    cached = sum(one.counts.cached for one in timings)
    again = sum(one.counts.recomputed for one in timings)
    tiers: Counter[str] = Counter()
    for one in timings:
        tiers.update(one.counts.by_tier)
    known = any(one.counts.known and one.counts.prompt for one in timings)
    return {
        "prompt_tokens": prompt,
        "cached_tokens": cached,
        "recomputed_tokens": again,
        "computed_tokens": prompt - cached - again,
        "cached_by_tier": {"device": cached - sum(tiers.values()), **dict(tiers)},
        "hit_rate": _over(cached, prompt) if known else None,
    }


def spread(values: Sequence[float], interval: bool = True) -> dict[str, Any] | None:
    """Mean and percentiles of what is no NaN, None if nothing is left; 95 % bootstrap intervals of p50 and p99."""
    array: npt.NDArray[np.float64] = np.asarray([value for value in values if value == value], float)
    if not len(array):
        return None
    points = dict(zip(("p50", "p90", "p99"), np.percentile(array, (50, 90, 99)).tolist(), strict=True))
    found: dict[str, Any] = {"mean": float(array.mean()), **points, "max": float(array.max())}
    if interval:
        drawn = np.random.default_rng(_SEED).choice(array, (_RESAMPLES, len(array)))
        for name, share in (("p50", 50), ("p99", 99)):
            found[f"{name}_95"] = np.percentile(np.percentile(drawn, share, axis=1), (2.5, 97.5)).tolist()
    return found


def _gaps(timings: Sequence[Timing]) -> list[float]:
    """Seconds between pieces; the tokens of one piece share its gap."""
    gaps = []
    for one in timings:
        for (before, _), (at, tokens) in zip(one.arrivals, one.arrivals[1:], strict=False):
            gaps += [(at - before) / tokens] * tokens if tokens else []
    return gaps


def _over(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def table(found: dict[str, Any]) -> str:
    """The figures for a terminal."""
    lines = [
        f"{found['requests']:,} requests of {found['sessions']:,} sessions in {found['seconds']:.1f} s, "
        f"{found['failed']} failed",
        f"{'':<22}{'mean':>9}{'p50':>9}{'p90':>9}{'p99':>9}{'max':>9}   95 % of p50, of p99",
    ]
    rows = (
        ("first token, s", "ttft_s"),
        ("between tokens, s", "itl_s"),
        ("end to end, s", "end_to_end_s"),
        ("tok/s of a user", "user_tokens_per_s"),
        ("sent late, s", "late_s"),
    )
    for label, key in rows:
        one = found[key]
        if one is None:
            continue
        cells = "".join(f"{one[name]:>9.3g}" for name in ("mean", "p50", "p90", "p99", "max"))
        spans = [f"{one[name][0]:.3g} to {one[name][1]:.3g}" for name in ("p50_95", "p99_95") if name in one]
        lines.append(f"{label:<22}{cells}   {', '.join(spans)}")
    cache, good = found["cache"], found["goodput"]
    rate = "not told" if cache["hit_rate"] is None else f"{cache['hit_rate']:.1%}"
    lines += [
        f"output {found['output_tokens_per_s']:,.0f} tok/s, prompts {found['prompt_tokens_per_s']:,.0f} tok/s",
        f"goodput {good['share']:.1%} of requests within {good['ttft_s']:g} s and {good['tpot_s']:g} s a token",
        f"prompt tokens {cache['prompt_tokens']:,}: cached {cache['cached_tokens']:,} ({rate}), recomputed "
        f"{cache['recomputed_tokens']:,}, computed {cache['computed_tokens']:,}",
    ]
    lines += [rollout_line(found["rollouts"])] if "rollouts" in found else []
    below = {tier: tokens for tier, tokens in cache["cached_by_tier"].items() if tier != "device"}
    lines += (
        [f"  from lower tiers: {', '.join(f'{tier} {tokens:,}' for tier, tokens in below.items())}"] if below else []
    )
    if "cost" in found:
        cost = found["cost"]
        lines.append(
            f"cost {cost['usd']:.4g} USD, {cost['usd_per_session']:.3g} a session, "
            f"{cost['usd_per_million_output_tokens']:.3g} per million output tokens"
        )
    if "energy" in found:
        lines.append(energy_line(found["energy"]))
    lines += [f"  {count} x {text}" for text, count in found["errors"].items()]
    return "\n".join(lines)
