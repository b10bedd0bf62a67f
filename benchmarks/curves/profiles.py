"""The endpoint profiles against each other on each workload, each by that workload's own objective.

What counts are settings, not names: all rounds of all rows of one trial in which the recommended profile's settings and
another's ran side by side are one sample, whatever the profiles were called when they were measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks import rows
from benchmarks.curves.page import Curve
from benchmarks.curves.picture import Sheet, markdown_table
from triptych.engine.profiles import PROFILES
from triptych.workload.objectives import objective_for
from triptych.workload.verdicts import Gain, gain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TITLE = "Endpoint profiles against each other"
_OURS = "#1b7f6b"
_TRIAL = ("requests", "scale", "arrivals", "kv_memory", "clock", "speed", "ttft", "tpot")
_SETTINGS = ("max_running", "step_tokens", "deterministic")
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Against:
    """The recommended profile against `other`: `found` None where it could not be compared, with the reason."""

    other: str
    rounds: int
    found: Gain | None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Trial:
    """The newest row of a workload's trial, all rows of that trial, and what they say together."""

    newest: Row
    made_from: Sequence[Row]
    against: Sequence[Against]


def curve() -> Curve:
    """Rows of `profiles`, put together for each workload's newest trial."""
    everything = rows.read("profiles")
    if not everything:
        return Curve("profiles", _TITLE, "There are no rows of `profiles` yet, so there is nothing to draw.", None)
    newest = {row["workload"]: row for row in everything}
    trials = [_together(newest[name], everything) for name in sorted(newest)]
    made_from = [row for trial in trials for row in trial.made_from]
    with Sheet(1, len(trials), (max(5.0, 3.1 * len(trials)), 4.2)) as sheet:
        for axes, trial in zip(sheet.axes[0], trials, strict=True):
            _draw(axes, trial)
        notes = [
            "Bars: how many times better the profile named above is, which `triptych profile fit` recommends; "
            "95 % intervals, by processor seconds."
        ]
        picture = sheet.finish(made_from, notes)
    return Curve("profiles", _TITLE, _text(trials), picture)


def _together(newest: Row, everything: Sequence[Row]) -> Trial:
    def key(row: Row) -> list[Any]:
        return [row["workload"], *(row["trial"].get(name) for name in _TRIAL)]

    first = newest["recommended"]
    same = [row for row in everything if key(row) == key(newest) and _as(row, first) is not None]
    against = [_against(first, other, same) for other in sorted(PROFILES) if other != first]
    return Trial(newest, [row for row in same if any(_as(row, one.other) for one in against)], against)


def _as(row: Row, name: str) -> Sequence[float] | None:
    """Rounds of the contender in `row` that ran with the settings that profile `name` has now."""
    wanted = PROFILES[name].on("cpu")
    for one in row["profiles"].values():
        if all(one["options"].get(key) == wanted.get(key) for key in _SETTINGS):
            return [math.inf if value is None else value for value in one["objective"]]
    return None


def _against(first: str, other: str, same: Sequence[Row]) -> Against:
    mine: list[float] = []
    theirs: list[float] = []
    for row in same:
        found = _as(row, other)
        if found is not None:
            mine += _as(row, first) or ()
            theirs += found
    failed = sum(not 0 < value < math.inf for value in theirs)
    if failed:
        return Against(other, len(theirs), None, f"requests failed in {failed} rounds of {other}")
    if theirs:
        objective = objective_for(same[-1]["workload"])
        return Against(other, len(theirs), gain(objective, mine, theirs))
    cannot = any(other in row.get("refused", {}) for row in same)
    return Against(other, 0, None, f"{other} cannot run in this memory" if cannot else "not measured yet")


def _draw(axes: Axes, trial: Trial) -> None:
    names = [one.other for one in trial.against]
    for place, one in enumerate(trial.against):
        if one.found is None:
            short = "requests fail" if one.rounds else "cannot run" if "cannot" in one.why else "not measured"
            axes.text(place, 1.0, short, rotation=90, ha="center", va="bottom", color="#6b7280")
            continue
        low, high = one.found.low, one.found.high
        bounds = [[one.found.ratio - low], [min(high, 1e3) - one.found.ratio]]
        axes.bar([place], [one.found.ratio - 1.0], bottom=1.0, width=0.6, color=_OURS)
        axes.errorbar([place], [one.found.ratio], yerr=bounds, fmt=".", color="#111827", capsize=4)
    axes.axhline(1.0, color="#111827", linewidth=1)
    axes.set_yscale("log")
    marks = [0.8, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 8.0]
    axes.set_yticks(marks, [f"{mark:g}" for mark in marks])
    axes.minorticks_off()
    axes.set_ylim(0.8, 8.0)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("times better")
    axes.set_title(f"{trial.newest['workload']}: profile {trial.newest['recommended']}")
    axes.set_xlabel("than profile")
    axes.tick_params(axis="x", rotation=35)
    for label in axes.get_xticklabels():
        label.set_ha("right")
        label.set_rotation_mode("anchor")


def _text(trials: Sequence[Trial]) -> str:
    lines = []
    for trial in trials:
        for one in trial.against:
            figures = ("", one.why) if one.found is None else (f"{one.found.ratio:.2f}", _interval(one.found))
            verdict = "" if one.found is None else {"worse": "**worse**"}.get(one.found.verdict, one.found.verdict)
            names = (trial.newest["workload"], f"`{trial.newest['recommended']}`", one.other)
            lines.append((*names, *figures, str(one.rounds or ""), verdict))
    table = markdown_table(("workload", "recommended", "against", "times better", "95 %", "rounds", ""), lines)
    meanings = "\n".join(
        f"- *{row['workload']}*: {_wanted(row['objective'])}; {_trial(row['trial'])}."
        for row in (trial.newest for trial in trials)
    )
    absent = sorted({"chat", "coding-agent", "research-agent", "rl-rollout"} - {t.newest["workload"] for t in trials})
    missing = f"\n\nNot measured yet: {', '.join(absent)}." if absent else ""
    return f"""Each profile ran each workload with the bundled checkpoint in an engine of one process, in turns;
compared by the workload's own objective, round by round. All rounds with the settings of today count, also those that
were taken while other work ran on the machine.

{meanings}

{table}

Better and worse: the 95 % interval does not hold 1.{missing}
"""


def _wanted(objective: Row) -> str:
    better = "higher" if objective["higher_is_better"] else "lower"
    return f"{objective['label']} ({better} is better): {objective['meaning'].rstrip('.')}"


def _interval(found: Gain) -> str:
    return f"{found.low:.2f} to {found.high:.2f}"


def _trial(trial: Row) -> str:
    clock = "processor seconds" if trial["clock"] == "cpu" else "seconds"
    memory = f", {trial['kv_memory'] / (1 << 20):g} MiB of cache" if "kv_memory" in trial else ""
    return (
        f"{trial['requests']} requests, lengths times {trial['scale']:g}, arrivals {trial['arrivals']}{memory}, {clock}"
    )
