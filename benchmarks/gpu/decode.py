"""Whole decode steps of V4-Flash in the released formats, as the engine runs them, against the goals and vLLM.

    PYTHONPATH=src python -m benchmarks.gpu.decode [--layers 20] [--cases 1x8192 64x65536 ...] [--deterministic]

Weights and caches are random bytes, tokens random, so routing is nearly uniform; how many experts a layer really uses
is counted and stated. A step is everything between two tokens of the engine's runner: indices, their copy, the graph,
the sampled tokens' copy back. `graph_ms` is the replay alone. Median of `--steps` steps after warm-up.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import rows
from benchmarks.gpu import made
from triptych.cache.geometry import CacheCapacity
from triptych.config import EngineConfig, ModelShape
from triptych.engine.device_sampler import Draw
from triptych.engine.graphs import DecodeSteps
from triptych.engine.pools import Pools
from triptych.engine.runner import DeviceRunner
from triptych.engine.sampler import SamplerState
from triptych.kernels.mhc.ref import Uncollapsed
from triptych.kernels.mhc.together import collapse
from triptych.model.weights import ModelWeights
from triptych.words import SamplingParams, StepPlan

# batch, context -> goal and vLLM 0.26, milliseconds of 20 layers (reference/gpu-baseline.md, section 5b)
GOALS = {
    (1, 8192): (2.2, 4.2), (1, 1048000): (2.6, 4.6), (16, 65536): (8.5, 12.3), (64, 65536): (18.0, 24.8),
    (4, 1048000): (4.5, 6.8),
}  # fmt: skip
Row = dict[str, float | int | str]
Case = tuple[int, int, int]
"""Batch, context and steps."""


def main() -> None:
    """Print a line for each case and append the table to results/gpu_decode.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=50.0)
    parser.add_argument("--model", choices=("flash", "pro"), default="flash")
    parser.add_argument("--cases", nargs="+", default=[f"{b}x{c}" for b, c in GOALS])
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--deterministic", action="store_true")
    given = parser.parse_args()
    if given.steps < 6:
        parser.error("--steps must be 6 or more: three prepare, and the next ones overlap")
    started = time.monotonic()
    shape = made.shape_of(given.model, given.layers)
    weights = made.released_weights(shape, tiles=not given.deterministic)
    torch.cuda.synchronize()
    print(f"{torch.cuda.get_device_name()}: weights {torch.cuda.memory_allocated() / 2**30:.1f} GiB "
          f"in {time.monotonic() - started:.1f} s", flush=True)  # fmt: skip
    table: list[Row] = []
    for case in given.cases:
        if time.monotonic() - started > given.seconds:
            print(f"no time left for {case}", flush=True)
            continue
        batch, context = (int(part) for part in case.split("x"))
        config = made.config_of(context + given.steps + 8, batch, deterministic=given.deterministic)
        table.append(measure(weights, config, (batch, context, given.steps), detail=given.profile))
        print(table[-1], flush=True)
    values = {"command": rows.command_of("gpu.decode"), "table": table, "layers": given.layers}
    rows.append("gpu_decode", values, kv_bytes={"entry": 584}, threads=1)


def measure(weights: ModelWeights, config: EngineConfig, case: Case, *, detail: bool) -> Row:
    """Median milliseconds of a step and of its graph, and kernels per layer."""
    shape, (batch, context, steps) = weights.shape, case
    pools, frames = pools_of(shape, config, case)
    runner = DeviceRunner(weights, config, pools, capture=True)
    runner.steps.tables.device.zero_()
    plans, draws = work_of(shape, case, frames)
    begun = time.perf_counter()
    for plan in plans[:3]:
        runner.start(plan, draws).finish()
    ready = time.perf_counter() - begun
    found = step_times(runner, plans[3:], draws)
    key = runner.steps.key(plans[0].chunks)
    out: Row = {"card": torch.cuda.get_device_name(), "layers": shape.num_layers, "batch": batch, "context": context}
    if config.deterministic:
        out |= {"deterministic": 1}
    out |= {"ms": round(statistics.median(found), 3), "graph_ms": round(replays(runner, key, steps), 3)}
    out |= {"ready_s": round(ready, 1)}
    out |= launches(lambda: runner.steps.replay(key), shape.num_layers, detail=detail)
    used = experts_used(runner, plans[0], chunked=config.deterministic)
    out |= {"experts_per_layer": used, "frames": frames, "bucket": f"{key[0]}x{key[1]}"}
    if (batch, context) in GOALS and shape.num_layers == 20:
        out |= dict(zip(("goal_ms", "vllm_ms"), GOALS[batch, context], strict=True))
    return out


def step_times(runner: DeviceRunner, plans: list[StepPlan], draws: list[Draw]) -> list[float]:
    """Milliseconds of steps as the loop runs them: the next one is enqueued before the last one's tokens are taken,
    where the runner allows it."""
    found = []
    flight = runner.start(plans[0], draws)
    for plan in plans[1:]:
        begun = time.perf_counter()
        if not runner.depth:
            flight.finish()
        coming = runner.start(plan, draws)
        if runner.depth:
            flight.finish()
        flight = coming
        found.append((time.perf_counter() - begun) * 1e3)
    flight.finish()
    return found


def pools_of(shape: ModelShape, config: EngineConfig, case: Case) -> tuple[Pools, int]:
    """Filled pools for a case, and how many frames they have; rows share them where memory does not suffice."""
    batch, context, steps = case
    torch.cuda.empty_cache()
    geometry = made.geometry_of(shape, config.cache)
    pages = made.pages_of(context + steps + 8)
    room = torch.cuda.mem_get_info()[0] - (6 << 30) - (batch + 1) * geometry.slot_bytes
    frames = min(batch * pages, int(room // geometry.page_bytes))
    pools = Pools(shape, geometry, CacheCapacity(frames, batch), torch.device("cuda"), spare=1)
    made.fill_pools(pools)
    return pools, frames


def work_of(shape: ModelShape, case: Case, frames: int) -> tuple[list[StepPlan], list[Draw]]:
    """The steps of a case, and what is drawn in each."""
    batch, context, steps = case
    lines = made.tables(batch, made.pages_of(context + steps + 8), frames)
    plans = [made.decode_plan(i, [context + i] * batch, lines, shape.vocab_size) for i in range(steps)]
    params = SamplingParams(temperature=0.0)
    return plans, [Draw(SamplerState(f"r{b}", params, shape.vocab_size), b, 0) for b in range(batch)]


def replays(runner: DeviceRunner, key: tuple[int, int], steps: int) -> float:
    """Median milliseconds of the graph alone."""
    times = []
    for _ in range(steps):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        runner.steps.replay(key)
        ended.record()
        ended.synchronize()
        times.append(begun.elapsed_time(ended))
    return statistics.median(times)


def launches(step: Callable[[], Any], layers: int, *, detail: bool) -> Row:
    """Kernels of a step per layer, and which took longest."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    events = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    by_name: dict[str, list[float]] = {}
    for event in events:
        by_name.setdefault(event.name[:60], []).append(event.device_time)
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))
    if detail:
        for name, times in longest[:30]:
            print(f"    {sum(times):9.1f} us {len(times):5d} x {name}", flush=True)
    text = ", ".join(f"{name[:28]} {sum(times):.0f}" for name, times in longest[:6])
    return {"launches_per_layer": round(len(events) / layers, 1), "longest_us": text}


def experts_used(runner: DeviceRunner, plan: StepPlan, *, chunked: bool) -> str:
    """Least, mean and most distinct experts of a layer in one step."""
    counts: list[int] = []
    kernels = runner.model.kernels

    def moe_rows(x: Any, token_ids: Tensor, router: Any, *rest: Any) -> Any:
        x = collapse(x) if isinstance(x, Uncollapsed) else x
        ids, _ = kernels.route(x.float(), token_ids, router)
        counts.append(int(ids.unique().numel()))
        return kernels.moe_rows(x, token_ids, router, *rest)

    most = runner.steps.rows[-1], runner.steps.pages[-1]
    steps = DecodeSteps(runner.model, runner.pools, *most, capture=False, chunked=chunked)
    runner.model.use_kernels(replace(kernels, moe_rows=moe_rows))
    steps.run(plan.chunks)
    runner.model.use_kernels(kernels)
    return f"{min(counts)}/{statistics.mean(counts):.0f}/{max(counts)}"


if __name__ == "__main__":
    main()
