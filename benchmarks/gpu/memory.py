"""Memory of an engine on a GPU as it loads: what is planned for steps and graphs, and what the largest steps then take.

    PYTHONPATH=src python -m benchmarks.gpu.memory [--layers 20] [--context 1048576] [--batch 64] [--most-gib 100]

Random weights in the released formats; otherwise the way of `Engine.load`: a dry run measures the largest steps, caches
get the rest, graphs are recorded. Then come the largest steps in earnest: full chunks at both ends of the context,
chunks of many requests, every graph, prompts. The allocator must never have had to give memory back to go on, and what
was left free says how far the plan was off.
"""

from __future__ import annotations

import argparse
import logging
import time
from typing import Any

import numpy as np
import torch

from benchmarks import rows
from benchmarks.gpu import made
from triptych.cache.geometry import plan_capacity
from triptych.engine.api import Engine
from triptych.engine.load import LoadedEngine, build_loop
from triptych.engine.room import room_for_caches
from triptych.engine.runner import DeviceRunner
from triptych.engine.warmup import prefill
from triptych.words import SamplingParams


def main() -> None:
    """Print the figures and append them to results/gpu_memory.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="flash")
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--context", type=int, default=1 << 20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--most-gib", type=float, default=0.0, help="caches take no more than this")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    out = measure(given.model, given.layers, given.context, given.batch, int(given.most_gib * 2**30))
    print(out, flush=True)
    values = {"command": rows.command_of("gpu.memory"), "table": [out]}
    rows.append("gpu_memory", values, kv_bytes={"entry": 584}, threads=1)


def measure(model: str, layers: int, context: int, batch: int, most: int) -> dict[str, Any]:
    """One engine: seconds of each part of loading, bytes planned and bytes taken."""
    began = time.perf_counter()
    shape = made.shape_of(model, layers)
    weights = made.released_weights(shape)
    torch.cuda.synchronize()
    config = made.config_of(context, batch)
    geometry = made.geometry_of(shape, config.cache)
    laid = time.perf_counter()
    room = room_for_caches(weights, config, geometry)
    planned = time.perf_counter()
    print(f"weights {laid - began:.1f} s, dry run {planned - laid:.1f} s, room {room / 2**30:.2f} GiB", flush=True)
    memory = min(room, most) if most else room
    capacity = plan_capacity(geometry, memory, config.max_running)
    loop = build_loop(weights, config, geometry, capacity)
    ready = time.perf_counter()
    limit = min(shape.max_position, capacity.tokens)
    engine = Engine(LoadedEngine("random", shape, config, None, loop, limit, ""))
    runner = loop._runner
    assert isinstance(runner, DeviceRunner)
    start = _state()
    print(f"pools and graphs {ready - planned:.1f} s, {runner.steps.captured} graphs, {start}", flush=True)
    _largest(runner, config.step_tokens or 1, min(context, limit), batch)
    _prompts(engine)
    engine.check_integrity()
    end = _state()
    engine.close()
    return {
        **{"card": torch.cuda.get_device_name(), "model": model, "layers": layers, "context": context, "batch": batch},
        **{"weights_s": round(laid - began, 1), "dry_run_s": round(planned - laid, 1)},
        **{"pools_and_graphs_s": round(ready - planned, 1), "graphs": runner.steps.captured},
        **{"room_gib": round(room / 2**30, 2), "tokens": capacity.tokens},
        **{f"{name}_ready": value for name, value in start.items()},
        **{f"{name}_after": value for name, value in end.items()},
    }


def _largest(runner: DeviceRunner, step: int, context: int, batch: int) -> None:
    """Full chunks at both ends of the context, one step of many chunks, and every graph."""
    for position, requests in ((0, 1), (context - step, 1), (context - step, min(batch, 16)), (context // 2, 3)):
        prefill(runner, step, position, requests)
        print(f"{step} rows of {requests} at {position}: {_state()}", flush=True)
    for key in [(r, p) for r in runner.steps.rows for p in runner.steps.pages]:
        runner.steps._pad(key[0])
        runner.steps.replay(key)
    torch.cuda.synchronize()


def _prompts(engine: Engine) -> None:
    random = np.random.default_rng(0)
    prompts = [random.integers(2, engine.shape.vocab_size, n).astype(np.int32) for n in (20_000, 3, 700, 9000, 1, 128)]
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    assert all(len(out.token_ids) == 20 for out in engine.generate(prompts, params))


def _state() -> dict[str, float]:
    torch.cuda.synchronize()
    stats = torch.cuda.memory_stats()
    sizes = {
        "free": torch.cuda.mem_get_info()[0],
        "reserved": torch.cuda.memory_reserved(),
        "peak": torch.cuda.max_memory_allocated(),
    }
    return {f"{name}_gib": round(size / 2**30, 3) for name, size in sizes.items()} | {
        "retries": stats["num_alloc_retries"]
    }


if __name__ == "__main__":
    main()
