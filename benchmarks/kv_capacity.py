"""python -m benchmarks kv_capacity: bytes a token, and how many finished prompts a byte budget keeps reusable.

N prompts of equal length that share nothing are served one after another by the real cache manager (ids only, no
weights), each with a short answer; then each of them comes back once, in the same order, as a longer prompt. A prompt
counts as reusable if its return computes nothing again but its own new tokens and less than one page of the old ones.
The largest N for which all N are reusable is the capacity.
"""

from __future__ import annotations

import argparse

import numpy as np

from benchmarks import rows
from triptych.cache.geometry import CacheCapacity, CacheGeometry
from triptych.cache.manager import CacheManager
from triptych.config import PAGE, SHAPES
from triptych.words import TokenIds

CHUNK, ANSWER, MORE = 8192, 16, 64
IDEAL = {"flash": 3850, "pro": 5511}
"""Bytes a token of pages alone, FP8 entries and FP8 index keys (reference section 4.3)."""


def main(argv: list[str]) -> int:
    """Measure, print a table, write a row."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks kv_capacity", description=__doc__)
    parser.add_argument("--model", choices=sorted(SHAPES), default="flash")
    parser.add_argument("--memory", type=int, default=40, help="GiB")
    parser.add_argument("--length", type=int, default=65536)
    given = parser.parse_args(argv)
    geometry = CacheGeometry.of(SHAPES[given.model], "fp8")
    budget = given.memory << 30
    capacity = CacheCapacity(budget // geometry.page_bytes, 1)
    best = most_reusable(geometry, capacity, given.length)
    per_token = geometry.page_bytes / PAGE
    spent = budget / max(best, 1) / given.length
    print(f"pages {per_token:,.0f} bytes a token, {per_token / IDEAL[given.model] - 1:+.2%} of the ideal")
    print(f"{best} prompts of {given.length:,} tokens stay reusable in {given.memory} GiB: {spent:,.0f} bytes a token")
    values = {
        **{"model": given.model, "memory_gib": given.memory, "length": given.length, "reusable_prompts": best},
        **{"page_bytes_per_token": round(per_token, 1), "bytes_per_token_in_all": round(spent, 1)},
    }
    rows.append("kv_capacity", values, kv_bytes={"token": round(per_token)}, threads=1)
    return 0


def most_reusable(geometry: CacheGeometry, capacity: CacheCapacity, length: int) -> int:
    """The largest number of prompts that all stay reusable, by bisection."""
    low, high = 0, capacity.frames * PAGE // length + 1
    while high - low > 1:
        middle = (low + high) // 2
        if reusable(geometry, capacity, middle, length) == middle:
            low = middle
        else:
            high = middle
    return low


def reusable(geometry: CacheGeometry, capacity: CacheCapacity, count: int, length: int) -> int:
    """How many of `count` prompts come back to a cache that resumes them at their last page."""
    cache = CacheManager(geometry, capacity, geometry.layers)
    random = np.random.default_rng(0)
    prompts = [random.integers(0, 129_280, length + ANSWER + MORE).astype(np.int32) for _ in range(count)]
    for i, prompt in enumerate(prompts):
        _serve(cache, f"first {i}", prompt[:length], prompt[: length + ANSWER])
    return sum(_serve(cache, f"again {i}", prompt, prompt) for i, prompt in enumerate(prompts))


def _serve(cache: CacheManager, name: str, prompt: TokenIds, whole: TokenIds) -> bool:
    """One request from arrival to end; whether it started less than a page before what it shares with the first."""
    assert cache.admit(name, prompt, "", len(whole))
    plan = cache.holdings[name].plan
    resumed = plan.start >= len(prompt) - ANSWER - MORE - PAGE
    for start in range(plan.start, len(whole), CHUNK):
        end = min(len(whole), start + CHUNK)
        assert cache.grow(name, end)
        cache.snapshot_writes(name, start, end)
        cache.advance(name, whole[:end], end)
    write = cache.boundary_snapshot(name)
    if write is not None:
        cache.publish_snapshot(name, write)
    cache.release(name)
    return resumed
