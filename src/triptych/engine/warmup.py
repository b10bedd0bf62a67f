"""Compile the kernels, and on a GPU record the decode steps, before the first request waits for them.

A miniature model with the same kinds of layers runs a chunk and a decode step: numba compiles for argument types and
memory layouts, which do not depend on sizes. Compiled code is kept on disk, so only the first start is slow.
"""

from __future__ import annotations

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from triptych.cache.geometry import RESTORED, CacheCapacity, CacheGeometry
from triptych.config import PAGE, EngineConfig, ModelShape
from triptych.engine.pools import Pools
from triptych.engine.runner import DeviceRunner, Runner
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

_RECORDING_SECONDS = 60.0  # steps that are not recorded by then are when they first come


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


def prepare(runner: DeviceRunner, config: EngineConfig) -> None:
    """Compile for a GPU by running chunks of several sizes, and record decode steps of every size."""
    rows = config.step_tokens or PAGE
    for count in sorted({1, min(rows, PAGE + 2), rows}):
        prefill(runner, count, 0)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("Recording decode steps", total=None)
        runner.steps.record_all(
            _RECORDING_SECONDS, lambda done, total: progress.update(task, completed=done, total=total)
        )
    torch.cuda.synchronize()


def prefill(runner: Runner, rows: int, position: int, requests: int = 1) -> None:
    """Run `rows` tokens at `position`, of several requests if so many; all pages are page 0: results mean nothing.

    All run in the spare slot. Whatever they write lies where nothing is kept yet.
    """
    each = rows // requests
    chunks = [_chunk(runner, each, position, position, f"warm-up {n}") for n in range(requests)]
    runner.logits(StepPlan(0, tuple(chunks)))


def record_chunk(runner: DeviceRunner, rows: int, position: int) -> None:
    """Have a small chunk behind a past recorded as a graph, as `prefill` otherwise."""
    for _ in range(2):
        runner.chunks([_chunk(runner, rows, position, max(0, position - RESTORED))])


def _chunk(runner: Runner, rows: int, position: int, read_from: int, name: str = "warm-up") -> Chunk:
    end = position + rows
    pages = np.zeros(-(-end // PAGE), np.int32)
    tokens = np.arange(rows, dtype=np.int32) % runner.model.shape.vocab_size
    return Chunk(name, runner.pools.spare_slot, position, end, tokens, pages, position, read_from, samples=True)
