"""The endpoint profiles against each other on each workload, each by that workload's own objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks import rows
from benchmarks.curves.page import Curve
from benchmarks.curves.picture import Sheet, markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TITLE = "Endpoint profiles against each other"
_OURS, _OTHERS = "#1b7f6b", "#cbd5e1"
Row = Mapping[str, Any]


def curve() -> Curve:
    """Rows of `profiles`: the newest of each workload."""
    newest = {row["workload"]: row for row in rows.read("profiles")}
    if not newest:
        return Curve("profiles", _TITLE, "There are no rows of `profiles` yet, so there is nothing to draw.", None)
    made_from = [newest[name] for name in sorted(newest)]
    with Sheet(1, len(made_from), (max(5.0, 3.1 * len(made_from)), 4.2)) as sheet:
        for axes, row in zip(sheet.axes[0], made_from, strict=True):
            _draw(axes, row)
        notes = ["Bars: geometric mean of the rounds, dots: each one. Dark: what `triptych profile fit` recommends."]
        picture = sheet.finish(made_from, notes)
    return Curve("profiles", _TITLE, _text(made_from), picture)


def _draw(axes: Axes, row: Row) -> None:
    objective = row["objective"]
    names = sorted(row["profiles"])
    colours = [_OURS if name == row["recommended"] else _OTHERS for name in names]
    axes.bar(names, [row["profiles"][name]["mean"] for name in names], color=colours)
    for place, name in enumerate(names):
        values = row["profiles"][name]["objective"]
        axes.plot([place] * len(values), values, ".", color="#111827", markersize=4)
    axes.set_ylabel(objective["label"])
    axes.set_title(f"{row['workload']}: {'higher' if objective['higher_is_better'] else 'lower'} is better")
    axes.set_xlabel("profile")
    axes.tick_params(axis="x", rotation=35)
    for label in axes.get_xticklabels():
        label.set_ha("right")
        label.set_rotation_mode("anchor")


def _text(made_from: Sequence[Row]) -> str:
    lines = []
    for row in made_from:
        for other, found in sorted(row["gains"].items()):
            low, high = found["gain_95"]
            verdict = "equal" if low <= 1 <= high else "better" if low > 1 else "**worse**"
            lines.append((row["workload"], f"`{row['recommended']}`", other, f"{found['gain']:.2f}",
                          f"{low:.2f} to {high:.2f}", verdict))  # fmt: skip
    table = markdown_table(("workload", "recommended", "against", "times better", "95 %", ""), lines)
    meanings = "\n".join(
        f"- *{row['workload']}*: {row['objective']['label']}: {row['objective']['meaning'].rstrip('.')}; "
        f"{_trial(row['trial'])}."
        for row in made_from
    )
    absent = sorted({"chat", "coding-agent", "research-agent", "rl-rollout"} - {row["workload"] for row in made_from})
    missing = f"\n\nNot measured yet: {', '.join(absent)}." if absent else ""
    return f"""Each profile ran each workload with the bundled checkpoint in an engine of one process, in turns;
compared by the workload's own objective, round by round.

{meanings}

{table}

Better and worse: the 95 % interval does not hold 1.{missing}
"""


def _trial(trial: Row) -> str:
    clock = "processor seconds" if trial["clock"] == "cpu" else "seconds"
    return (
        f"{trial['requests']} requests, lengths times {trial['scale']:g}, arrivals {trial['arrivals']}, "
        f"{trial['rounds']} rounds, {clock}"
    )
