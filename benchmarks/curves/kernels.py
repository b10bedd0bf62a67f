"""docs/gpu.md: what the kernels of a decode step take, from the newest rows of gpu_table.

Rows of one commit are one table that was made in several runs. Figures of vendors' kernels that were not in these runs
come from the row of gpu_peers and are marked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks import rows
from benchmarks.curves.page import wrapped
from benchmarks.curves.picture import markdown_table, origins

LAUNCH = 1.2
"""Microseconds of an empty kernel in a CUDA graph on an H200: less nothing takes."""
BATCHES = (1, 8, 32, 64, 128)
CONTEXTS = ("any", "8K", "128K", "1M")
MODELS = {"flash": "V4-Flash", "pro": "V4-Pro"}
SECTIONS: dict[str, dict[str, str]] = {
    "Attention": {
        "attend csa": "CSA, window and chosen entries, any context",
        "attend hca": "HCA, window and all entries",
        "attend swa": "window only",
    },
    "Index scores and top-k": {"select fp8": "FP8 keys", "select mxfp4": "MXFP4 keys"},
    "Mixture of experts": {"experts": "router, routed and shared experts"},
    "Products": {
        "linear front CSA": "front projections, CSA",
        "linear front HCA": "front projections, HCA",
        "linear query CSA": "queries and index queries, CSA",
        "linear query HCA": "queries, HCA",
        "linear o_a": "outputs, grouped",
        "linear o_b": "outputs, together",
    },
    "Between the products": {
        "mhc_rows": "hyper-connections, a site",
        "mhc_first": "the first site, with embedding",
        "mhc_last": "the last, with head",
        "front_rows SWA": "norms, rotations, window rows: window only",
        "front_rows CSA": "the same, CSA",
        "front_rows CSA entry": "CSA, where all rows end a group",
        "front_rows HCA": "the same, HCA",
        "front_rows HCA entry": "HCA, where all rows end a group",
    },
}
GOALS = {
    **{("flash", "attend csa", "any", 1): 8, ("flash", "attend csa", "any", 64): 22},
    **{("flash", "attend hca", "1M", 1): 16, ("flash", "attend hca", "1M", 64): 160},
    **{("flash", "select fp8", "1M", 1): 15, ("flash", "select fp8", "1M", 64): 600},
    ("flash", "select mxfp4", "1M", 64): 340,
    **{("flash", "experts", "any", 1): 40, ("flash", "experts", "any", 64): 760},
}
"""Microseconds that the project aims at; of experts, for the routed ones alone."""
VENDORS = {"by_flash_mla_us": "with FlashMLA", "flash_mla_us": "FlashMLA's call alone"}
Key = tuple[str, str, str, int]
Line = Mapping[str, Any]

HEAD = """# What a decode step's kernels take on one H200

Written by `make bench` from the rows of `gpu_table` in [benchmarks/results](../benchmarks/results); do not edit.

    python -m benchmarks.gpu.table              # measure, on an H200: seconds, once kernels are compiled
    make bench                                  # write this page again from the rows

Which kernel serves what, and why, is in [kernels.md](kernels.md); whole steps and prompts beside vLLM's are in
[curves.md](curves.md#prefill-and-decode-over-the-context).
"""


def page() -> str:
    """The whole document."""
    lines, used = newest()
    if not lines:
        return f"{HEAD}\nThere are no rows of `gpu_table` yet: run the first command on an H200, then the second.\n"
    peers = {key_of(line): line for row in rows.read("gpu_peers") for line in row["table"]}
    parts = [HEAD, wrapped(_about(lines, used, peers)) + "\n"]
    for model, name in MODELS.items():
        parts.append(f"## {name}\n")
        for title, ops in SECTIONS.items():
            blocks = [row for op, what in ops.items() for row in _blocks(model, op, what, lines, peers)]
            if blocks:
                parts.append(f"{markdown_table((title, 'us', *map(str, BATCHES)), blocks)}\n")
        if len(parts[-1]) < len(f"## {name}\n") + 1:
            parts.append(f"Not measured at this commit: `python -m benchmarks.gpu.table --models {model}`.\n")
    return "\n".join(parts)


def newest() -> tuple[dict[Key, Line], list[Line]]:
    """The lines measured at the commit of the newest row, the newest of each case, and the rows that they are from."""
    every = rows.read("gpu_table")
    used = [row for row in every if row["commit"] == every[-1]["commit"]]
    return {key_of(line): line for row in used for line in row["table"]}, used


def key_of(line: Line) -> Key:
    """Which case it is."""
    return line["model"], line["op"], line["context"], line["batch"]


def fastest(line: Line, peer: Line | None) -> bool | None:
    """Whether no vendor's kernel took less for the same job; None where there is none to compare with."""
    theirs = [one for one in (line.get("by_flash_mla_us"), peer["us"] if peer else None) if one is not None]
    return line["us"] <= min(theirs) if theirs else None


def _about(lines: Mapping[Key, Line], used: Sequence[Line], peers: Mapping[Key, Line]) -> str:
    compared = [fastest(line, peers.get(key)) for key, line in lines.items()]
    won, asked = compared.count(True), len(compared) - compared.count(None)
    wanted = {key: goal for key, goal in GOALS.items() if key in lines}
    met = sum(lines[key]["us"] <= goal for key, goal in wanted.items())
    absent = sorted({name for row in used for name in (*row["missing"], *row["failed"])} - set(map(_name, lines)))
    rest = (
        f" Not measured: {len(absent)} cases, {', '.join(absent[:6])}{', …' if absent[6:] else ''}." if absent else ""
    )
    made = "\n".join(f"- {origin.line()}" for origin in origins(used))
    return f"""Microseconds of one layer's operation for a step of 1 to 128 rows, all launches of it; rows are as far as
each other into their sequences. Medians of CUDA graphs over inputs of more bytes than the L2 holds; random weights in
the released formats, uniform routing.

- *floor*: the larger of bytes that must be read or written over 4.42 TB/s, operations over 757 (BF16) or 1,475 (FP8)
TFLOP/s, and one launch, {LAUNCH} us; in brackets its share of our time.
- *with FlashMLA*: our function with DeepSeek's kernel doing the work and our launches around it, in the same run; its
call alone gets queries that are normed and rotated, and leaves the result rotated. Where FlashMLA is installed the
engine uses it for the shapes that [kernels.md](kernels.md) names.
- † not in these runs, but measured beforehand on another H200 with vLLM 0.26.0's kernels: index scores of rounded
queries by DeepGEMM and its top-k, and routed experts alone by Marlin, where ours has router and shared expert, too.
- **Bold**: ours, where no vendor's kernel took less for the same job. That is so in {won} of the {asked} cases that
have a vendor's figure; {met} of {len(wanted)} goals are met.{rest}

Measured on:

{made}"""


def _name(key: Key) -> str:
    """As gpu.table names a case."""
    model, op, context, batch = key
    return f"{model} {op}{'' if context == 'any' else f' at {context}'} x {batch}"


def _blocks(
    model: str, op: str, what: str, lines: Mapping[Key, Line], peers: Mapping[Key, Line]
) -> Iterator[tuple[str, ...]]:
    """The rows of an operation's table: ours, its floor, vendors and the goal, at each context."""
    for context in CONTEXTS:
        keys = [(model, op, context, batch) for batch in BATCHES]
        mine = [lines.get(key) for key in keys]
        if not any(mine):
            continue
        theirs = [peers.get(key) for key in keys]
        yield what if context == "any" else f"{what}, {context}", "ours", *map(_ours, mine, theirs)
        yield "", "floor", *map(_floor, mine)
        for field, name in VENDORS.items():
            yield from _line(name, [one[field] if one and field in one else None for one in mine])
        yield from _line(_named(theirs), [one["us"] if one else None for one in theirs])
        goals = [GOALS.get(key) for key in keys]
        if any(goals):
            yield "", "goal", *(f"≤ {goal}" if goal else "" for goal in goals)


def _named(peers: Sequence[Line | None]) -> str:
    return next((f"{peer['by']} †" for peer in peers if peer), "")


def _line(name: str, found: Sequence[float | None]) -> Iterator[tuple[str, ...]]:
    if any(one is not None for one in found):
        yield "", name, *map(_us, found)


def _ours(line: Line | None, peer: Line | None) -> str:
    if line is None:
        return "–"
    return f"**{_us(line['us'])}**" if fastest(line, peer) else _us(line["us"])


def _floor(line: Line | None) -> str:
    if line is None:
        return "–"
    floor = max(LAUNCH, line["floor_us"])
    return f"{_us(floor)} ({floor / line['us']:.0%})"


def _us(us: float | None) -> str:
    if us is None:
        return "–"
    return f"{us:,.0f}" if us >= 100 else f"{us:.1f}"
