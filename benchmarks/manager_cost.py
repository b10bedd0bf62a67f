"""python -m benchmarks manager_cost: what the cache manager costs the host for one long prompt, ids only.

Cold: nothing is cached. Warm: the same prompt and 1,000 tokens more. Everything between arrival and end is counted:
hashing, matching, the resume plan, pages and snapshots chunk by chunk, sealing, release. Thread CPU time, medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from benchmarks import rows
from triptych.cache.geometry import CacheCapacity, CacheGeometry
from triptych.cache.manager import CacheManager
from triptych.cache.resume import Planner
from triptych.config import PAGE, SHAPES
from triptych.words import TokenIds

CHUNK, MORE, OUTPUT = 8192, 1000, 512


def main(argv: list[str]) -> int:
    """Measure, print a table, write a row."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks manager_cost", description=__doc__)
    parser.add_argument("--model", choices=sorted(SHAPES), default="flash")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args(argv)
    geometry = CacheGeometry.of(SHAPES[given.model], "fp8")
    table = {str(length): measure(geometry, length, given.rounds) for length in (100_000, 1_000_000)}
    for length, line in table.items():
        print(f"{int(length):>9,} tokens  {line}")
    values = {"model": given.model, "rounds": given.rounds, "milliseconds": table, "load": rows.load_average()}
    rows.append("manager_cost", values, kv_bytes={}, threads=1)
    return 0


def measure(geometry: CacheGeometry, length: int, rounds: int) -> dict[str, float]:
    """Milliseconds of the parts, cold and warm."""
    random = np.random.default_rng(0)
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        prompt = random.integers(0, 129_280, length + MORE).astype(np.int32)
        frames = (length + MORE + OUTPUT) // PAGE + 40 * geometry.snapshot_frames
        cache = CacheManager(geometry, CacheCapacity(frames, 2), geometry.layers)
        for name, tokens in (("cold", prompt[:length]), ("warm", prompt)):
            for part, milliseconds in _serve(cache, name, tokens).items():
                found.setdefault(f"{name} {part}", []).append(milliseconds)
        planner = Planner(geometry.layers, cache.rates)
        found.setdefault("choose a plan", []).append(
            _timed(lambda p=planner: p.cheapest(length, length // 128 * 128, 0))
        )
    return {part: round(statistics.median(values), 3) for part, values in found.items()}


def _serve(cache: CacheManager, name: str, prompt: TokenIds) -> dict[str, float]:
    output = np.arange(OUTPUT, dtype=np.int32)
    whole = np.concatenate([prompt, output])
    times = {"admit": _timed(lambda: cache.admit(name, prompt, "", len(whole)))}
    plan = cache.holdings[name].plan

    def prefill() -> None:
        for start in range(plan.start, len(prompt), CHUNK):
            end = min(len(prompt), start + CHUNK)
            assert cache.grow(name, end)
            cache.snapshot_writes(name, start, end)
            cache.advance(name, prompt, end)

    def decode() -> None:
        for length in range(len(prompt) + 1, len(whole)):
            assert cache.grow(name, length)
            cache.advance(name, whole[:length], length)

    def end() -> None:
        write = cache.boundary_snapshot(name)
        if write is not None:
            cache.publish_snapshot(name, write)
        cache.release(name)

    times["prefill"] = _timed(prefill)
    times["in all"] = times["admit"] + times["prefill"]
    times["a decode token"] = _timed(decode) / OUTPUT
    times["release"] = _timed(end)
    times["in all"] += times["release"]
    return times


def _timed(work: Callable[[], object]) -> float:
    started = time.thread_time()
    work()
    return (time.thread_time() - started) * 1e3
