"""Tokens that fit by policy, and floors over the context length, as PNG or SVG."""

from __future__ import annotations

from pathlib import Path

from triptych.pictures import logarithmic, marked, panels
from triptych.pictures import tokens as short
from triptych.planner.plan import Plan


def draw(path: Path, plan: Plan) -> None:
    """Draw `plan` into `path`. ConfigError without matplotlib, or if the file cannot be written."""
    wanted = plan.wanted
    title = f"{wanted.model.name} on {wanted.node.describe()}, {wanted.layout.describe()}"
    with panels(path, title, 3, (14, 4.5)) as (tokens, decode, prefill):
        names = [fit.policy for fit in plan.fits]
        bars = tokens.barh(names, [fit.in_frames / 1e6 for fit in plan.fits])
        tokens.bar_label(bars, fmt="%.2f M", padding=3)
        tokens.margins(x=0.2)
        tokens.invert_yaxis()
        tokens.set_xlabel("tokens that fit, millions (whole node, in frames)")
        lengths = [row.tokens for row in plan.rows]
        decode.plot(lengths, [1e3 * row.alone.seconds for row in plan.rows], marker="o", label="1 request a group")
        decode.plot(lengths, [1e3 * row.batched.seconds for row in plan.rows], marker="o", label="all that run and fit")
        decode.set_ylabel("floor of a decode step, ms")
        decode.legend(fontsize=8)
        prefill.plot(lengths, [row.prefill_seconds for row in plan.rows], marker="o")
        prefill.set_ylabel("floor of a whole prefill, s")
        prefill.set_yscale("log")
        logarithmic(prefill.yaxis)
        decode.set_ylim(bottom=0)
        for axes in (decode, prefill):
            axes.set_xlabel("context, tokens")
            axes.set_xscale("log", base=2)
            marked(axes.xaxis, lengths, short)
            axes.grid(alpha=0.3)
