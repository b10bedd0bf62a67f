"""python -m benchmarks rollouts: what a group of samples costs beyond its decoding, and what new weights cost.

Groups: rows of prompts that run for one prompt of each length sampled N times, as one request with n = N and as N
requests that come together; the least would be the prompt once, the most the prompt N times. Counts, so that nothing
disturbs them. Updates of the bundled checkpoint, from a directory and from tensors: seconds that staging takes beside
running requests, and milliseconds for which no step can run. Wall clock, medians.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics

import numpy as np

from benchmarks import rows
from triptych.checkpoint import CheckpointReader
from triptych.engine.api import AsyncEngine, Engine
from triptych.tiny import ensure_checkpoint
from triptych.words import SamplingParams, TokenIds

SAMPLES = 16
LENGTHS = (100, 300, 431, 1000, 4000)  # 431: the mean of the rl-rollout workload with its instructions


def main(argv: list[str]) -> int:
    """Measure, print, write a row."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks rollouts", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(argv)
    groups = {str(length): group_rows(length) for length in LENGTHS}
    print("rows of prompts by length:", groups)
    updates = update_seconds(given.rounds)
    print("updates:", updates)
    values = {
        "samples": SAMPLES,
        "rounds": given.rounds,
        "prefill_rows": groups,
        "updates": updates,
        "load": rows.load_average(),
    }
    rows.append("rollouts", values, kv_bytes={}, threads=2)
    return 0


def group_rows(length: int) -> dict[str, int]:
    """Rows of prompts that one group runs, by how it is asked for."""
    prompt = np.random.default_rng(length).integers(50, 900, length).astype(np.int32)
    engine = AsyncEngine.load("tiny", kv_memory=256 << 20, max_running=SAMPLES)
    return asyncio.run(_groups(engine, prompt)) | {"once": length, "each": SAMPLES * length}


async def _groups(engine: AsyncEngine, prompt: TokenIds) -> dict[str, int]:
    async def ask(name: str, n: int, salt: str) -> None:
        params = SamplingParams(max_tokens=4, n=n, seed=1, ignore_eos=True)
        async for _ in engine.stream(prompt, params, request_id=name, salt=salt):
            pass

    await engine.start()
    await ask("n", SAMPLES, "n")
    as_n = engine.stats().prefill_rows
    await asyncio.gather(*(ask(f"r{i}", 1, "requests") for i in range(SAMPLES)))
    both = engine.stats().prefill_rows
    await engine.stop()
    return {"as_n": as_n, "as_requests": both - as_n}


def update_seconds(rounds: int) -> dict[str, dict[str, float]]:
    """Medians of both parts of an update, by where it comes from."""
    directory = ensure_checkpoint()
    engine = Engine.load(directory, kv_memory=64 << 20)
    tensors = list(CheckpointReader(directory).tensors(show_progress=False))
    found: dict[str, dict[str, float]] = {}
    for name, source in (("directory", directory), ("tensors", tensors)):
        done = [engine.update_weights(source) for _ in range(rounds)]
        found[name] = {
            "mib": round(done[0].bytes / 2**20, 1),
            "staged_s": round(statistics.median(one.staged_seconds for one in done), 3),
            "stopped_ms": round(1e3 * statistics.median(one.stopped_seconds for one in done), 1),
        }
    engine.close()
    return found
