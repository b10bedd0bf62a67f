"""The candidates of a fit: first token over throughput, and the objective over memory, as PNG or SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from triptych.pictures import logarithmic, panels
from triptych.workload.fit import Fit, Outcome
from triptych.workload.objectives import Objective

_NEAR = 12  # pixels within which names would cover each other


def draw(path: Path, title: str, found: Fit, objective: Objective) -> None:
    """Draw into `path`. ConfigError without matplotlib."""
    with panels(path, title, 2, (12, 5)) as (left, right):
        usable = [one for one in found.outcomes if not one.refused]
        groups: tuple[tuple[str, list[Outcome], str], ...] = (
            ("candidate", [one for one in usable if not one.front and not one.shipped], "#bbbbbb"),
            ("Pareto front", [one for one in usable if one.front and not one.shipped], "#2a9d8f"),
            ("shipped profile", [one for one in usable if one.shipped], "#e76f51"),
        )
        for label, some, colour in groups:
            left.plot(*_points(some, "requests_per_s", "ttft_p95_s"), "o", color=colour, label=label)
            right.plot(*_points(some, "peak_bytes", "objective"), "o", color=colour, label=label)
        best = [found.recommended]
        for axes, x, y in ((left, "requests_per_s", "ttft_p95_s"), (right, "peak_bytes", "objective")):
            axes.plot(*_points(best, x, y), "*", color="black", markersize=14, label=f"recommended: {best[0].name}")
            axes.set_yscale("log")
            logarithmic(axes.yaxis)
            _name(axes, groups[2][1], x, y)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
        left.set_xlabel("requests a second")
        left.set_ylabel("95th percentile of the first token, s")
        right.set_xlabel("peak memory of all caches, GiB")
        right.set_ylabel(f"{objective.label} ({'higher' if objective.higher_is_better else 'lower'} is better)")


def _name(axes: Any, some: list[Outcome], x: str, y: str) -> None:
    """Write the names of `some` beside their points, towards the middle; points that lie together share a line."""
    left, right = axes.get_xlim()
    together: list[tuple[Any, tuple[float, float], list[str]]] = []
    for one in some:
        [at_x], [at_y] = _points([one], x, y)
        place = axes.transData.transform((at_x, at_y))
        for other, _, names in together:
            if max(abs(place - other)) < _NEAR:
                names.append(one.name)
                break
        else:
            together.append((place, (at_x, at_y), [one.name]))
    for _, point, names in together:
        way = -1 if point[0] > (left + right) / 2 else 1
        side = "right" if way < 0 else "left"
        axes.annotate(", ".join(names), point, textcoords="offset points", xytext=(9 * way, -3), ha=side, fontsize=8)


def _points(some: list[Outcome], x: str, y: str) -> tuple[list[float], list[float]]:
    unit = 2**30 if x == "peak_bytes" else 1.0
    return [(one.figures[x] or 0.0) / unit for one in some], [one.figures[y] or 0.0 for one in some]
