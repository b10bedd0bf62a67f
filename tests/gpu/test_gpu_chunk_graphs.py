"""A small chunk by a graph: as without one, the first time, when it is recorded and when it is replayed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_gpu_decode import SHAPE as NARROW
from torch import Tensor

from triptych.cache.geometry import CacheCapacity, CacheGeometry
from triptych.checkpoint import random_tensors
from triptych.config import EngineConfig
from triptych.engine.batching import build_batch
from triptych.engine.device import on_device
from triptych.engine.pools import Pools
from triptych.engine.runner import DeviceRunner
from triptych.model.weights import WeightStore, in_tiles
from triptych.words import Chunk

PAGES, START = 8, 250
SHAPE = replace(NARROW, moe_intermediate_size=256)
"""With experts that many rows take in tiles, as released models have: others wait for the GPU, and no graph may."""


def chunk(sequence: int, start: int, end: int) -> Chunk:
    tokens = np.random.default_rng(sequence).integers(0, 1024, PAGES * 128)[start:end].astype(np.int32)
    pages = np.arange(PAGES, dtype=np.int32)[: -(-end // 128)] * 2 + sequence
    return Chunk(f"r{sequence}", sequence, start, end, tokens, pages, start, samples=True)


@pytest.mark.parametrize("ends", [(291, 340), (900, 640)], ids=("few rows", "many rows"))
@torch.inference_mode()
def test_a_chunk_by_a_graph_is_the_chunk(ends: tuple[int, int]) -> None:
    store = WeightStore(SHAPE, "released", mtp=False, device="cuda")
    for name, tensor in random_tensors(SHAPE, seed=1):
        store.place(name, tensor)
    config = EngineConfig(numerics="native", device="cuda", max_running=2, max_context=PAGES * 128)
    geometry = CacheGeometry.of(SHAPE, "fp8", "fp8")
    pools = Pools(SHAPE, geometry, CacheCapacity(2 * PAGES, 2), torch.device("cuda"), spare=1)
    runner = DeviceRunner(in_tiles(store.weights), config, pools, capture=True)
    memory = [value for value in vars(pools).values() if isinstance(value, Tensor)]
    for value in memory:
        value.zero_()
    runner.chunks([chunk(s, 0, START) for s in (0, 1)])
    before = [value.clone() for value in memory]
    new = [chunk(s, START, end) for s, end in enumerate(ends)]
    plain = runner.model.forward(on_device(build_batch(new, pools), pools.device), pools.layers).clone()
    got, caches = [], []
    for _ in range(4):
        for value, old in zip(memory, before, strict=True):
            value.copy_(old)
        got.append(runner.chunks(new).clone())
        caches.append([value.clone() for value in memory])
    assert runner._graphs is not None and len(runner._graphs._graphs) == 1 and runner._graphs._works
    # other sizes may mean other tiles, and random weights make much of a last bit
    assert torch.nn.functional.cosine_similarity(got[0], plain).min() > 0.95
    for logits, cache in zip(got[1:], caches[1:], strict=True):
        assert torch.equal(logits, got[0])
        assert all(torch.equal(a, b) for a, b in zip(cache, caches[0], strict=True))
