"""python -m benchmarks peers TRACE --peers DIR: all managers on one trace, memory by memory, in one run.

DIR is the environment that README.md describes. Each peer runs in a process of its own with the peer's package first
on the path; ours and the reference lines run here. Every result is a row in results/peers.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import rows
from benchmarks.peers import lru
from triptych.cache.geometry import CacheGeometry
from triptych.config import SHAPES
from triptych.workload.replay import ReplaySettings, replay
from triptych.workload.trace_files import read_trace

ROOT = Path(__file__).resolve().parents[2]
ENGINES = ("triptych", "lru line", "sglang", "vllm")


def main(argv: list[str]) -> int:
    """Run what the command line asks for; prints a table as it grows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks peers")
    parser.add_argument("trace", type=Path)
    parser.add_argument("--peers", type=Path, help="directory with venv/ and peers/, see README.md")
    parser.add_argument("--model", choices=sorted(SHAPES), default="flash")
    parser.add_argument("--gib", default="8,16,32,64,128", help="memories, with commas")
    parser.add_argument("--tokens", choices=("literal", "session"), default="literal")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--policies", default="adaptive", help="ours, with commas")
    given = parser.parse_args(argv)
    print(f"{'GiB':>5} {'engine':<22} {'hit %':>7} {'pages %':>8} {'work left %':>12} {'evictions':>10}", flush=True)
    for gib in (float(part) for part in given.gib.split(",")):
        for engine in given.engines.split(","):
            for row in _results(engine, gib, given):
                _report(gib, row, given)
    return 0


def _results(engine: str, gib: float, given: argparse.Namespace) -> list[dict[str, Any]]:
    if engine == "triptych":
        return [_ours(policy, gib, given) for policy in given.policies.split(",")]
    if engine == "lru line":
        trace = read_trace(given.trace, given.tokens, given.limit)
        return [{"engine": "plain LRU line"} | lru.lines(trace, given.model, int(gib * 2**30))]
    if given.peers is None:
        print(f"      {engine} needs --peers", flush=True)
        return []
    return [_peer(engine, gib, given)]


def _ours(policy: str, gib: float, given: argparse.Namespace) -> dict[str, Any]:
    geometry = CacheGeometry.of(SHAPES[given.model], "fp8")
    trace = read_trace(given.trace, given.tokens, given.limit)
    result = replay(trace, ReplaySettings(geometry, int(gib * 2**30), policy))
    return {"engine": f"triptych {policy}"} | result.to_dict()


def _peer(engine: str, gib: float, given: argparse.Namespace) -> dict[str, Any]:
    command = [str(given.peers / "venv/bin/python"), "-m", "benchmarks.peers.driver", engine, str(given.trace)]
    command += ["--gib", str(gib), "--model", given.model, "--tokens", given.tokens]
    if given.limit:
        command += ["--limit", str(given.limit)]
    path = os.pathsep.join(str(part) for part in (ROOT / "src", ROOT, given.peers / "peers" / engine))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return {"engine": engine, "failed": last[0]}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def _report(gib: float, row: dict[str, Any], given: argparse.Namespace) -> None:
    if "failed" in row:
        print(f"{gib:5g} {row['engine']:<22} {row['failed']}", flush=True, file=sys.stderr)
        return
    # a peer runs what it does not find, in full
    left = row.get("computed_share", 1 - row["hit_rate"])
    pages = row.get("page_hit_rate", row["hit_rate"])
    evictions = row.get("evictions", row.get("evicted_full_tokens", 0))
    shares = f"{100 * row['hit_rate']:7.2f} {100 * pages:8.2f} {100 * left:12.2f}"
    print(f"{gib:5g} {row['engine']:<22} {shares} {evictions:10,}", flush=True)
    setting = {
        "trace": given.trace.name,
        "model": given.model,
        "gib": gib,
        "tokens": given.tokens,
        "limit": given.limit,
    }
    rows.append("peers", setting | row, kv_bytes={"budget": int(gib * 2**30)}, threads=1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
