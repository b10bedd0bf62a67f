"""Prefill and decode over the context: the bundled checkpoint on a processor, layers of V4-Flash on an H200."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from benchmarks import rows
from benchmarks.curves.page import Curve
from benchmarks.curves.picture import COLOURS, Sheet, by_length, markdown_table
from triptych.config import SHAPES
from triptych.planner.hardware import catalogue
from triptych.planner.layout import layout_for
from triptych.planner.models import PlannedModel, of_shape
from triptych.planner.roofline import decode_step, prefill

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LAYERS = 20
VLLM_PREFILL = {8192: 24.2, 65536: 23.4, 262144: 20.4}
"""Thousand prompt tokens a second of vLLM 0.26.0, one H200, the same 20 layers, chunks of 8,192."""
VLLM_DECODE = {
    **{(1, 8192): 4.21, (1, 65536): 4.26, (1, 1048000): 4.57, (4, 1048000): 6.77, (16, 8192): 8.61},
    **{(16, 65536): 12.32, (16, 262144): 12.83, (64, 8192): 19.40, (64, 65536): 26.57},
}
"""Milliseconds a step, medians, by requests and context, of the same run. With 8K contexts and random weights a batch
may hit few experts, so these two are too good."""
BATCHES = {1: "#1b7f6b", 4: "#7c3aed", 16: "#2563eb", 64: "#c2410c"}
CONTEXTS = [1 << n for n in range(10, 21)]
Row = Mapping[str, Any]


def curve() -> Curve:
    """Rows of context_throughput, cpu_vs_transformers, gpu_decode and gpu_prefill, the newest of each point."""
    tiny = [row for row in rows.read("context_throughput") if row["model"] == "tiny"][-1:]
    against = [row for row in rows.read("cpu_vs_transformers") if row["threads"] == 1][-1:]
    prefills, prefill_rows = newest_points("gpu_prefill", ("context",))
    decodes, decode_rows = newest_points("gpu_decode", ("batch", "context"))
    exact, exact_rows = newest_points("gpu_decode", ("batch", "context"), deterministic=True)
    made_from = [*tiny, *against, *prefill_rows, *decode_rows, *(row for row in exact_rows if row not in decode_rows)]
    with Sheet(2, 2, (11, 7.6)) as sheet:
        (cpu_prefill, card_prefill), (cpu_decode, card_decode) = sheet.axes
        _cpu(cpu_prefill, cpu_decode, tiny, against)
        _card_prefill(card_prefill, prefills)
        _card_decode(card_decode, decodes)
        picture = sheet.finish(
            made_from,
            ["Crosses: vLLM 0.26.0 on another H200, same layers, measured beforehand. Dashed there: planner's floor."],
        )
    return Curve("throughput", "Prefill and decode over the context", _text(tiny, prefills, decodes, exact), picture)


def newest_points(
    name: str, keys: tuple[str, ...], *, deterministic: bool = False
) -> tuple[dict[Any, dict[str, Any]], list[Row]]:
    """Of the tables in rows of `name` with LAYERS layers the newest line for each point, and the rows they are from.

    `deterministic`: of that mode, else of the usual one."""
    found: dict[Any, tuple[dict[str, Any], Row]] = {}
    for row in rows.read(name):
        for line in row.get("table", ()):
            same = line["layers"] == LAYERS and line.get("model", "flash") == "flash"
            if same and bool(line.get("deterministic")) == deterministic:
                found[tuple(line[key] for key in keys)] = line, row
    used = [row for _, row in found.values()]
    return {point: line for point, (line, _) in found.items()}, [row for row in rows.read(name) if row in used]


def layers_of_flash() -> PlannedModel:
    """The layers that ran on the card, for floors."""
    shape = replace(SHAPES["flash"], ratios=SHAPES["flash"].ratios[:LAYERS], num_mtp_layers=0)
    return of_shape(f"{LAYERS} layers of Flash", shape, "fp8", None, "released")


def _cpu(prefills: Axes, decodes: Axes, tiny: Sequence[Row], against: Sequence[Row]) -> None:
    for row in tiny:
        found = {int(at): one for at, one in row["prefill"].items()}
        prefills.plot(
            list(found), [one["cpu_tok_s"] for one in found.values()], "o-", color=COLOURS["adaptive"],
            label="tiny (8 layers), whole prompt",
        )  # fmt: skip
        for batch, colour in (("1", BATCHES[1]), ("8", BATCHES[16])):
            points = {int(at): int(batch) / one[batch]["cpu_ms"] * 1e3 for at, one in row["decode"].items()}
            decodes.plot(list(points), list(points.values()), "o-", color=colour, label=f"tiny, {batch} at once")
    for row in against:
        for side, colour in (("triptych", "#111827"), ("transformers", "#db2777")):
            ends = {int(stretch.split("-")[1]): one[side]["cpu_tok_s"] for stretch, one in row["prefill"].items()}
            label = f"26M random, {'ours' if side == 'triptych' else 'Transformers'}"
            prefills.plot(list(ends), list(ends.values()), "s--", color=colour, label=f"{label}, stretch up to here")
            steps = {int(at): 1e3 / one[side]["cpu_ms"] for at, one in row["decode"].items()}
            decodes.plot(list(steps), list(steps.values()), "s--", color=colour, label=label)
    prefills.set_title("Prefill, one thread of a processor, float32")
    decodes.set_title("Decode, one thread of a processor, float32")
    prefills.set_ylabel("prompt tokens / CPU second")
    decodes.set_ylabel("output tokens / CPU second, all requests")
    for axes in (prefills, decodes):
        _finish(axes)


def _card_prefill(axes: Axes, points: Mapping[Any, Row]) -> None:
    known = sorted((context, line["ktokens_s"] * 1e3) for (context,), line in points.items())
    axes.plot([c for c, _ in known], [r for _, r in known], "o-", color=COLOURS["adaptive"], label="ours, measured")
    axes.plot(list(VLLM_PREFILL), [1e3 * rate for rate in VLLM_PREFILL.values()], "x", color=COLOURS["vLLM"],
              markersize=6, label="vLLM 0.26.0")  # fmt: skip
    model, device = layers_of_flash(), catalogue().devices["h200"]
    floor = [prefill(model, device, layout_for(model, 1), 0, at, min(at, 8192)).tokens_per_second for at in CONTEXTS]
    axes.plot(CONTEXTS, floor, "--", color="#6b7280", label="floor by the data sheet")
    axes.set_title(f"Prefill of a whole prompt, {LAYERS} layers of V4-Flash, one H200")
    axes.set_ylabel("prompt tokens / second")
    _finish(axes)


def _card_decode(axes: Axes, points: Mapping[Any, Row]) -> None:
    model, device = layers_of_flash(), catalogue().devices["h200"]
    for batch, colour in BATCHES.items():
        mine = sorted((context, batch / line["ms"] * 1e3) for (b, context), line in points.items() if b == batch)
        theirs = sorted((context, batch / ms * 1e3) for (b, context), ms in VLLM_DECODE.items() if b == batch)
        floor = [
            batch / decode_step(model, device, layout_for(model, 1), batch, context).seconds for context in CONTEXTS
        ]
        axes.plot(CONTEXTS, floor, "--", color=colour, linewidth=0.9)
        axes.plot([c for c, _ in mine], [r for _, r in mine], "o-", color=colour, label=f"{batch} at once")
        axes.plot([c for c, _ in theirs], [r for _, r in theirs], "x", color=colour, markersize=6)
    axes.set_title(f"Decode, {LAYERS} layers of V4-Flash, one H200")
    axes.set_ylabel("output tokens / second, all requests")
    _finish(axes)


def _finish(axes: Axes) -> None:
    from matplotlib.ticker import NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_ylim()
    axes.set_ylim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)))
    axes.set_xlabel("tokens of context")
    by_length(axes)
    axes.legend()


def _text(
    tiny: Sequence[Row], prefills: Mapping[Any, Row], decodes: Mapping[Any, Row], exact: Mapping[Any, Row]
) -> str:
    lines = [
        (
            f"prefill of {context:,}",
            f"{line['ktokens_s'] * 1e3:,.0f} tok/s",
            f"{1e3 * VLLM_PREFILL[context]:,.0f} tok/s" if context in VLLM_PREFILL else "–",
            f"{line['measured']}, {line.get('chunk', 8192):,} rows each",
        )
        for (context,), line in sorted(prefills.items())
    ]
    lines += [
        (
            f"decode, {batch} x {context:,}",
            f"{line['ms']:.2f} ms",
            f"{VLLM_DECODE[batch, context]:.2f} ms" if (batch, context) in VLLM_DECODE else "–",
            f"graph alone {line['graph_ms']:.2f} ms",
        )
        for (batch, context), line in sorted(decodes.items())
    ]
    lines += [
        (f"the same in deterministic mode, {batch} x {context:,}", f"{line['ms']:.2f} ms", "–", "")
        for (batch, context), line in sorted(exact.items())
    ]
    card = markdown_table((f"{LAYERS} layers, H200", "ours", "vLLM 0.26.0", ""), lines)
    cpu = "\n\n".join(_cpu_table(row) for row in tiny) or "No row of `context_throughput` yet."
    loads = [f"{row['load'][0][0]:g} to {row['load'][1][0]:g}" for row in tiny]
    return f"""{card}

{cpu}

On the card whole steps of the engine ran, with random weights and caches at full widths; where *n/m chunks* is given,
the others are interpolated. On the processor only the work at a place ran, behind a context of random rows, and a whole
prompt is summed from that; the machine had other work (load {", ".join(loads) or "unknown"}), so CPU time is shown. No
machine here holds all 43 layers.
"""


def _cpu_table(row: Row) -> str:
    prefills, decodes = row["prefill"], row["decode"]
    return markdown_table(
        ("tiny, one thread", *(f"{int(at):,}" for at in prefills)),
        [
            ("whole prompt, s of CPU", *(f"{one['cpu_s']:,.1f}" for one in prefills.values())),
            ("decode of 1, ms of CPU", *(f"{one['1']['cpu_ms']:.1f}" for one in decodes.values())),
            ("decode of 8", *(f"{one['8']['cpu_ms']:.1f}" for one in decodes.values())),
        ],
    )
