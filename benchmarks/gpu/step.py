"""Decode steps and prefill chunks of a few layers of V4-Flash's true widths: milliseconds and kernels launched.

    PYTHONPATH=src python -m benchmarks.gpu.step [--batch 1 8] [--context 8192]

Experts are fewer than the model's (bfloat16 ones of all 256 would fill the card in six layers) and the caches hold
random entries. The step is what the engine runs: batch of indices, copy to the GPU, forward; the sampler is not in it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import rows
from triptych.cache.geometry import CacheCapacity, CacheGeometry
from triptych.config import CSA_LAYER, HCA_LAYER, PAGE, SHAPES, SWA_LAYER, EngineConfig, ModelShape
from triptych.engine.pools import Pools
from triptych.engine.runner import Runner
from triptych.model.weights import ModelWeights, WeightStore
from triptych.words import Chunk, StepPlan

SHAPE = replace(
    SHAPES["flash"],
    vocab_size=8192,
    ratios=(SWA_LAYER, CSA_LAYER, HCA_LAYER, CSA_LAYER, HCA_LAYER, CSA_LAYER),
    num_experts=32,
    num_mtp_layers=0,
)
STEPS = 30
PREFILL = 1024  # rows of a prefill chunk


def main() -> None:
    """Print one line for each batch and context and append them to results/gpu_step.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--context", type=int, nargs="+", default=[8192, 131072])
    given = parser.parse_args()
    weights = random_weights(SHAPE)
    table = []
    for context in given.context:
        for batch, count in [*((batch, 1) for batch in given.batch), (1, PREFILL)]:
            table.append(measure(weights, batch, context, count))
            print(table[-1], flush=True)
    values = {"command": rows.command_of("gpu.step"), "table": table}
    rows.append("gpu_step", values, kv_bytes={"entry": 2 * SHAPE.head_dim}, threads=1)


def measure(weights: ModelWeights, batch: int, context: int, count: int = 1) -> dict[str, float | int | str]:
    """Median milliseconds of a step of `count` rows for each request, kernels launched, milliseconds that they run."""
    shape = weights.shape
    device = weights.embed.device
    geometry = CacheGeometry.of(shape, "bfloat16")
    pages = -(-(context + STEPS + count) // PAGE)
    capacity = CacheCapacity(frames=batch * pages, slots=batch)
    pools = Pools(shape, geometry, capacity, device)
    for value in vars(pools).values():
        if isinstance(value, torch.Tensor):
            value.normal_()
    runner = Runner(weights, EngineConfig(device="cuda", weight_dtype="bfloat16"), pools)
    plans = [step(i, batch, context + i, pages, count) for i in range(STEPS)]
    for plan in plans[:3]:
        runner.logits(plan)
    torch.cuda.synchronize()
    found = []
    for plan in plans:
        started = time.perf_counter()
        runner.logits(plan)
        torch.cuda.synchronize()
        found.append((time.perf_counter() - started) * 1e3)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        runner.logits(plans[1])
        torch.cuda.synchronize()
    events = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    by_name: dict[str, float] = {}
    for event in events:
        by_name[event.name[:40]] = by_name.get(event.name[:40], 0.0) + event.device_time
    longest = sorted(by_name.items(), key=lambda item: -item[1])[:8]
    return {
        **{
            "card": torch.cuda.get_device_name(),
            "layers": shape.num_layers,
            "batch": batch,
            "rows": count,
            "context": context,
        },
        **{"ms": round(statistics.median(found), 3), "kernels_ms": round(sum(by_name.values()) / 1e3, 3)},
        **{"launches_per_layer": round(len(events) / shape.num_layers, 1)},
        "longest_us": ", ".join(f"{name} {us:.0f}" for name, us in longest),
    }


def step(number: int, batch: int, position: int, pages: int, count: int) -> StepPlan:
    """`count` rows for each of `batch` sequences from `position` on; with one row that is decoding."""
    chunks = [
        Chunk(
            request_id=f"r{b}",
            slot=b,
            start=position,
            end=position + count,
            tokens=np.full(count, 7, np.int32),
            pages=np.arange(b * pages, (b + 1) * pages, dtype=np.int32),
            write_from=position,
            samples=True,
        )
        for b in range(batch)
    ]
    return StepPlan(number, tuple(chunks))


def random_weights(shape: ModelShape) -> ModelWeights:
    """Random bfloat16 weights on the GPU: the values do not matter here as long as nothing overflows."""
    store = WeightStore(shape, torch.bfloat16, mtp=False, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    for name, (size, dtype) in store.sizes().items():
        if dtype == torch.int64:
            value = torch.randint(0, shape.num_experts, size, device="cuda", generator=generator)
        else:
            value = torch.randn(size, device="cuda", generator=generator, dtype=torch.float32) * size[-1] ** -0.5
        store.place(name, value.to(dtype))
    return store.weights


if __name__ == "__main__":
    main()
