"""Which prefix policy is best: full, periodic, none, adaptive over length, reuse and tier, and where they cross."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from benchmarks import rows
from benchmarks.curves.page import Curve
from benchmarks.curves.picture import COLOURS, Sheet, markdown_table
from triptych.config import PAGE
from triptych.planner.capacity import Usage, memory_of
from triptych.planner.cost import DISK_MONTH, DRAM_MONTH
from triptych.planner.hardware import catalogue
from triptych.planner.layout import layout_for
from triptych.planner.models import model_named
from triptych.planner.rates import prefill_rates

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAIRS = (
    ("full", "adaptive"),
    ("none", "adaptive"),
    ("full", "none"),
    ("full", "periodic:1024"),
    ("periodic:1024", "periodic:8192"),
    ("periodic:8192", "none"),
)
TIE = 0.03
"""Costs that differ by less are called equal."""
_TITLE = "Which windows to keep: prefix policies against each other"
Row = Mapping[str, Any]
Cells = dict[tuple[str, str, int, float, str], dict[str, Any]]


def curve() -> Curve:
    """Rows of `prefix_policy`: the newest of each cell."""
    found = rows.read("prefix_policy")
    replays = [row for row in found if row["part"] == "replay" and row["model"] == "flash"]
    spots = [row for row in found if row["part"] == "spot"][-1:]
    if not replays:
        return Curve("prefixes", _TITLE, "No rows of `prefix_policy` yet.", None)
    cells: Cells = {}
    for row in replays:
        for cell in row["cells"]:
            cells[cell["scenario"], cell["tier"], cell["length"], cell["pressure"], cell["policy"]] = cell
    lengths = sorted({length for _, tier, length, _, _ in cells if tier == "device"})
    with Sheet(2, len(lengths), (12, 6.4)) as sheet:
        for axes, scenario in zip(sheet.axes, ("shared", "turns"), strict=True):
            for one, length in zip(axes, lengths, strict=True):
                _draw(one, cells, scenario, length)
                one.set_title(f"{_NAMES[scenario]}, {length // 1024}K")
            axes[0].set_ylabel("ms that a returning prompt waits for")
        for one in sheet.axes[-1]:
            one.set_xlabel("pressure: live pages / memory")
        handles, labels = sheet.axes[0][0].get_legend_handles_labels()
        sheet.figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
        picture = sheet.finish(
            [*replays, *spots],
            [f"V4-Flash FP8, all in device memory; time by the planner's rates for {replays[-1]['hardware']}."],
        )
    return Curve("prefixes", _TITLE, _text(cells, lengths, replays[-1], spots), picture)


_NAMES = {"shared": "shared text", "turns": "conversations"}


def series(cells: Cells, scenario: str, tier: str, length: int, policy: str) -> list[tuple[float, float]]:
    """(pressure, seconds) of one policy."""
    return sorted(
        (pressure, cell["seconds"])
        for (s, t, n, pressure, p), cell in cells.items()
        if (s, t, n, p) == (scenario, tier, length, policy)
    )


def crossing(one: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]]) -> str:
    """In words where `one` is cheaper than `other`: below, above, everywhere, nowhere; crossings interpolated."""
    logs = [(x, math.log(a / b)) for (x, a), (_, b) in zip(one, other, strict=True)]
    clear = [(x, d) for x, d in logs if abs(d) > math.log1p(TIE)]
    if not clear:
        return "equal"
    if all(d < 0 for _, d in clear):
        return "everywhere" if len(clear) == len(logs) else f"nowhere dearer, by most at {min(clear, key=_second)[0]:g}"
    if all(d > 0 for _, d in clear):
        return "nowhere" if len(clear) == len(logs) else f"nowhere cheaper, by most at {max(clear, key=_second)[0]:g}"
    places = []
    for (x, before), (y, after) in pairwise(clear):
        if (before < 0) != (after < 0):
            at = math.exp(math.log(x) + (math.log(y) - math.log(x)) * before / (before - after))
            places.append(f"{'below' if before < 0 else 'above'} **{at:.2g}**")
    return ", ".join(places)


def _second(pair: tuple[float, float]) -> float:
    return pair[1]


def _draw(axes: Axes, cells: Cells, scenario: str, length: int) -> None:
    from matplotlib.ticker import NullFormatter, NullLocator

    pressures: list[float] = []
    for policy in ("full", "periodic:1024", "periodic:8192", "none", "adaptive"):
        points = series(cells, scenario, "device", length, policy)
        pressures = [x for x, _ in points]
        axes.plot(
            pressures, [1e3 * y for _, y in points], "o-", color=COLOURS[policy], label=policy,
            linewidth=2.2 if policy == "adaptive" else 1.2,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(pressures, [f"{x:g}" for x in pressures])
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    shown = [tick for tick in (5, 10, 20, 50, 100, 200, 500, 1000) if low <= tick <= high]
    axes.set_yticks(shown, [str(tick) for tick in shown])
    axes.yaxis.set_minor_formatter(NullFormatter())


def _text(cells: Cells, lengths: Sequence[int], row: Row, spots: Sequence[Row]) -> str:
    token, window = row["kv_bytes"]["page"] / PAGE, row["kv_bytes"]["snapshot"] / 1e6
    return f"""A token costs {token:,.0f} bytes, the windows that make one place resumable {window:.1f} MB. Keeping
all of them (`full`) makes every return free and the cache seven times smaller; keeping none recomputes at every return.
Which is better depends on how long the prefix is, how often it comes back, and how far away the cache lies. The real
cache manager replayed made-up traffic ([traffic.py](../benchmarks/prefix_policy/traffic.py)); what is left to do is
priced with the planner's prefill rate and each tier's latency and bandwidth.

- *shared text*: prompts that ask about one of many texts; nothing tells where the text ends. *conversations*: turns
  that repeat all before them.
- *pressure*: bytes of the pages of all live texts over those of the cache. At a pressure of 1 they would just fit,
  without any window. It is reuse frequency as a cache sees it: {_translated(lengths)}

**Where one becomes cheaper than the other**, in device memory, by pressure ("below 0.12": the first is cheaper below):

{_crossings(cells, lengths)}

{_against_adaptive(cells)}

**Below the device** (what a returning prompt waits for, fetch included; pressure on that tier; the best in bold):

{_below(cells)}

Tiers: {_tiers(row)}. Where a tier is slower than computing, nothing is fetched from it, and its figures are those of
the device above.

**Break-even by arithmetic** (what must hold for keeping to pay, by the planner):

{_break_even()}

{_spots(spots)}
"""


def _translated(lengths: Sequence[int]) -> str:
    """Pressure as time between two uses, on a node of the planner's."""
    node, model = catalogue().node("hgx-h200"), model_named("flash")
    cache = memory_of(model, node, layout_for(model, node.count), Usage()).cache
    every = [f"{cache / (n * model.attention.page_bytes / PAGE):,.0f} s for {n // 1024}K" for n in lengths]
    return (
        f"on 8 H200 ({cache / 1e9:.0f} GB for the cache) with one prompt a second, pressure 1 means that a text "
        f"comes back every {', '.join(every)}."
    )


def _crossings(cells: Cells, lengths: Sequence[int]) -> str:
    lines = []
    for scenario, name in _NAMES.items():
        for one, other in PAIRS:
            found = [
                crossing(series(cells, scenario, "device", n, one), series(cells, scenario, "device", n, other))
                for n in lengths
            ]
            lines.append((name, f"`{one}` cheaper than `{other}`", *found))
    return markdown_table(("", "", *(f"{n // 1024}K" for n in lengths)), lines)


def _against_adaptive(cells: Cells) -> str:
    """How `adaptive` does against the best of the others, cell by cell."""
    worst, best, behind, count = 0.0, 1.0, 0, 0
    for (scenario, tier, length, pressure, policy), cell in cells.items():
        if policy != "adaptive":
            continue
        others = [
            cells[scenario, tier, length, pressure, other]["seconds"]
            for other in ("full", "periodic:1024", "periodic:8192", "none")
        ]
        ratio = cell["seconds"] / min(others)
        worst, best, count = max(worst, ratio), min(best, ratio), count + 1
        behind += ratio > 1 + TIE
    return (
        f"`adaptive` against the best of the four others in each of all {count} cells, every tier included: in "
        f"{behind} it is over {TIE:.0%} dearer, at most {worst:.2f} times; at best it takes {best:.2f} of the time."
    ).replace("%", " %")


def _below(cells: Cells) -> str:
    lines = []
    places = {(scenario, tier, length) for scenario, tier, length, _, _ in cells if tier != "device"}
    for scenario, tier, length in sorted(places, key=lambda place: (place[0], _TIERS.index(place[1]), place[2])):
        points = {policy: dict(series(cells, scenario, tier, length, policy)) for policy in _SHOWN_BELOW}
        shown = []
        for pressure in points["full"]:
            costs = [points[policy][pressure] for policy in _SHOWN_BELOW]
            marks = ["**" if cost == min(costs) else "" for cost in costs]
            shown.append(" / ".join(f"{m}{1e3 * cost:.0f}{m}" for m, cost in zip(marks, costs, strict=True)))
        lines.append((_NAMES[scenario], tier, f"{length // 1024}K", *shown))
    pressures = sorted({pressure for _, tier, _, pressure, _ in cells if tier != "device"})
    head = (f"ms: {' / '.join(_SHOWN_BELOW)}", "tier", "length", *(f"pressure {one:g}" for one in pressures))
    return markdown_table(head, lines)


def _tiers(row: Row) -> str:
    known = [(name, tier) for name, tier in row["tiers"].items() if tier is not None]
    return ", ".join(
        f"{name} {tier['bandwidth'] / 1e9:g} GB/s after {1e3 * tier['latency']:g} ms" for name, tier in known
    )


_SHOWN_BELOW = ("full", "periodic:8192", "none", "adaptive")
_TIERS = ["host", "nvme", "network", "objects"]


def _break_even() -> str:
    lines = []
    for name, hardware in (("flash", "hgx-h200"), ("pro", "hgx-b200")):
        node, model = catalogue().node(hardware), model_named(name)
        token = prefill_rates(model, node.device)[0] / node.count
        rebuild = model.attention.rebuild(1 << 20)
        seconds, size = rebuild * token, model.attention.snapshot_bytes
        price = (node.device.price or (0.0, ""))[0] * node.count / 3600 * seconds
        chances = [
            size / 1e9 * month * hours / 720 / price
            for month, hours in ((DRAM_MONTH, 1), (DRAM_MONTH, 24), (DISK_MONTH, 72))
        ]
        lines.append((
            f"V4-{name.capitalize()}, {node.describe()}", f"{rebuild:,.0f} tokens' work, {1e3 * seconds:.0f} ms",
            f"{size / seconds / 1e6:,.0f} MB/s", f"{model.attention.page_bytes / PAGE / token / 1e6:,.0f} MB/s",
            *(f"{chance:.1%}".replace("%", " %") for chance in chances),
        ))  # fmt: skip
    head = ("", "rebuilding a window", "fetch a window from what beats", "fetch pages from what beats",
            "keep a window 1 h on the host if P(return) >", "24 h", "72 h on a disk")  # fmt: skip
    return markdown_table(head, lines) + (
        "\n\nA prefix shorter than what rebuilding costs is worth nothing without windows: `none` finds nothing there."
    )


def _spots(spots: Sequence[Row]) -> str:
    if not spots:
        return "No row of `prefix_policy --spot` yet."
    lines = [
        (_NAMES[cell["scenario"]], f"{cell['pressure']:g}", cell["policy"], f"{cell['cpu_ms']:,.0f}",
         f"{100 * cell['hit']:.1f} / {100 * cell['replayed_hit']:.1f}")
        for row in spots for cell in row["cells"]
    ]  # fmt: skip
    head = ("tiny, texts of 2K", "pressure", "policy", "ms of CPU a returning prompt", "hit %, engine / replay")
    return (
        "**In a real engine** (the bundled checkpoint, in process, one request after the other):\n\n"
        + markdown_table(head, lines)
    )
