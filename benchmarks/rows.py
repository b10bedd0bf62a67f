"""Result rows: what was measured, where, on which commit, with which command. One JSON object a line."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"


@dataclass
class Timed:
    """Durations of repeated work in seconds: wall clock, and CPU time of all threads of this process."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def __enter__(self) -> Timed:
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *exc: object) -> None:
        self.wall.append(time.perf_counter() - self._start[0])
        self.cpu.append(time.process_time() - self._start[1])

    def median(self) -> dict[str, float]:
        """Median milliseconds of one piece of work."""
        return {
            "wall_ms": round(statistics.median(self.wall) * 1e3, 3),
            "cpu_ms": round(statistics.median(self.cpu) * 1e3, 3),
        }

    def rate(self, tokens: int) -> dict[str, float]:
        """Tokens per second over everything timed."""
        return {"wall_tok_s": round(tokens / sum(self.wall), 1), "cpu_tok_s": round(tokens / sum(self.cpu), 1)}


def ratio(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
    """How many times faster we are, for each figure: rates divide one way, durations the other."""
    return {
        name: round(ours[name] / theirs[name] if name.endswith("tok_s") else theirs[name] / ours[name], 2)
        for name in ours
    }


def append(name: str, values: Mapping[str, Any], *, kv_bytes: Mapping[str, int], threads: int) -> Path:
    """Append one row to results/NAME.jsonl and return the file."""
    row = {
        "benchmark": name,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python -m benchmarks " + " ".join([name, *map(without_machine, sys.argv[2:])]),
        **_commit(),
        "machine": _machine(),
        "versions": _versions(("torch", "transformers", "numba", "numpy")),
        "threads": threads,
        "kv_bytes": dict(kv_bytes),
        **values,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return path


def command_of(module: str) -> str:
    """How `module` was run, for benchmarks that are not started by `python -m benchmarks NAME`."""
    return " ".join([f"python -m benchmarks.{module}", *map(without_machine, sys.argv[1:])])


def without_machine(argument: str) -> str:
    """The argument, but of an absolute path only its name: where it lies on this machine helps nobody."""
    return Path(argument).name if argument.startswith("/") else argument


def load_average() -> list[float]:
    """1, 5 and 15 minute load; a number measured beside other work is worth little."""
    return [round(x, 2) for x in os.getloadavg()]


def _commit() -> dict[str, Any]:
    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    return {
        "commit": git("rev-parse", "--short=12", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--", "../src")),
    }


def _machine() -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "ram_gib": round(_ram() / 2**30, 1),
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _ram() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _versions(names: Sequence[str]) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    out = {}
    for name in names:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "absent"
    return out


def read(name: str) -> list[dict[str, Any]]:
    """All rows of results/NAME.jsonl, oldest first; none if there is no such file."""
    path = RESULTS / f"{name}.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return sorted((json.loads(line) for line in lines if line), key=lambda row: str(row["time"]))
