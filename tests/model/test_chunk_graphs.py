"""Small batches padded to fixed shapes: the same logits and the same caches, to the bit, and few different shapes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from test_decode import SHAPE, weights
from torch import Tensor

from triptych.cache.geometry import CacheCapacity, CacheGeometry
from triptych.config import EngineConfig
from triptych.engine.batching import build_batch
from triptych.engine.chunk_graphs import padded
from triptych.engine.device import signature, sized, staged
from triptych.engine.pools import Pools
from triptych.engine.runner import Runner
from triptych.words import Chunk, SnapshotWrite, StepPlan

PAGES = 5
GEOMETRY = CacheGeometry.of(SHAPE, "float32")
SNAPSHOT = tuple(range(10, 10 + GEOMETRY.snapshot_frames))


def chunk(slot: int, start: int, end: int, write_from: int | None = None, **more: object) -> Chunk:
    tokens = np.random.default_rng(slot).integers(0, SHAPE.vocab_size, 600)[start:end].astype(np.int32)
    pages = (np.arange(PAGES)[: -(-end // 128)] * 2 + slot).astype(np.int32)
    return Chunk(f"r{slot}", slot, start, end, tokens, pages, start if write_from is None else write_from, **more)


def runner() -> Runner:
    capacity = CacheCapacity(2 * PAGES + GEOMETRY.snapshot_frames, 2)
    return Runner(weights(), EngineConfig(deterministic=True), Pools(SHAPE, GEOMETRY, capacity))


def pools_of(one: Runner) -> dict[str, Tensor]:
    return {name: value for name, value in vars(one.pools).items() if isinstance(value, Tensor)}


@pytest.mark.parametrize(
    "chunks",
    [
        [chunk(0, 300, 337, samples=True)],
        [chunk(0, 252, 390, 256, samples=True), chunk(1, 131, 150, samples=True)],
        [chunk(1, 137, 270, samples=True, snapshots=(SnapshotWrite(256, SNAPSHOT),))],
    ],
)  # fmt: skip
def test_padding_changes_nothing(chunks: Sequence[Chunk]) -> None:
    one, two = runner(), runner()
    for each in (one, two):
        for value in pools_of(each).values():
            value.zero_()
        each.logits(StepPlan(0, tuple(chunk(c.slot, 0, c.start) for c in chunks)))
    batch = build_batch(chunks, one.pools)
    wide = padded(batch, 8)
    assert wide is not None and wide.rows % 32 == 4 and wide.rows > batch.rows
    assert torch.equal(one.model.forward(batch, one.pools.layers), two.model.forward(wide, two.pools.layers))
    for name, value in pools_of(one).items():
        assert torch.equal(value, pools_of(two)[name]), name


def test_what_cannot_be_padded_runs_as_it_is() -> None:
    pools = runner().pools
    assert padded(build_batch([chunk(0, 0, 40)], pools), 8) is None  # no past to repeat
    assert padded(build_batch([chunk(0, 301, 303)], pools), 8) is None  # completes no group


def test_chunks_of_a_bucket_share_a_signature() -> None:
    pools = runner().pools
    shapes = set()
    for start, end in ((252, 500), (340, 590), (140, 380)):
        wide = padded(build_batch([chunk(0, start, end)], pools), 8)
        assert wide is not None
        shapes.add(signature(wide))
    assert len(shapes) == 1
    other = padded(build_batch([chunk(0, 252, 400)], pools), 8)
    assert other is not None and signature(other) not in shapes


def test_a_batch_is_rebuilt_from_one_vector() -> None:
    batch = build_batch([chunk(0, 252, 400), chunk(1, 0, 9)], runner().pools)
    again = sized(batch, staged(batch))
    assert signature(again) == signature(batch)
    assert torch.equal(again.csa.compress.src, batch.csa.compress.src)
    assert torch.equal(again.sampled, batch.sampled)
