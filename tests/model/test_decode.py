"""The decode path against the general one: the same rows, the same caches, the same logits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from triptych.cache.geometry import CacheCapacity, CacheGeometry
from triptych.checkpoint import random_tensors
from triptych.config import PAGE, WINDOW, EngineConfig, ModelShape
from triptych.engine.pools import Pools
from triptych.engine.runner import Runner
from triptych.model.batch import DecodeBatch
from triptych.model.weights import ModelWeights, Storage, WeightStore
from triptych.words import Chunk, StepPlan

SHAPE = ModelShape(
    vocab_size=97, hidden_size=128, ratios=(0, 4, 128, 4), num_heads=4, head_dim=96, rope_dim=16, q_lora_rank=128,
    o_groups=2, o_lora_rank=64, index_heads=32, index_head_dim=32, index_topk=16, num_experts=4, experts_per_token=2,
    moe_intermediate_size=128, num_hash_layers=1, routed_scaling=1.5, num_mtp_layers=0, max_position=4096,
)  # fmt: skip
LENGTHS = (3, 126, 250, 380)
PAGES = 4


@cache
def weights(storage: Storage = torch.float32) -> ModelWeights:
    """Random weights of SHAPE."""
    store = WeightStore(SHAPE, storage, mtp=False)
    for name, tensor in random_tensors(SHAPE, seed=1):
        store.place(name, tensor)
    return store.weights


def make_runner(storage: Storage, kv_format: Any, numerics: Any) -> Runner:
    capacity = CacheCapacity(frames=len(LENGTHS) * PAGES + 8, slots=len(LENGTHS))
    pools = Pools(SHAPE, CacheGeometry.of(SHAPE, kv_format), capacity, spare=1)
    for value in vars(pools).values():
        if isinstance(value, Tensor):
            value.fill_(float("nan") if value.is_floating_point() else 0x7F)
    return Runner(weights(storage), EngineConfig(numerics=numerics), pools)


def pages_of(sequence: int) -> np.ndarray:
    """Its pages, in no order of the pool."""
    return (np.arange(PAGES, dtype=np.int32) * len(LENGTHS) + (sequence + 1) % len(LENGTHS)).astype(np.int32)


def chunk(sequence: int, start: int, tokens: Sequence[int]) -> Chunk:
    end = start + len(tokens)
    used = pages_of(sequence)[: -(-end // PAGE)]
    return Chunk(f"r{sequence}", sequence, start, end, np.asarray(tokens, np.int32), used, start, samples=True)


def decode_batch(positions: Sequence[int], tokens: Sequence[int], padding: int, spare: int) -> DecodeBatch:
    """All sequences at their positions, and rows that only fill the batch."""
    fill = [0] * padding
    at = torch.tensor([*positions, *fill])
    table = [pages_of(s) for s in range(len(positions))] + [pages_of(0)] * padding
    return DecodeBatch(
        token_ids=torch.tensor([*tokens, *fill]),
        positions=at,
        slots=torch.tensor([*range(len(positions)), *([spare] * padding)]),
        lowest=(at - (WINDOW - 1)).clamp(min=0),
        page_table=torch.from_numpy(np.stack(table)),
        max_csa=PAGES * PAGE // 4,
        max_hca=PAGES,
    )


def both(storage: Storage, kv_format: Any, numerics: Any, steps: int) -> list[tuple[Tensor, Tensor]]:
    """Logits of the general path and of the decode path, step by step, for the same tokens, and the same caches."""
    general, fast = make_runner(storage, kv_format, numerics), make_runner(storage, kv_format, numerics)
    rng = np.random.default_rng(3)
    for runner in (general, fast):
        for s, length in enumerate(LENGTHS):
            runner.logits(StepPlan(0, (chunk(s, 0, np.random.default_rng(s).integers(0, 97, length)),)))
    out = []
    for step in range(steps):
        tokens = rng.integers(0, 97, len(LENGTHS)).tolist()
        positions = [length + step for length in LENGTHS]
        chunks = tuple(chunk(s, at, [t]) for s, (at, t) in enumerate(zip(positions, tokens, strict=True)))
        want = general.logits(StepPlan(0, chunks))
        batch = decode_batch(positions, tokens, 2, fast.pools.spare_slot)
        got = fast.model.decode(batch, fast.pools.layers)
        assert got.dtype == torch.float32 and torch.isfinite(got).all()
        out.append((want, got[: len(LENGTHS)]))
    return out


def test_exact_decode_is_the_general_path() -> None:
    for want, got in both(torch.float32, "float32", "exact", 6):
        assert torch.allclose(got, want, atol=2e-4), (got - want).abs().max()


@pytest.mark.parametrize(("storage", "kv_format"), [(torch.float32, "float32"), ("released", "fp8")])
def test_native_decode_is_near_the_general_path(storage: Storage, kv_format: str) -> None:
    found = both(storage, kv_format, "native", 6)
    want, got = torch.cat([w for w, _ in found]), torch.cat([g for _, g in found])
    assert torch.nn.functional.cosine_similarity(want, got).median() > 0.995
    # where a value lies beside a step of its format, an expert or entry flips: seldom, and then all of it moves
    assert (want.argmax(1) == got.argmax(1)).float().mean() > 0.8
