"""python -m benchmarks planned_memory: peak memory of a running engine against what the planner said.

Each case runs in a process of its own: a small engine of the same kind warms every kernel, and the peak so far is what
interpreter, libraries and kernels take. Beyond that, weights, slots, pages and a step's activations are planned (twice
the planner's bytes, which are for BF16). Pools are touched as a whole, then a prompt is prefilled in steps and decoded.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks import rows
from triptych.cache.geometry import CacheCapacity, CacheGeometry, plan_capacity
from triptych.config import CSA_LAYER, HCA_LAYER, SHAPES, SWA_LAYER, EngineConfig, ModelShape
from triptych.engine.pools import Pools
from triptych.engine.runner import Runner
from triptych.engine.warmup import warm_up
from triptych.model.weights import ModelWeights, WeightStore
from triptych.planner.capacity import Usage, activation_bytes
from triptych.planner.layout import layout_for
from triptych.planner.models import TINY_CONFIG, of_shape
from triptych.words import Chunk, StepPlan

STEP, PROMPT = 512, 4096

CASES: dict[str, tuple[ModelShape, int]] = {
    "tiny": (ModelShape.from_file(TINY_CONFIG), 1 << 30),
    # Flash's widths with one layer of each kind and a few experts, so that weights fit a small machine
    "flash-narrow": (
        replace(
            SHAPES["flash"],
            ratios=(SWA_LAYER, CSA_LAYER, HCA_LAYER),
            num_experts=8,
            vocab_size=4096,
            num_hash_layers=0,
            num_mtp_layers=0,
        ),
        1 << 30,
    ),
}


def main(argv: list[str]) -> int:
    """Measure all cases in fresh processes, print and write a row each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks planned_memory", description=__doc__)
    parser.add_argument("--case", choices=CASES, help="measure this one here and print JSON")
    parser.add_argument("--dry", action="store_true", help="write no row")
    given = parser.parse_args(argv)
    if given.case:
        print(json.dumps(measure(given.case)))
        return 0
    for case in CASES:
        command = [sys.executable, "-m", "benchmarks", "planned_memory", "--case", case]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(case, found)
        if not given.dry:
            pools = {"pools": found["cache_bytes"]}
            rows.append("planned_memory", {"case": case, **found}, kv_bytes=pools, threads=1)
    return 0


def measure(case: str) -> dict[str, Any]:
    """Planned and measured peak of one case, in bytes."""
    torch.set_num_threads(1)
    shape, memory = CASES[case]
    config = EngineConfig(max_running=4, step_tokens=STEP)
    warm_up(config)
    small = replace(shape, vocab_size=256, num_experts=2, experts_per_token=2, moe_intermediate_size=64)
    small = replace(small, hidden_size=256, q_lora_rank=128, o_lora_rank=64, num_mtp_layers=0)
    _run(small, config, CacheCapacity(frames=64, slots=4), 256)
    before = _peak()
    model = of_shape(case, shape, "float32", None, "float32")
    usage = Usage(config.max_running, STEP, PROMPT)
    planned = before + model.weight_bytes + memory + activation_bytes(model, layout_for(model, 1), usage) * 2
    granted = plan_capacity(CacheGeometry.of(shape, "float32"), memory, config.max_running)
    cache_bytes = _run(shape, config, granted, PROMPT)
    measured = _peak()
    return {
        "process_bytes": before,
        "weight_bytes": model.weight_bytes,
        "cache_bytes": cache_bytes,
        "planned_bytes": int(planned),
        "measured_bytes": measured,
        "off": round(planned / measured - 1, 4),
    }


def _run(shape: ModelShape, config: EngineConfig, capacity: CacheCapacity, length: int) -> int:
    """Prefill `length` tokens in steps and decode one; returns the bytes of the pools, all of which were touched."""
    pools = Pools(shape, CacheGeometry.of(shape, "float32"), capacity)
    for tensor in (pools.frames, pools.window, pools._csa, pools._index, pools._hca):
        tensor.zero_()
    runner = Runner(_weights(shape), config, pools)
    text = np.random.default_rng(0).integers(0, shape.vocab_size, length).astype(np.int32)
    pages = np.arange(-(-length // 128) + 1, dtype=np.int32)
    cuts = [*range(0, length - 1, STEP), length - 1, length]
    for step, (start, end) in enumerate(itertools.pairwise(cuts)):
        chunk = Chunk("r", 0, start, end, text[start:end], pages, write_from=start, samples=end == length)
        runner.logits(StepPlan(step, (chunk,)))
    return pools.nbytes


def _weights(shape: ModelShape) -> ModelWeights:
    """Small random values everywhere: only their size matters here."""
    store = WeightStore(shape, torch.float32, mtp=shape.num_mtp_layers > 0)
    for target in store._targets.values():
        if target.is_floating_point():
            target.uniform_(-0.02, 0.02)
        else:
            target.zero_()
    return store.weights


def _peak() -> int:
    """Peak resident bytes of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
