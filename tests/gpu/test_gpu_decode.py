"""Decode steps on the GPU: against the general path from the same caches, and captured against eager."""

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
from triptych.model.weights import Storage, WeightStore, in_tiles
from triptych.words import Chunk, StepPlan

SHAPE = replace(NARROW_FLASH, index_topk=64)
LENGTHS = (3, 126, 280)  # the last one sees more entries than it may read
PAGES = 3
CUDA = torch.device("cuda")
ROW_BY_ROW = ("token_ids", "positions", "slots", "lowest", "page_table")


def runner_on(device: str, storage: Storage, kv_format: Any, index_format: Any) -> Runner:
    store = WeightStore(SHAPE, storage, mtp=False, device=device)
    for name, tensor in random_tensors(SHAPE, seed=1):
        store.place(name, tensor)
    geometry = CacheGeometry.of(SHAPE, kv_format, index_format)
    pools = Pools(SHAPE, geometry, CacheCapacity(len(LENGTHS) * PAGES, len(LENGTHS)), torch.device(device), spare=1)
    weights = in_tiles(store.weights) if device == "cuda" else store.weights
    return Runner(weights, EngineConfig(numerics="native", device=device), pools)


def pages_of(sequence: int) -> np.ndarray:
    return (np.arange(PAGES) * len(LENGTHS) + (sequence + 1) % len(LENGTHS)).astype(np.int32)


@cache
def prompted(index_format: str) -> Runner:
    """A runner that has run all prompts."""
    runner = runner_on("cuda", "released", "fp8", index_format)
    for value in vars(runner.pools).values():
        if isinstance(value, Tensor):
            value.fill_(0)
    for s, length in enumerate(LENGTHS):
        tokens = np.random.default_rng(s).integers(0, 1024, length).astype(np.int32)
        runner.logits(StepPlan(0, (chunk(s, 0, tokens),)))
    return runner


def chunk(sequence: int, start: int, tokens: np.ndarray) -> Chunk:
    end = start + len(tokens)
    pages = pages_of(sequence)[: -(-end // PAGE)]
    return Chunk(f"r{sequence}", sequence, start, end, tokens.astype(np.int32), pages, start, samples=True)


def tokens_of(step: int) -> np.ndarray:
    return np.random.default_rng(100 + step).integers(0, 1024, len(LENGTHS))


def batch(step: int, padding: int, device: torch.device) -> DecodeBatch:
    """All sequences at their positions, and rows that only fill the batch."""
    rows = len(LENGTHS)
    tokens = tokens_of(step)
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


def only(sequence: int, given: DecodeBatch) -> DecodeBatch:
    """One row of a batch."""
    return replace(given, **{name: getattr(given, name)[sequence : sequence + 1].clone() for name in ROW_BY_ROW})


def copy_pools(source: Runner, target: Runner) -> None:
    for name, value in vars(source.pools).items():
        if isinstance(value, Tensor):
            getattr(target.pools, name).copy_(value)


def near(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """A value beside a step of its format may fall to the other side; then an expert or entry flips, and all moves.

    With random weights that is not rare.
    """
    one, truth = torch.cat([g.cpu() for g in got]), torch.cat(list(want))
    closeness = torch.nn.functional.cosine_similarity(one, truth)
    agree = (one.argmax(1) == truth.argmax(1)).float().mean()
    print(f"cosine min {closeness.min():.5f} median {closeness.median():.5f}, same token {agree:.3f}", flush=True)
    assert torch.isfinite(one).all() and closeness.median() > 0.99 and agree > 0.5


@pytest.mark.parametrize("index_format", ["fp8", "mxfp4"])
def test_decode_steps_are_the_general_path(index_format: str) -> None:
    start = prompted(index_format)
    general, fast = (runner_on("cuda", "released", "fp8", index_format) for _ in range(2))
    copy_pools(start, general)
    copy_pools(start, fast)
    rows, want, got = len(LENGTHS), [], []
    for step in range(5):
        chunks = [chunk(s, length + step, tokens_of(step)[s : s + 1]) for s, length in enumerate(LENGTHS)]
        want.append(general.logits(StepPlan(0, tuple(chunks))).cpu())
        got.append(fast.model.decode(batch(step, 2, CUDA), fast.pools.layers)[:rows].clone())
    near(got, want)


@torch.inference_mode()
def test_a_captured_step_is_the_eager_one() -> None:
    start, gpu = prompted("fp8"), runner_on("cuda", "released", "fp8", "fp8")
    copy_pools(start, gpu)
    eager = [gpu.model.decode(batch(i, 2, CUDA), gpu.pools.layers).clone() for i in range(5)]
    copy_pools(start, gpu)
    static = batch(0, 2, CUDA)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = gpu.model.decode(static, gpu.pools.layers)
    copy_pools(start, gpu)
    for step, want in enumerate(eager):
        now = batch(step, 2, CUDA)
        for name in ROW_BY_ROW:
            getattr(static, name).copy_(getattr(now, name))
        logits.fill_(float("nan"))
        graph.replay()
        assert torch.equal(logits[: len(LENGTHS)], want[: len(LENGTHS)]), step


@torch.inference_mode()
def test_steps_of_a_single_row_are_the_general_path() -> None:
    """It has launches of its own, some of which begin before the last one has ended."""
    start, last = prompted("fp8"), len(LENGTHS) - 1
    general, fast = (runner_on("cuda", "released", "fp8", "fp8") for _ in range(2))
    copy_pools(start, general)
    copy_pools(start, fast)
    static, graph = only(last, batch(0, 0, CUDA)), torch.cuda.CUDAGraph()
    fast.model.decode(static, fast.pools.layers)
    with torch.cuda.graph(graph):
        logits = fast.model.decode(static, fast.pools.layers)
    copy_pools(start, fast)
    want, got = [], []
    for step in range(8):
        tokens = tokens_of(step)[last:]
        want.append(general.logits(StepPlan(0, (chunk(last, LENGTHS[last] + step, tokens),))).cpu())
        now = only(last, batch(step, 0, CUDA))
        for name in ROW_BY_ROW:
            getattr(static, name).copy_(getattr(now, name))
        logits.fill_(float("nan"))
        graph.replay()
        got.append(logits.clone())
    near(got, want)


def test_a_row_does_not_depend_on_its_batch() -> None:
    """The kernels between products: the same rows among few and many. A single row has launches of its own."""
    from triptych.kernels.mhc import triton as mhc
    from triptych.kernels.mhc.ref import MhcSite, Residual

    g = torch.Generator(device="cuda").manual_seed(1)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, device="cuda", generator=g)

    site = MhcSite(randn(24, 4096) / 64, randn(24), randn(3), 20, 1e-6, 1e-6)
    y, streams = randn(65, 1024).bfloat16(), randn(65, 4, 1024).bfloat16()
    before, norm = Residual(streams, randn(65, 4), randn(65, 4, 4).abs()), randn(1024)
    together = mhc.mhc_rows(y, before, site, norm)
    for rows in (slice(0, 2), slice(17, 20), slice(30, 65)):
        apart = mhc.mhc_rows(y[rows], Residual(*(t[rows].contiguous() for t in before)), site, norm)
        assert all(torch.equal(a, b[rows]) for a, b in zip(apart, together, strict=True))
