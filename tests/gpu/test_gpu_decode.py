"""Decode steps on the GPU against the processor's, from the same caches, bit for bit the same prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from test_gpu_engine import NARROW_FLASH
from torch import Tensor

from triptych.cache.geometry import CacheCapacity, CacheGeometry
from triptych.checkpoint import random_tensors
from triptych.config import PAGE, WINDOW, EngineConfig
from triptych.engine.pools import Pools
from triptych.engine.runner import Runner
from triptych.model.batch import DecodeBatch
from triptych.model.weights import Storage, WeightStore
from triptych.words import Chunk, StepPlan

SHAPE = replace(NARROW_FLASH, index_topk=64)
LENGTHS = (3, 126, 280)  # the last one sees more entries than it may read
PAGES = 3
CUDA = torch.device("cuda")


def runner_on(device: str, storage: Storage, kv_format: Any, index_format: Any) -> Runner:
    store = WeightStore(SHAPE, storage, mtp=False, device=device)
    for name, tensor in random_tensors(SHAPE, seed=1):
        store.place(name, tensor)
    geometry = CacheGeometry.of(SHAPE, kv_format, index_format)
    pools = Pools(SHAPE, geometry, CacheCapacity(len(LENGTHS) * PAGES, len(LENGTHS)), torch.device(device), spare=1)
    return Runner(store.weights, EngineConfig(numerics="native", device=device), pools)


def pages_of(sequence: int) -> np.ndarray:
    return (np.arange(PAGES) * len(LENGTHS) + (sequence + 1) % len(LENGTHS)).astype(np.int32)


@cache
def prompted(kv_format: str, index_format: str) -> Runner:
    """A runner on the processor that has run all prompts."""
    runner = runner_on("cpu", "released", kv_format, index_format)
    for value in vars(runner.pools).values():
        if isinstance(value, Tensor):
            value.fill_(0)
    for s, length in enumerate(LENGTHS):
        for start in range(0, length, 256):
            end = min(start + 256, length)
            tokens = np.random.default_rng(s).integers(0, 1024, length)[start:end].astype(np.int32)
            pages = pages_of(s)[: -(-end // PAGE)]
            runner.logits(StepPlan(0, (Chunk(f"r{s}", s, start, end, tokens, pages, start, samples=True),)))
    return runner


def batch(step: int, padding: int, device: torch.device) -> DecodeBatch:
    """All sequences at their positions, and rows that only fill the batch."""
    rows = len(LENGTHS)
    tokens = np.random.default_rng(100 + step).integers(0, 1024, rows)
    at = torch.tensor([*(length + step for length in LENGTHS), *[0] * padding], device=device)
    table = np.stack([*(pages_of(s) for s in range(rows)), *[pages_of(0)] * padding])
    return DecodeBatch(
        token_ids=torch.tensor([*tokens, *[0] * padding], device=device),
        positions=at,
        slots=torch.tensor([*range(rows), *[rows] * padding], device=device),
        lowest=(at - (WINDOW - 1)).clamp(min=0),
        page_table=torch.from_numpy(table).to(device),
        max_csa=PAGES * PAGE // 4,
        max_hca=PAGES,
    )


def copy_pools(source: Runner, target: Runner) -> None:
    for name, value in vars(source.pools).items():
        if isinstance(value, Tensor):
            getattr(target.pools, name).copy_(value)


def near(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """A value beside a step of its format may fall to the other side; then an expert or entry flips, and all moves.

    With random weights that is not rare: the processor's own two paths agree no better.
    """
    one, truth = torch.cat([g.cpu() for g in got]), torch.cat(list(want))
    closeness = torch.nn.functional.cosine_similarity(one, truth)
    agree = (one.argmax(1) == truth.argmax(1)).float().mean()
    print(f"cosine min {closeness.min():.5f} median {closeness.median():.5f}, same token {agree:.3f}", flush=True)
    assert torch.isfinite(one).all() and closeness.median() > 0.99 and agree > 0.5


@pytest.mark.parametrize("index_format", ["fp8", "mxfp4"])
def test_decode_steps_are_the_processors(index_format: str) -> None:
    cpu = prompted("fp8", index_format)
    start = {name: value.clone() for name, value in vars(cpu.pools).items() if isinstance(value, Tensor)}
    gpu = runner_on("cuda", "released", "fp8", index_format)
    copy_pools(cpu, gpu)
    rows = len(LENGTHS)
    want = [cpu.model.decode(batch(i, 2, torch.device("cpu")), cpu.pools.layers)[:rows] for i in range(5)]
    got = [gpu.model.decode(batch(i, 2, CUDA), gpu.pools.layers)[:rows].clone() for i in range(5)]
    for name, value in start.items():
        getattr(cpu.pools, name).copy_(value)
    near(got, want)


def test_prompts_in_chunks_are_the_processors() -> None:
    """The general path in bf16 tensors: two prompts in chunks of 150 and 100, all logits."""
    cpu, gpu = runner_on("cpu", "released", "fp8", "fp8"), runner_on("cuda", "released", "fp8", "fp8")
    want, got = [], []
    for start, end in ((0, 150), (150, 250)):
        chunks = []
        for s in range(2):
            tokens = np.random.default_rng(s).integers(0, 1024, 250)[start:end].astype(np.int32)
            pages = pages_of(s)[: -(-end // PAGE)]
            chunks.append(Chunk(f"r{s}", s, start, end, tokens, pages, start, samples=True))
        want.append(cpu.all_logits(StepPlan(0, tuple(chunks))))
        got.append(gpu.all_logits(StepPlan(0, tuple(chunks))))
    near(got, want)


@torch.inference_mode()
def test_a_captured_step_is_the_eager_one() -> None:
    cpu, gpu = prompted("fp8", "fp8"), runner_on("cuda", "released", "fp8", "fp8")
    copy_pools(cpu, gpu)
    eager = [gpu.model.decode(batch(i, 2, CUDA), gpu.pools.layers).clone() for i in range(5)]
    copy_pools(cpu, gpu)
    static = batch(0, 2, CUDA)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = gpu.model.decode(static, gpu.pools.layers)
    copy_pools(cpu, gpu)
    for step, want in enumerate(eager):
        now = batch(step, 2, CUDA)
        for name in ("token_ids", "positions", "slots", "lowest", "page_table"):
            getattr(static, name).copy_(getattr(now, name))
        logits.fill_(float("nan"))
        graph.replay()
        assert torch.equal(logits[: len(LENGTHS)], want[: len(LENGTHS)]), step


def test_a_row_does_not_depend_on_its_batch() -> None:
    """The kernels between products: the same row alone and among others."""
    from triptych.kernels.mhc import triton as mhc
    from triptych.kernels.mhc.ref import MhcSite, Residual

    g = torch.Generator(device="cuda").manual_seed(1)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, device="cuda", generator=g)

    site = MhcSite(randn(24, 4096) / 64, randn(24), randn(3), 20, 1e-6, 1e-6)
    y, streams = randn(65, 1024).bfloat16(), randn(65, 4, 1024).bfloat16()
    before, norm = Residual(streams, randn(65, 4), randn(65, 4, 4).abs()), randn(1024)
    together = mhc.mhc_rows(y, before, site, norm)
    for rows in (slice(0, 1), slice(17, 20), slice(30, 65)):
        alone = mhc.mhc_rows(y[rows], Residual(*(t[rows].contiguous() for t in before)), site, norm)
        assert all(torch.equal(a, b[rows]) for a, b in zip(alone, together, strict=True))
