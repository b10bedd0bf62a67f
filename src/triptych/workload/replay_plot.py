"""Hit rate and computed share over memory, one line per policy, as PNG or SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from triptych.pictures import marked, panels


def draw(path: Path, title: str, points: Sequence[tuple[float, dict[str, Any]]]) -> None:
    """Draw results (GiB, ReplayResult.to_dict()) into `path`. ConfigError without matplotlib."""
    with panels(path, title, 2, (11, 4.5)) as (hits, work):
        for policy in dict.fromkeys(result["policy"] for _, result in points):
            mine = sorted((point for point in points if point[1]["policy"] == policy), key=lambda point: point[0])
            memories = [memory for memory, _ in mine]
            style = "--" if policy == "belady" else "-"
            hits.plot(memories, [100 * r["hit_rate"] for _, r in mine], style, marker="o", label=policy)
            work.plot(memories, [100 * r["computed_share"] for _, r in mine], style, marker="o", label=policy)
        hits.axhline(100 * points[0][1]["ideal_hit_rate"], color="grey", linewidth=0.8, label="infinite cache")
        for axes, label in ((hits, "tokens not run (% of prompt)"), (work, "work left (% of prompt)")):
            axes.set_xlabel("cache memory, GiB")
            axes.set_ylabel(label)
            axes.set_xscale("log", base=2)
            marked(axes.xaxis, sorted({memory for memory, _ in points}), "{:g}".format)
            axes.grid(alpha=0.3)
        hits.legend(fontsize=8)
