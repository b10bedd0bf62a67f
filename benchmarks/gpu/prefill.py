"""Prefill of V4-Flash in the released formats, as the engine runs it: tokens a second against the goals and vLLM.

    PYTHONPATH=src python -m benchmarks.gpu.prefill [--layers 20] [--contexts 8192 65536 262144] [--seconds 50]

Chunks of `--rows` rows, as the engine makes them, through the runner with the sampled token at the end. A prompt is
run whole, the next chunk enqueued before the last one's token is taken, as the engine's loop does it. Where the time is
short, some chunks are run by themselves, and the time of those between is interpolated: `measured` says how many ran.
`cached_ms`: time to the token of a prompt that is cached up to its last 256 tokens.
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
    parser.add_argument("--rows", type=int, default=8192)
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
            table.append(measure(shape, weights, (context, given.rows), left, detail=given.profile))
            print(table[-1], flush=True)
    values = {"command": rows.command_of("gpu.prefill"), "table": table, "layers": given.layers}
    rows.append("gpu_prefill", values, kv_bytes={"entry": 584}, threads=1)


def measure(shape: ModelShape, weights: ModelWeights, size: tuple[int, int], left: float, *, detail: bool) -> Row:
    """Tokens a second of a prompt of size[0] tokens in chunks of size[1], and the time of a cached one's last 256."""
    torch.cuda.empty_cache()
    context, rows_of_chunk = size
    config = made.config_of(context + 256, 1)
    geometry = made.geometry_of(shape, config.cache)
    pages = made.pages_of(context + 256)
    pools = Pools(shape, geometry, CacheCapacity(pages, 1), torch.device("cuda"), spare=1)
    made.fill_pools(pools)
    runner = DeviceRunner(weights, config, pools, capture=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    starts = list(range(0, context, rows_of_chunk))
    parts = {start: min(start + rows_of_chunk, context) for start in starts}
    for start in dict.fromkeys([starts[0], starts[-1]]):
        run(runner, start, parts[start])  # compiles
    deadline = time.monotonic() + left
    took = {start: run(runner, start, parts[start]) for start in dict.fromkeys([starts[0], starts[-1]])}
    seconds, ran = float(np.mean(list(took.values()))) * len(starts), f"{len(took)}/{len(starts)} chunks"
    if 2 * seconds < left:
        whole(runner, parts)  # chunks in between may need kernels that the first and the last do not
        seconds, ran = whole(runner, parts), "all, in a row"
    else:
        for start in starts[:: max(1, len(starts) // 8)]:
            if time.monotonic() < deadline:
                took[start] = run(runner, start, parts[start])
        seconds = float(np.interp(starts, sorted(took), [took[start] for start in sorted(took)]).sum())
        ran = f"{len(took)}/{len(starts)} chunks"
    peak = torch.cuda.max_memory_allocated() - before
    cached = min(run(runner, context - 256 - 4, context, write_from=context - 256) for _ in range(5))
    if detail:
        show(lambda: run(runner, starts[-1], context))
        show(lambda: run(runner, context - 256 - 4, context, write_from=context - 256))
    rate = context / seconds / 1e3
    out: Row = {"card": torch.cuda.get_device_name(), "layers": shape.num_layers, "context": context}
    out |= {
        "ktokens_s": round(float(rate), 2),
        "first_ms": round(took[starts[0]] * 1e3, 1),
        "last_ms": round(took[starts[-1]] * 1e3, 1),
    }
    out |= {"chunk": rows_of_chunk, "measured": ran, "cached_ms": round(cached * 1e3, 2)}
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
    plan = plan_of(runner, start, end, write_from)
    torch.cuda.synchronize()
    begun = time.perf_counter()
    runner.start(plan, [draw_of(runner)]).finish()
    return time.perf_counter() - begun


def whole(runner: DeviceRunner, parts: dict[int, int]) -> float:
    """Seconds of all chunks one after the other, each enqueued before the one before has landed."""
    plans = [plan_of(runner, start, end, None) for start, end in parts.items()]
    torch.cuda.synchronize()
    begun = time.perf_counter()
    flight = None
    for plan in plans:
        coming = runner.start(plan, [draw_of(runner)])
        if flight is not None:
            flight.finish()
        flight = coming
    assert flight is not None
    flight.finish()
    return time.perf_counter() - begun


def plan_of(runner: DeviceRunner, start: int, end: int, write_from: int | None) -> StepPlan:
    """A step of one chunk."""
    tokens = np.random.default_rng(start).integers(2, runner.model.shape.vocab_size, end - start).astype(np.int32)
    pages = np.arange(made.pages_of(end), dtype=np.int32)
    chunk = Chunk("r", 0, start, end, tokens, pages, start if write_from is None else write_from, samples=True)
    return StepPlan(0, (chunk,))


def draw_of(runner: DeviceRunner) -> Draw:
    """The likeliest token."""
    return Draw(SamplerState("r", SamplingParams(temperature=0.0), runner.model.shape.vocab_size), 0, 0)


if __name__ == "__main__":
    main()
