"""docs/gpu.md: what the kernels of a decode step take, from the newest rows of gpu_table of all groups.

Rows of one commit are one table that was made in several runs. Cases are counted by what the engine uses: its own
kernel, or a vendor's where the dispatcher chooses that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    "Index scores and top-k": {"select fp8": "index, FP8 keys", "select mxfp4": "index, MXFP4 keys"},
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
NOISE = 0.03
"""Of two runs of the same kernels half of the cases differed by less than 0.9 %, nine of ten by less than 2.6 %."""
_FLASH_MLA = {"by_flash_mla_us": "with FlashMLA", "flash_mla_us": "FlashMLA's call alone"}
_DEEP_GEMM = {"deep_gemm_us": "DeepGEMM"}
_FRONT = {"deep_gemm_us": "DeepGEMM, and cuBLAS for the rest"}
VENDORS: dict[str, dict[str, str]] = {
    **{"attend csa": _FLASH_MLA, "attend hca": _FLASH_MLA, "attend swa": _FLASH_MLA},
    "select fp8": {"by_deep_gemm_us": "with DeepGEMM and top-k", "deep_gemm_us": "their calls alone"},
    "experts": {"marlin_us": "Marlin, routed experts alone"},
    **{"linear front CSA": _FRONT, "linear front HCA": _FRONT},
    **{"linear query CSA": _DEEP_GEMM, "linear query HCA": _DEEP_GEMM, "linear o_b": _DEEP_GEMM},
    "linear o_a": {"deep_gemm_us": "DeepGEMM, of rounded rows"},
}
"""What rows call vendors' figures of an operation, the one for the same job first."""
Key = tuple[str, str, str, int]
Line = Mapping[str, Any]

HEAD = """# What a decode step's kernels take on one H200

Written by `make bench` from the rows of `gpu_table` in [benchmarks/results](../benchmarks/results); do not edit.

    python -m benchmarks.gpu.table --peers DIR  # measure, on an H200: a minute at most, once kernels are compiled
    make bench                                  # write this page again from the rows

Which kernel serves what, and why, is in [kernels.md](kernels.md); whole steps and prompts beside vLLM's are in
[curves.md](curves.md#prefill-and-decode-over-the-context).
"""


def page() -> str:
    """The whole document."""
    lines, used = newest()
    if not lines:
        return f"{HEAD}\nThere are no rows of `gpu_table` yet: run the first command on an H200, then the second.\n"
    parts = [HEAD, wrapped(_about(lines, used)) + "\n", *_behind(lines), *_overtaken(lines)]
    for model, name in MODELS.items():
        parts.append(f"## {name}\n")
        for title, ops in SECTIONS.items():
            blocks = [row for op, what in ops.items() for row in _blocks(model, op, what, lines)]
            if blocks:
                parts.append(f"{markdown_table((title, 'us', *map(str, BATCHES)), blocks)}\n")
        if len(parts[-1]) < len(f"## {name}\n") + 1:
            parts.append(f"Not measured at this commit: `python -m benchmarks.gpu.table --models {model}`.\n")
    parts.extend(_since(used))
    return "\n".join(parts)


def newest() -> tuple[dict[Key, Line], list[Line]]:
    """The lines measured at the commit of the newest row of all groups, the newest of each case, and the rows that they
    are from."""
    every = rows.read("gpu_table")
    whole = [row["commit"] for row in every if not _narrowed(row)]
    used = [row for row in every if row["commit"] in whole[-1:]]
    return {key_of(line): line for row in used for line in row["table"]}, used


def _narrowed(row: Line) -> bool:
    """Whether only some groups were asked for."""
    return "--only" in row["command"].split()


def _since(used: Sequence[Line]) -> Iterator[str]:
    """What runs of some groups have measured since the rows that the page is from."""
    if not used:
        return
    newer = [row for row in rows.read("gpu_table") if _narrowed(row) and row["time"] > used[-1]["time"]]
    found = {key_of(line): line for row in newer for line in row["table"]}
    if not found:
        return
    yield "## Measured since, some groups only\n"
    yield wrapped("\n".join(f"- {origin.line()}" for origin in origins(newer))) + "\n"
    order = sorted(found, key=lambda one: (list(MODELS).index(one[0]), one[1], CONTEXTS.index(one[2]), one[3]))
    cases: dict[tuple[str, str, str], list[str]] = {}
    for key in order:
        cases.setdefault(key[:3], []).append(f"{key[3]}: {_us(engine_us(found[key]))}")
    yield markdown_table(("case", "rows: us"), ((_title(*case), ", ".join(at)) for case, at in cases.items())) + "\n"


def key_of(line: Line) -> Key:
    """Which case it is."""
    return line["model"], line["op"], line["context"], line["batch"]


def engine_us(line: Line) -> float:
    """Microseconds of what the engine uses: ours, unless the row says that the dispatcher chose FlashMLA."""
    us: float = line["by_flash_mla_us"] if line.get("engine") == "FlashMLA" else line["us"]
    return us


def vendor_us(line: Line) -> float | None:
    """Microseconds of a vendor's kernel for the same job, ours around it where it does less; None if not measured."""
    return line.get(next(iter(VENDORS.get(line["op"], {})), ""))


def is_behind(line: Line) -> bool | None:
    """Whether the vendor's kernel takes less than what the engine uses, by more than noise; None if not measured."""
    theirs = vendor_us(line)
    return None if theirs is None else engine_us(line) > theirs * (1 + NOISE)


def _about(lines: Mapping[Key, Line], used: Sequence[Line]) -> str:
    compared = [is_behind(line) for line in lines.values()]
    level, asked = compared.count(False), len(compared) - compared.count(None)
    wanted = {key: goal for key, goal in GOALS.items() if key in lines}
    met = sum(engine_us(lines[key]) <= goal for key, goal in wanted.items())
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
- *with FlashMLA*: our function with DeepSeek's kernel doing the work and our launches around it; its call alone gets
queries that are normed and rotated, and leaves the result rotated. Where it is installed the engine uses it for the
shapes that [kernels.md](kernels.md) names.
- *with DeepGEMM and top-k*: DeepGEMM's index scores and vLLM's top-k of the same queries and keys, which lie in pages
of 64 for it, after our launch that rotates and rounds queries; their calls alone get rounded
queries.{_agreement(lines)}
- *Marlin*: vLLM's routed experts of the same rows and choices; ours has router and shared expert, too.
- *DeepGEMM* in products: the same FP8 rows and weights; the front's bfloat16 columns are cuBLAS's. Where the outputs'
groups are few enough ours rounds their results for the next product, too.
- Vendors' kernels ran in the same run as ours, or were *not in this run*: DeepGEMM, top-k and Marlin are those of vLLM
0.26.0, in a folder that `--peers` names.
- **Bold**: what the engine uses, where it takes no longer than the vendor's kernel for the same job, {NOISE:.0%}
counted as noise. That is so in {level} of the {asked} cases that have a vendor's figure; {met} of {len(wanted)} goals
are met.{rest}

Measured on:

{made}"""


def _agreement(lines: Mapping[Key, Line]) -> str:
    """How much of what vendors choose ours choose, too."""
    shares = {key: line["agrees"] for key, line in lines.items() if "agrees" in line}
    other = [key for key, share in shares.items() if share < 1]
    if not other:
        return " They choose the same entries." if shares else ""
    least = min(other, key=shares.__getitem__)
    return f""" They choose the same entries in {len(shares) - len(other)} of {len(shares)} cases, elsewhere at least
{shares[least]:.1%} of them ({_title(*least[:3])}, {least[3]} rows)."""


def _behind(lines: Mapping[Key, Line]) -> Iterator[str]:
    """The cases in which a vendor's kernel takes less than what the engine uses, and why it is not used."""
    order = sorted(lines, key=lambda one: (list(MODELS).index(one[0]), one[1], CONTEXTS.index(one[2]), one[3]))
    behind = {key: lines[key] for key in order if is_behind(lines[key])}
    if not behind:
        return
    cases: dict[tuple[str, str, str], list[str]] = {}
    for key, line in behind.items():
        ours, lost = engine_us(line), _lost(line)
        figures = f"{line['batch']}: {_us(ours)} / {_us(ours - lost)} (+{lost / (ours - lost):.0%})"
        cases.setdefault(key[:3], []).append(figures)
    yield "## Where a vendor's kernel takes less\n"
    table = ((_title(*case), ", ".join(figures)) for case, figures in cases.items())
    yield markdown_table(("case", "rows: us of what the engine uses / of the vendor's for the same job"), table) + "\n"
    yield wrapped("\n".join(f"- {why}" for why in _reasons(list(behind.values())))) + "\n"


def _overtaken(lines: Mapping[Key, Line]) -> Iterator[str]:
    """Cases in which the engine uses FlashMLA and ours would take less."""
    found = [
        f"{_title(*key[:3])}, {key[3]} rows: {_us(line['us'])} / {_us(engine_us(line))}"
        for key, line in lines.items()
        if engine_us(line) > line["us"] * (1 + NOISE)
    ]
    if found:
        yield wrapped(f"FlashMLA is used though ours takes less, us of ours / of it: {'; '.join(found)}.") + "\n"


def _lost(line: Line) -> float:
    theirs = vendor_us(line)
    assert theirs is not None
    return engine_us(line) - theirs


def _reasons(behind: Sequence[Line]) -> Iterator[str]:
    """Why the engine does not use what takes less, for each kind of operation that is behind."""

    def those(kind: str) -> list[Line]:
        return [line for line in behind if line["op"].startswith(kind)]

    if attention := those("attend"):
        yield f"""**Attention**: FlashMLA would save {_span(map(_lost, attention))} us. It is used for shapes where it
gained 7 us when that was last measured by itself, since up to 6 us of it were lost between the other kernels of a step:
[kernels.md](kernels.md#flashmla)."""
    if index := those("select"):
        own = _span(line["topk_us"] for line in index)
        theirs = _span(line["deep_gemm_us"] - line["deep_gemm_scores_us"] for line in index)
        yield f"""**Index**: DeepGEMM cannot serve, since it takes pages of 64 keys and ours are of 32. In these cases
our top-k takes {own} us of the time, vLLM's {theirs}; the rest is queries and scores."""
    if those("linear"):
        yield """**Products**: DeepGEMM has no adapter. It compiles its kernels by nvcc on the machine that serves, for
each shape and number of rows, and takes grouped outputs only of rounded rows, which ours reads as they are."""
    if those("experts"):
        yield "**Experts**: Marlin wants weights in an order of its own, and comes inside vLLM only."


def _span(found: Iterable[float]) -> str:
    every = list(found)
    return f"{min(every):.1f} to {max(every):.1f}"


def _title(model: str, op: str, context: str) -> str:
    what = next(ops[op] for ops in SECTIONS.values() if op in ops)
    return f"{MODELS[model].removeprefix('V4-')}, {what}" + ("" if context == "any" else f", {context}")


def _name(key: Key) -> str:
    """As gpu.table names a case."""
    model, op, context, batch = key
    return f"{model} {op}{'' if context == 'any' else f' at {context}'} x {batch}"


def _blocks(model: str, op: str, what: str, lines: Mapping[Key, Line]) -> Iterator[tuple[str, ...]]:
    """The rows of an operation's table: ours, its floor, vendors and the goal, at each context."""
    for context in CONTEXTS:
        keys = [(model, op, context, batch) for batch in BATCHES]
        mine = [lines.get(key) for key in keys]
        if not any(mine):
            continue
        yield what if context == "any" else f"{what}, {context}", "ours", *(_cell(line, "us") for line in mine)
        yield "", "floor", *map(_floor, mine)
        for field, name in VENDORS.get(op, {}).items():
            if any(line and field in line for line in mine):
                yield "", name, *(_cell(line, field) for line in mine)
            else:
                yield "", name, *("not in this run" if line else "–" for line in mine)
        goals = [GOALS.get(key) for key in keys]
        if any(goals):
            yield "", "goal", *(f"≤ {goal}" if goal else "" for goal in goals)


def _cell(line: Line | None, field: str) -> str:
    """A figure, bold where it is of what the engine uses and that is not behind the vendor's."""
    if line is None or field not in line:
        return "–"
    used = "by_flash_mla_us" if line.get("engine") == "FlashMLA" else "us"
    return f"**{_us(line[field])}**" if field == used and is_behind(line) is False else _us(line[field])


def _floor(line: Line | None) -> str:
    if line is None:
        return "–"
    floor = max(LAUNCH, line["floor_us"])
    return f"{_us(floor)} ({floor / line['us']:.0%})"


def _us(us: float) -> str:
    return f"{us:,.0f}" if us >= 100 else f"{us:.1f}"
