"""python -m benchmarks dashboard_cost: what people who watch the dashboard cost an engine.

Look: facts about a full engine, ids only: 256 live requests, conversations of a million tokens each, on the device, the
host and a store: how long one look holds the engine thread up, per conversation and with its time budget, and what it
takes to remember a conversation when its request ends. Decode: tokens per
second of the bundled model while nobody, one person (a look a second) and twenty scripts (as many as possible) look.
Thread CPU time for looks, wall clock for decoding, medians.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from typing import Any

import numpy as np

from benchmarks import rows
from triptych.cache.geometry import CacheCapacity, CacheGeometry
from triptych.cache.manager import CacheManager
from triptych.cache.policies import Below
from triptych.cache.sessions import Sessions
from triptych.cache.store.memory import MemoryStore
from triptych.cache.store.protocol import ObjectKey
from triptych.config import PAGE, SHAPES, EngineConfig
from triptych.engine.api import AsyncEngine
from triptych.engine.facts import Watch
from triptych.schedule.scheduler import Scheduler
from triptych.words import Request, SamplingParams

PAGES, SESSIONS, LIVE = 8192, 12, 256


def main(argv: list[str]) -> int:
    """Measure, print, write a row."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks dashboard_cost", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=600, help="tokens of each stream; 0 measures looks only")
    given = parser.parse_args(argv)
    looks = look_milliseconds(given.rounds)
    print("one look, milliseconds:", looks)
    speeds = decode_speeds(given.rounds, given.tokens) if given.tokens else {}
    print("decode, tokens/s:", speeds)
    values = {"rounds": given.rounds, "look_ms": looks, "decode_tok_s": speeds, "load": rows.load_average()}
    rows.append("dashboard_cost", values, kv_bytes={}, threads=1)
    return 0


class _Loop:
    """As much of an EngineLoop as a look reads."""

    def __init__(self, cache: CacheManager, scheduler: Scheduler) -> None:
        self.cache = cache
        self.scheduler = scheduler


def look_milliseconds(rounds: int) -> dict[str, float]:
    """One look at a full engine: all conversations at once, then within the budget, and per conversation."""
    geometry = CacheGeometry.of(SHAPES["flash"], "fp8")
    store = MemoryStore()
    capacity = CacheCapacity(SESSIONS * (PAGES + 40 * geometry.snapshot_frames), 4)
    cache = CacheManager(geometry, capacity, geometry.layers, below=Below(1000, (store,)))
    random = np.random.default_rng(0)
    ends: list[float] = []
    for number in range(SESSIONS):
        tokens = random.integers(0, 129_280, PAGES * PAGE).astype(np.int32)
        assert cache.admit(str(number), tokens, "", len(tokens) + PAGE) is not None
        assert cache.grow(str(number), len(tokens))
        cache.snapshot_writes(str(number), 0, len(tokens))
        cache.advance(str(number), tokens, len(tokens))
        holding = cache.holdings[str(number)]
        ends.append(_timed(lambda h=holding: Sessions().ended(h)))
        cache.release(str(number))
    for session in tuple(cache.sessions._sessions)[: SESSIONS // 2]:  # half of each older one has left
        for at, key in reversed(tuple(enumerate(session.keys))):
            if at >= PAGES // 2:
                store._objects[ObjectKey("page", key)] = b""  # type: ignore[assignment]
                cache.memory.drop_page(cache.memory.tree.nodes[key])
    scheduler = Scheduler(cache, EngineConfig(max_waiting=LIVE), 1 << 20)
    for number in range(LIVE):
        scheduler.add(Request(f"chatcmpl-{number}", np.arange(500, dtype=np.int32), SamplingParams(max_tokens=9)))
    watch = Watch(_Loop(cache, scheduler), lambda name: 0.0)  # type: ignore[arg-type]
    whole = [_timed(lambda: cache.sessions.look(cache, watch.label, budget=60.0)) for _ in range(rounds)]
    budgeted = [_timed(watch.gather) for _ in range(rounds)]
    return {
        "remember": round(statistics.median(ends), 4),
        "conversation": round(statistics.median(whole) / len(cache.sessions), 4),
        "gather": round(statistics.median(budgeted), 3),
        "gather_worst": round(max(budgeted), 3),
    }


def _timed(work: Any) -> float:
    begin = time.thread_time()
    work()
    return 1e3 * (time.thread_time() - begin)


def decode_speeds(rounds: int, tokens: int) -> dict[str, float]:
    """Tokens per second of eight streams while nobody, one person and twenty scripts look, in turns."""
    engine = AsyncEngine.load("tiny", kv_memory=256 << 20, threads=1, max_running=8)
    found: dict[str, list[float]] = {"nobody": [], "a_person": [], "twenty_scripts": []}
    ways = {"nobody": (0, 0.0), "a_person": (1, 1.0), "twenty_scripts": (20, 0.0)}

    async def run() -> None:
        await engine.start()
        await _decode(engine, 50, 0, 0.0)
        for _ in range(rounds):
            for way, (watchers, pause) in ways.items():
                found[way].append(await _decode(engine, tokens, watchers, pause))
        await engine.stop()

    asyncio.run(run())
    return {way: round(statistics.median(speeds), 1) for way, speeds in found.items()}


async def _decode(engine: AsyncEngine, tokens: int, watchers: int, pause: float) -> float:
    async def one(name: int) -> None:
        prompt = np.random.default_rng(name).integers(50, 900, 200).astype(np.int32)
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        async for _ in engine.stream(prompt, params, request_id=f"r{name}"):
            pass

    async def watch() -> None:
        while True:
            await engine.facts()
            await asyncio.sleep(pause)

    watching = [asyncio.create_task(watch()) for _ in range(watchers)]
    begin = time.perf_counter()
    await asyncio.gather(*(one(name) for name in range(8)))
    seconds = time.perf_counter() - begin
    for task in watching:
        task.cancel()
    await asyncio.gather(*watching, return_exceptions=True)
    return 8 * tokens / seconds
