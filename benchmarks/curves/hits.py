"""What is found and what is left to compute over the memory: every policy, and the peers' cache managers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks import rows
from benchmarks.curves.page import Curve
from benchmarks.curves.picture import COLOURS, Sheet, markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CASES = (("flash", "literal"), ("flash", "session"), ("pro", "literal"))
LIMIT = 6000
LABELS = {"vllm-0.33.0": "vLLM 0.33", "sglang-0.5.23": "SGLang 0.5.23", "plain LRU line": "plain LRU, no windows"}
DASHES = {"vLLM": "s-", "SGLang": "s-", "plain LRU": ":", "belady": "--"}
Row = Mapping[str, Any]


def curve() -> Curve:
    """Rows of `peers`: Mooncake's conversation trace, the first 6,000 requests, the newest of each point."""
    points: dict[tuple[str, str, str, float], dict[str, Any]] = {}
    for row in rows.read("peers"):
        if row["limit"] == LIMIT:
            points[row["model"], row["tokens"], row["engine"], row["gib"]] = row
    if not points:
        return Curve("hits", _TITLE, "No rows of `peers` yet.", None)
    made_from = list(points.values())
    with Sheet(2, len(CASES), (11.5, 7.2)) as sheet:
        for column, (model, tokens) in enumerate(CASES):
            mine = [row for row in made_from if (row["model"], row["tokens"]) == (model, tokens)]
            found, left = sheet.axes[0][column], sheet.axes[1][column]
            _draw(found, left, mine)
            found.set_title(f"V4-{model.capitalize()}, {tokens}")
        sheet.axes[0][0].set_ylabel("prompt tokens not run at all, %")
        sheet.axes[1][0].set_ylabel("work left, % of all prompt tokens")
        handles, labels = sheet.axes[0][0].get_legend_handles_labels()
        sheet.figure.legend(handles, labels, loc="outside upper center", ncols=5)
        picture = sheet.finish(made_from, ["Hit rates do not depend on the machine."])
    return Curve("hits", _TITLE, _text(made_from), picture)


_TITLE = "Hit rate and computed share over memory"


def label_of(row: Row) -> str:
    """The engine or policy as the picture names it."""
    engine = str(row["engine"])
    return LABELS.get(engine, engine.removeprefix("triptych "))


def left_of(row: Row) -> float:
    """What is left to compute, as a share; of a peer all that it did not hit."""
    share = row.get("computed_share")
    return float(1.0 - row["hit_rate"] if share is None else share)


def _draw(found: Axes, left: Axes, mine: Sequence[Row]) -> None:
    from matplotlib.ticker import NullLocator

    memories = sorted({row["gib"] for row in mine})
    for label in sorted({label_of(row) for row in mine}):
        points = sorted((row["gib"], row["hit_rate"], left_of(row)) for row in mine if label_of(row) == label)
        family = next((name for name in COLOURS if label.startswith(name)), label)
        style = {"color": COLOURS.get(family), "label": label, "linewidth": 2.2 if label == "adaptive" else 1.2}
        shape = DASHES.get(family, "o-")
        found.plot([p[0] for p in points], [100 * p[1] for p in points], shape, **style)
        left.plot([p[0] for p in points], [100 * p[2] for p in points], shape, **style)
    ideal = next(row["ideal_hit_rate"] for row in mine if row.get("ideal_hit_rate"))
    found.axhline(100 * ideal, color="#9ca3af", linewidth=0.8)
    left.axhline(100 * (1 - ideal), color="#9ca3af", linewidth=0.8)
    for axes in (found, left):
        axes.set_xscale("log", base=2)
        axes.set_xticks(memories, [f"{memory:g}" for memory in memories])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("cache memory, GiB")


def _text(points: Sequence[Row]) -> str:
    tables = []
    for model, tokens in CASES:
        mine = [row for row in points if (row["model"], row["tokens"]) == (model, tokens)]
        memories = sorted({row["gib"] for row in mine})
        cells = {(label_of(row), row["gib"]): f"{100 * row['hit_rate']:.1f} / {100 * left_of(row):.1f}" for row in mine}
        labels = sorted({label_of(row) for row in mine}, key=lambda label: (label != "adaptive", label))
        head = (f"V4-{model.capitalize()}, {tokens}", *(f"{memory:g} GiB" for memory in memories))
        tables.append(
            markdown_table(head, [(label, *(cells.get((label, m), "–") for m in memories)) for label in labels])
        )
    joined = "\n\n".join(tables)
    return f"""Hit % / work left %, Mooncake's conversation trace, first {LIMIT:,} requests, 16 in flight:

{joined}

`literal` cuts every turn at a multiple of 512 tokens, `session` lets next turns carry on the answer; real traffic lies
nearer to the second ([traces.md](traces.md)). A token that runs again in some layers to rebuild windows is no hit; in
*work left* it counts by the share of layers. The grey line is what an infinite cache would do; `belady` knows the
future. `bounded` is approximate. Plain LRU pays for entries only and never lacks a window. What was tried for retention
is in [log.md](log.md).
"""
