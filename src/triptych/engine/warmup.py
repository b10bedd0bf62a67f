"""Compile the kernels before the first request waits for them.

A miniature model with the same kinds of layers runs a chunk and a decode step: numba compiles for argument types and
memory layouts, which do not depend on sizes. Compiled code is kept on disk, so only the first start is slow.
"""

from __future__ import annotations

import numpy as np
import torch

from triptych.cache.geometry import CacheCapacity, CacheGeometry
from triptych.config import EngineConfig, ModelShape
from triptych.engine.pools import Pools
from triptych.engine.runner import Runner
from triptych.model.weights import WeightStore
from triptych.words import Chunk, SnapshotWrite, StepPlan

_MINIATURE = ModelShape(
    vocab_size=16,
    hidden_size=8,
    ratios=(0, 4, 128),
    num_heads=2,
    head_dim=8,
    rope_dim=2,
    q_lora_rank=4,
    o_groups=2,
    o_lora_rank=2,
    index_heads=2,
    index_head_dim=32,
    index_topk=4,
    num_experts=2,
    experts_per_token=1,
    moe_intermediate_size=4,
    num_hash_layers=1,
    routed_scaling=1.0,
    num_mtp_layers=0,
)


def warm_up(config: EngineConfig) -> None:
    """Run every kernel that `config` selects once, on a model of a few kilobytes."""
    store = WeightStore(_MINIATURE)
    for name, (size, dtype) in store.sizes().items():
        store.place(name, torch.zeros(size, dtype=dtype))
    geometry = CacheGeometry.of(_MINIATURE, config.cache.kv_format, config.cache.index_format)
    capacity = CacheCapacity(frames=16 + geometry.snapshot_frames, slots=3)
    runner = Runner(store.weights, config, Pools(_MINIATURE, geometry, capacity))
    pages = np.arange(16, dtype=np.int32)

    def chunk(slot: int, start: int, end: int, snapshots: tuple[SnapshotWrite, ...] = ()) -> Chunk:
        tokens = np.zeros(end - start, np.int32)
        table = pages[8 * (slot % 2) :][: -(-end // 128)]
        return Chunk(f"r{slot}", slot, start, end, tokens, table, start, snapshots=snapshots, samples=True)

    # many rows take other kernels than few rows: a long chunk, then decode rows beside a short one
    runner.logits(StepPlan(1, (chunk(0, 0, 600, (SnapshotWrite(256, tuple(range(16, capacity.frames))),)),)))
    runner.logits(StepPlan(2, (chunk(0, 600, 601), chunk(1, 0, 3))))
