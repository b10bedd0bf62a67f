"""python -m benchmarks context_throughput: prefill and decode of the bundled checkpoint behind 1K ... 1M tokens.

Only the work at a place is run: pages, rings and compressor rows are filled with random numbers, and a chunk of a
prefill, or one decode step, runs at the end of a context of the wanted length, through the engine's runner. What a
chunk costs does not depend on the values. A whole prefill is the sum over its chunks, interpolated between the places
that were run. Times are medians; CPU time counts all threads, and on a shared machine it is the one to look at.
"""

from __future__ import annotations

import argparse
import logging
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from benchmarks import rows
from triptych.config import PAGE, CacheConfig, EngineConfig
from triptych.engine.load import load
from triptych.engine.runner import Runner
from triptych.words import Chunk, StepPlan

CONTEXTS = (1024, 4096, 16384, 65536, 262144, 1048576)
CHUNK, BATCHES = 512, (1, 8)


def main(argv: list[str]) -> int:
    """Measure, print a table, write a row."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks context_throughput", description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="write no row")
    given = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    begun = rows.load_average()
    runner, page_bytes = loaded(given.model, max(given.contexts), given.threads)
    decode: dict[str, dict[str, dict[str, float]]] = {}
    chunks: dict[int, dict[str, float]] = {}
    places = sorted({min(at, max(given.contexts) - CHUNK) for at in (0, *given.contexts)})
    for start in places:
        chunks[start] = prefill_chunk(runner, start, given.rounds)
        print(f"chunk of {CHUNK} behind {start:>9,}: {chunks[start]['cpu_ms']:10.1f} ms of CPU", flush=True)
    for context in given.contexts:
        decode[str(context)] = {str(batch): decode_step(runner, context, batch, given.rounds) for batch in BATCHES}
        shown = ", ".join(f"{batch}: {one['cpu_ms']:.2f} ms" for batch, one in decode[str(context)].items())
        print(f"decode behind {context:>9,}, by rows: {shown}", flush=True)
    values: dict[str, Any] = {
        **{"model": given.model, "chunk": CHUNK, "rounds": given.rounds, "load": [begun, rows.load_average()]},
        **{"prefill_chunk": {str(at): one for at, one in chunks.items()}, "decode": decode},
        "prefill": {str(context): whole(context, chunks) for context in given.contexts},
    }
    for context, one in values["prefill"].items():
        print(f"a prompt of {int(context):>9,}: {one['cpu_s']:8.1f} s of CPU, {one['cpu_tok_s']:8,.0f} tokens/s")
    if not given.dry:
        rows.append("context_throughput", values, kv_bytes={"page": page_bytes}, threads=given.threads)
    return 0


def loaded(model: str, longest: int, threads: int) -> tuple[Runner, int]:
    """A runner whose pools hold one context of `longest` tokens, full of random numbers; bytes of a page."""
    cache = CacheConfig(kv_memory=1 << 30)
    engine = load(model, EngineConfig(device="cpu", threads=threads, max_running=max(BATCHES), cache=cache))
    runner, page_bytes = engine.loop._runner, engine.loop.cache.geometry.page_bytes
    assert runner.pools.capacity.frames * PAGE >= longest + PAGE, "1 GiB does not hold that context"
    generator = torch.Generator().manual_seed(0)
    for value in vars(runner.pools).values():
        if isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
            value.normal_(generator=generator)
    return runner, page_bytes


def prefill_chunk(runner: Runner, start: int, rounds: int) -> dict[str, float]:
    """Milliseconds of one chunk of a prompt behind `start` tokens."""
    plan = StepPlan(0, (_chunk(runner, 0, start, start + CHUNK, seed=start),))
    return _timed(runner, [plan] * (rounds + 1))


def decode_step(runner: Runner, context: int, batch: int, rounds: int) -> dict[str, float]:
    """Milliseconds of a step with one row for each of `batch` requests, all behind `context` tokens."""
    at = [context - 1 - i for i in range(4 * rounds)]
    plans = [
        StepPlan(n, tuple(_chunk(runner, slot, position, position + 1, seed=n) for slot in range(batch)))
        for n, position in enumerate(at)
    ]
    return _timed(runner, plans)


def whole(context: int, chunks: dict[int, dict[str, float]]) -> dict[str, float]:
    """Seconds of a prompt of `context` tokens, and tokens a second, from the chunks that were run."""
    known = sorted(chunks)
    assert all(a < b for a, b in pairwise(known))
    starts = np.arange(0, context, CHUNK)
    found = {}
    for kind in ("wall", "cpu"):
        seconds = float(np.interp(starts, known, [chunks[at][f"{kind}_ms"] for at in known]).sum()) / 1e3
        found |= {f"{kind}_s": round(seconds, 3), f"{kind}_tok_s": round(context / seconds, 1)}
    return found


def _chunk(runner: Runner, slot: int, start: int, end: int, seed: int) -> Chunk:
    """Rows [start, end) of a made-up request; all requests share the same pages."""
    tokens = np.random.default_rng(seed).integers(2, runner.model.shape.vocab_size, end - start).astype(np.int32)
    pages = np.arange(-(-end // PAGE), dtype=np.int32)
    return Chunk(f"r{slot}", slot, start, end, tokens, pages, start, samples=True)


def _timed(runner: Runner, plans: list[StepPlan]) -> dict[str, float]:
    """Median of all plans but the first, which warms up."""
    runner.logits(plans[0])
    timed = rows.Timed()
    for plan in plans[1:]:
        with timed:
            runner.logits(plan)
    return timed.median()
