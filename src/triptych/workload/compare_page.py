"""Profiles against each other as one HTML page that needs nothing else."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from triptych.pictures import inline
from triptych.workload.compare import Compared
from triptych.workload.load_page import figures_table, plots, write_html
from triptych.workload.verdicts import gain, geometric

_COLOURS = {"better": "#2a9d8f", "equal": "#888888", "worse": "#e76f51"}


def write_comparison(path: Path, found: Sequence[Compared], about: Mapping[str, Any]) -> None:
    """Write all trials to `path`. ConfigError without matplotlib or if the page cannot be written."""
    body = [f"<figure>{_overview(found)}<figcaption>{html.escape(_CAPTION)}</figcaption></figure>"]
    for one in found:
        body += [*_verdicts(one), *_details(one)]
    write_html(path, "Profiles against each other", body, about)


_CAPTION = (
    "Left: the workload's objective, a dot for each round and a bar at the geometric mean. Right: how many times "
    "better the recommended profile is than each other one, paired by round, with 95 % intervals; green lies above 1."
)


def _overview(found: Sequence[Compared]) -> str:
    def draw(grid: Any) -> None:
        for one, (left, right) in zip(found, grid, strict=True):
            _objective(left, one)
            _gains(right, one)

    return inline(len(found), 2, (11, 2.9 * len(found)), draw)


def _objective(axes: Any, one: Compared) -> None:
    rounds = one.rounds()
    names = list(rounds)
    for place, name in enumerate(names):
        usable = [value for value in rounds[name] if math.isfinite(value)]
        colour = "#264653" if name == one.first else "#a8b5ba"
        if len(usable) == len(rounds[name]):
            axes.barh([place], [geometric(usable)], color=colour, height=0.6)
            axes.plot(usable, [place] * len(usable), ".", color="black", markersize=4)
        else:
            axes.text(0, place, " requests failed", va="center", fontsize=8)
    for name, reason in one.failed.items():
        axes.barh([len(names)], [0])
        axes.text(0, len(names), " cannot run: " + reason[:48], va="center", fontsize=7)
        names.append(name)
    axes.set_yticks(range(len(names)), [f"{name} *" if name == one.first else name for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    way = "higher" if one.objective.higher_is_better else "lower"
    axes.set_xlabel(f"{one.objective.label} ({way} is better)", fontsize=9)
    axes.set_title(f"{one.workload} (* recommended)", fontsize=10, loc="left")
    axes.grid(alpha=0.3, axis="x")


def _gains(axes: Any, one: Compared) -> None:
    rounds = one.rounds()
    others = [name for name in rounds if name != one.first]
    for place, name in enumerate(others):
        found = gain(one.objective, rounds[one.first], rounds[name])
        if math.isfinite(found.ratio) and found.ratio > 0:
            span = [[found.ratio - found.low], [found.high - found.ratio]] if math.isfinite(found.high) else None
            axes.errorbar([found.ratio], [place], xerr=span, fmt="o", color=_COLOURS[found.verdict], capsize=3)
        else:
            axes.text(1, place, " requests failed", va="center", fontsize=8)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(others)), others, fontsize=8)
    axes.set_ylim(len(others) - 0.5, -0.5)
    axes.set_xlabel(f"times that {one.first} is better (1: equal)", fontsize=9)
    axes.grid(alpha=0.3, axis="x")


def _verdicts(one: Compared) -> list[str]:
    rounds = one.rounds()
    rows = ["<tr><th>profile<th>options<th>objective, rounds<th>mean<th>recommended is better by<th>95 %<th>verdict"]
    for contender in one.contenders:
        name, mine = contender.name, rounds[contender.name]
        options = ", ".join(f"{key}={value}" for key, value in contender.options.items())
        cells = [name, options, ", ".join(f"{value:.3g}" for value in mine), f"{geometric(mine):.4g}"]
        if name == one.first:
            cells += ["", "", "recommended"]
        else:
            found = gain(one.objective, rounds[one.first], mine)
            span = f"{found.low:.3f} to {found.high:.3f}" if math.isfinite(found.high) else "-"
            cells += [f"x {found.ratio:.3f}", span, f"{one.first} is {found.verdict}"]
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in cells))
    rows += [f"<tr><td>{html.escape(name)}<td colspan=6>{html.escape(why)}" for name, why in one.failed.items()]
    slo = f" SLO: {one.slo.ttft:g} s to the first token, {one.slo.tpot:g} s for each further one."
    meaning = one.objective.meaning + (slo if "SLO" in one.objective.meaning else "")
    cut = f"<p class=cut>Interrupted after {len(rounds[one.first])} rounds." if one.cut_short else ""
    table = f"<div class=wide><table>{''.join(rows)}</table></div>"
    return [f"<h2>{html.escape(one.workload)}</h2>{cut}<p>{html.escape(meaning)}</p>{table}"]


def _details(one: Compared) -> list[str]:
    runs = one.figures()
    tables = "".join(figures_table(f"{one.workload}: {name}", figures) for name, (figures, _) in runs.items())
    return [
        f"<details><summary>Latencies of every profile on {html.escape(one.workload)}</summary>{tables}</details>",
        *plots(runs),
    ]
