"""python -m benchmarks profiles [WORKLOAD ...]: the shipped profiles against each other, a row for each workload.

The same as `triptych profile compare`: each workload is fitted on draws of its own, then every profile runs on others,
in turns, on the bundled checkpoint on the processor. `--steps` are costs from `triptych profile measure`.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path

from benchmarks import rows
from triptych.cli.bench import machine
from triptych.cli.profile import run_comparisons
from triptych.engine.sizes import parse_size
from triptych.workload.compare import SETUPS, SPEED
from triptych.workload.compare_page import write_comparison
from triptych.workload.verdicts import objective_lines


def main(argv: list[str]) -> int:
    """Run, print, write rows and the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks profiles", description=__doc__)
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=", ".join(SETUPS))
    parser.add_argument("--steps", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu")
    parser.add_argument("--without", action="append", default=[], metavar="PROFILE", help="leave out; repeatable")
    parser.add_argument("--report", type=Path)
    parser.add_argument("--dry", action="store_true", help="write no row")
    given = parser.parse_args(argv)
    found = []
    names = tuple(given.workloads or SETUPS)
    before = rows.load_average()
    left_out = tuple(given.without)
    for one in run_comparisons(names, "tiny", given.steps, given.rounds, given.seed, given.clock, left_out):
        print(
            f"{one.workload}: {objective_lines(one.objective, one.rounds(), one.first)}", one.failed or "", flush=True
        )
        found.append(one)
        if not given.dry and not one.cut_short:
            setup = asdict(SETUPS[one.workload])
            memory = parse_size(setup.pop("memory"), "memory")
            trial = setup | {"kv_memory": memory, "rounds": given.rounds, "seed": given.seed, "clock": given.clock}
            trial |= {"without": left_out, "speed": SPEED, "ttft": one.slo.ttft, "tpot": one.slo.tpot}
            load = {"load_before": before, "load_after": rows.load_average()}
            rows.append("profiles", {"trial": trial, **one.to_dict(), **load}, kv_bytes={"triptych": memory}, threads=1)
    if given.report is not None:
        about = {"rounds": given.rounds, "clock": given.clock, "seed": given.seed, "cores": os.cpu_count()}
        write_comparison(given.report, found, about | machine() | {"command": "python -m benchmarks profiles"})
    return 0
