"""python -m benchmarks curves: docs/curves.md with its pictures and docs/gpu.md, from the rows in results/.

What `make bench` does. Nothing is measured, so it takes seconds and gives the same bytes for the same rows everywhere.
`--measure` first runs what this machine can measure of it, on a processor, and appends rows.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from benchmarks.curves import footprint, hits, kernels, prefixes, profiles, throughput
from benchmarks.curves.page import Curve

DOCS = Path(__file__).resolve().parents[2] / "docs"
CURVES = (footprint, throughput, hits, profiles, prefixes)
MEASURED = (
    ("kv_capacity", "--model", "flash"),
    ("kv_capacity", "--model", "pro"),
    ("context_throughput",),
    ("prefix_policy",),
    ("prefix_policy", "--spot"),
)
"""What a processor alone can measure. The others: `cpu_vs_transformers` (Transformers), `peers` (a trace and the peers'
wheels), `gpu.decode`, `gpu.prefill` and `gpu.table` (an H200)."""

HEAD = """# Four curves, and which windows to keep

Written by `make bench` from the rows in [benchmarks/results](../benchmarks/results); do not edit. Every picture names
machine, commit and command.

    make bench                                  # draw this page again from the rows
    make bench ARGS="curves --measure"          # measure first what a processor can: half an hour
"""


def main(argv: list[str]) -> int:
    """Measure if asked to, then write pages and pictures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks curves", description=__doc__)
    parser.add_argument("--measure", action="store_true", help="run the benchmarks that need no GPU first")
    given = parser.parse_args(argv)
    if given.measure:
        for name, *options in MEASURED:
            print(f"--- {name} {' '.join(options)}", flush=True)
            sys.argv[1:] = [name, *options]  # rows name the command
            importlib.import_module(f"benchmarks.{name}").main(options)
    drawn = [module.curve() for module in CURVES]
    (DOCS / "curves").mkdir(exist_ok=True)
    for curve in drawn:
        if curve.picture is not None:
            (DOCS / "curves" / f"{curve.name}.svg").write_text(curve.picture.svg, encoding="utf-8")
    (DOCS / "curves.md").write_text(page(drawn), encoding="utf-8")
    (DOCS / "gpu.md").write_text(kernels.page(), encoding="utf-8")
    print(f"wrote {DOCS / 'curves.md'}, {DOCS / 'gpu.md'} and {sum(one.picture is not None for one in drawn)} pictures")
    return 0


def page(drawn: list[Curve]) -> str:
    """The whole document."""
    return "\n".join([HEAD, *(curve.section() for curve in drawn)])
