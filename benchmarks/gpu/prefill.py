"""Prefill of V4-Flash in the released formats, as the engine runs it: tokens a second against the goals and vLLM.

    PYTHONPATH=src python -m benchmarks.gpu.prefill [--layers 20] [--contexts 8192 65536 262144] [--seconds 50]

Chunks of 8,192 rows, as the engine makes them, through the runner with the sampled token at the end. Where the time is
short, a long prompt runs its first and last chunks only, and the time of those between is interpolated: `measured`
says how many chunks ran. `cached_ms`: time to the token of a prompt that is cached up to its last 256 tokens.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import rows
from benchmarks.gpu import made
from triptych.cache.geometry import CacheCapacity
from triptych.config import ModelShape
from triptych.engine.device_sampler import Draw
from triptych.engine.pools import Pools
from triptych.engine.runner import DeviceRunner
from triptych.engine.sampler import SamplerState
from triptych.model.weights import ModelWeights
from triptych.words import Chunk, SamplingParams, StepPlan

CHUNK = 8192
# layers, context -> goal and vLLM 0.26, thousand tokens a second (20 layers Marlin, 8 layers humming)
GOALS = {
    (20, 8192): (33.0, 24.2), (20, 65536): (32.0, 23.4), (20, 262144): (30.0, 20.4),
    (8, 8192): (80.0, 72.0), (8, 65536): (80.0, 72.6),
}  # fmt: skip
Row = dict[str, float | int | str]


def main() -> None:
    """Print a line for each context and append the table to results/gpu_prefill.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 65536, 262144])
    parser.add_argument("--seconds", type=float, default=50.0)
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    started = time.monotonic()
    shape = made.shape_of("flash", given.layers)
    weights = made.released_weights(shape)
    torch.cuda.synchronize()
    print(f"{torch.cuda.get_device_name()}: weights in {time.monotonic() - started:.1f} s", flush=True)
    table = []
    for context in given.contexts:
        left = given.seconds - (time.monotonic() - started)
        if left > 0:
            table.append(measure(shape, weights, context, left, detail=given.profile))
            print(table[-1], flush=True)
    values = {"command": "python -m benchmarks.gpu.prefill", "table": table, "layers": given.layers}
    rows.append("gpu_prefill", values, kv_bytes={"entry": 584}, threads=1)


def measure(shape: ModelShape, weights: ModelWeights, context: int, left: float, *, detail: bool) -> Row:
    """Tokens a second of a cold prompt of `context` tokens, and the time of a cached one's last 256."""
    torch.cuda.empty_cache()
    config = made.config_of(context + 256, 1)
    geometry = made.geometry_of(shape, config.cache)
    pages = made.pages_of(context + 256)
    pools = Pools(shape, geometry, CacheCapacity(pages, 1), torch.device("cuda"), spare=1)
    made.fill_pools(pools)
    runner = DeviceRunner(weights, config, pools, capture=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(runner, 0, min(CHUNK, context))  # compiles
    starts = list(range(0, context, CHUNK))
    took: dict[int, float] = {}
    deadline = time.monotonic() + left
    for start in dict.fromkeys([starts[0], starts[-1], *starts[:: max(1, len(starts) // 8)], *starts]):
        took[start] = run(runner, start, min(start + CHUNK, context))
        if time.monotonic() > deadline:
            break
    every = np.interp(starts, sorted(took), [took[start] for start in sorted(took)])
    peak = torch.cuda.max_memory_allocated() - before
    cached = min(run(runner, context - 256 - 4, context, write_from=context - 256) for _ in range(5))
    if detail:
        show(lambda: run(runner, starts[-1], context))
        show(lambda: run(runner, context - 256 - 4, context, write_from=context - 256))
    rate = context / every.sum() / 1e3
    out: Row = {"card": torch.cuda.get_device_name(), "layers": shape.num_layers, "context": context}
    out |= {
        "ktokens_s": round(float(rate), 2),
        "first_ms": round(float(every[0]) * 1e3, 1),
        "last_ms": round(float(every[-1]) * 1e3, 1),
    }
    out |= {"measured": f"{len(took)}/{len(starts)} chunks", "cached_ms": round(cached * 1e3, 2)}
    out |= {"transient_gib": round(peak / 2**30, 2)}
    if (shape.num_layers, context) in GOALS:
        out |= dict(zip(("goal", "vllm"), GOALS[shape.num_layers, context], strict=True))
    return out


def show(work: Callable[[], object]) -> None:
    """Print the kernels of some work by their time."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    by_name: dict[str, list[float]] = {}
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            by_name.setdefault(event.name[:60], []).append(event.device_time)
    total = sum(sum(times) for times in by_name.values())
    print(f"    {total / 1e3:.1f} ms in {sum(len(times) for times in by_name.values())} kernels", flush=True)
    for name, times in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:22]:
        print(f"    {sum(times):10.1f} us {len(times):5d} x {name}", flush=True)


def run(runner: DeviceRunner, start: int, end: int, write_from: int | None = None) -> float:
    """Seconds of one chunk that samples, tokens on the host."""
    shape = runner.model.shape
    tokens = np.random.default_rng(start).integers(2, shape.vocab_size, end - start).astype(np.int32)
    pages = np.arange(made.pages_of(end), dtype=np.int32)
    chunk = Chunk("r", 0, start, end, tokens, pages, start if write_from is None else write_from, samples=True)
    draw = Draw(SamplerState("r", SamplingParams(temperature=0.0), shape.vocab_size), 0, 0)
    torch.cuda.synchronize()
    begun = time.perf_counter()
    runner.start(StepPlan(0, (chunk,)), [draw]).finish()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
