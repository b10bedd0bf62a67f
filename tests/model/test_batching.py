"""Index arithmetic of a step against brute force: every source row is the position it should be."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.cache.geometry import CSA_RING, HCA_RING, RESTORED, SLOT_ROWS, CacheCapacity, CacheGeometry
from triptych.config import ModelShape
from triptych.engine.batching import build_batch
from triptych.engine.pools import Pools
from triptych.kernels.compress.ref import ABSENT
from triptych.kernels.window.ref import WindowPlan
from triptych.words import Chunk, SnapshotWrite

SHAPE = ModelShape(
    vocab_size=64, hidden_size=8, ratios=(0, 4, 128), num_heads=2, head_dim=4, rope_dim=2, q_lora_rank=4, o_groups=1,
    o_lora_rank=2, index_heads=2, index_head_dim=4, index_topk=4, num_experts=2, experts_per_token=1,
    moe_intermediate_size=4, num_hash_layers=0, routed_scaling=1.0,
)  # fmt: skip
GEOMETRY = CacheGeometry.of(SHAPE, "float32")
K = GEOMETRY.snapshot_frames
POOLS = Pools(SHAPE, GEOMETRY, CacheCapacity(frames=64 + 3 * K, slots=4))


def snapshot_frames(number: int) -> tuple[int, ...]:
    """Frames of the n-th snapshot, beyond the pages."""
    return tuple(range(64 + number * K, 64 + (number + 1) * K))


@st.composite
def chunk_lists(draw: st.DrawFn) -> list[Chunk]:
    chunks = []
    for slot in draw(st.permutations(range(4)))[: draw(st.integers(1, 4))]:
        start = draw(st.one_of(st.integers(0, 900), st.sampled_from([0, 1, 3, 4, 124, 127, 128, 252, 508])))
        end = start + draw(st.one_of(st.integers(1, 400), st.just(1)))
        read_from = draw(st.sampled_from([0, max(0, start - RESTORED), start, start // 2]))
        write_from = draw(st.sampled_from([0, start // 128 * 128, end // 128 * 128]))
        bounds = [c for c in range(128, end + 1, 128) if c > start]
        snaps = (
            tuple(SnapshotWrite(c, snapshot_frames(slot)) for c in bounds[-1:])
            if draw(st.booleans()) and slot < 3
            else ()
        )
        pages = np.asarray(draw(st.permutations(range(64)))[: -(-end // 128)], np.int32)
        tokens = np.arange(start, end, dtype=np.int32) % 64
        chunks.append(
            Chunk(f"r{slot}", slot, start, end, tokens, pages, write_from, read_from, snapshots=snaps, samples=True)
        )
    return chunks


@settings(max_examples=80, deadline=None)
@given(chunk_lists())
def test_window_rows_are_the_positions_they_stand_for(chunks: list[Chunk]) -> None:
    plan = build_batch(chunks, POOLS).window
    ring_position = {}  # flat ring row of layer 0 -> (slot, position mod ring)
    workspace = np.full((plan.total, 2), -1)
    positions = [(c.slot, p) for c in chunks for p in range(c.start, c.end)]
    for row, (slot, position) in zip(plan.step_dst.tolist(), positions, strict=True):
        workspace[row] = slot, position
    for src, dst in zip(plan.past_src.tolist(), plan.past_dst.tolist(), strict=True):
        slot, rest = divmod(src, POOLS.window_stride)
        ring_position[dst] = slot, rest
    by_slot = {c.slot: c for c in chunks}
    for row, (slot, rest) in ring_position.items():
        chunk = by_slot[slot]
        position = next(p for p in range(chunk.start - 1, chunk.start - 1 - SLOT_ROWS, -1) if p % SLOT_ROWS == rest)
        assert position >= chunk.read_from
        workspace[row] = slot, position
    for r, (slot, position) in enumerate(positions):
        first, count = int(plan.first[r]), int(plan.count[r])
        low = max(by_slot[slot].read_from, position - 127)
        assert workspace[first : first + count].tolist() == [[slot, p] for p in range(low, position + 1)]
    _check_what_is_kept(chunks, plan, positions, workspace)


def _check_what_is_kept(
    chunks: list[Chunk], plan: WindowPlan, positions: list[tuple[int, int]], workspace: np.ndarray
) -> None:
    kept = {int(dst): positions[int(src)] for src, dst in zip(plan.keep_src, plan.keep_dst, strict=True)}
    for chunk in chunks:
        for p in range(max(chunk.start, chunk.end - SLOT_ROWS), chunk.end):
            assert kept[chunk.slot * POOLS.window_stride + p % SLOT_ROWS] == (chunk.slot, p)
    named = zip(plan.snap_src.tolist(), plan.snap_of.tolist(), plan.snap_row.tolist(), strict=True)
    snapped = {(tuple(plan.snap_table[of].tolist()), row): workspace[src].tolist() for src, of, row in named}
    for chunk in chunks:
        for write in chunk.snapshots:
            low = write.position - RESTORED
            for p in range(max(low, chunk.read_from), write.position - 4):
                if p >= max(chunk.read_from, chunk.start - RESTORED):
                    assert snapped[write.frames, p - low] == [chunk.slot, p]


@settings(max_examples=80, deadline=None)
@given(chunk_lists())
def test_entries_pool_the_positions_of_their_group(chunks: list[Chunk]) -> None:
    batch = build_batch(chunks, POOLS)
    positions = [(c.slot, p) for c in chunks for p in range(c.start, c.end)]
    for ratio, ring, stride, plan in (
        (4, CSA_RING, POOLS.csa_stride, batch.csa),
        (128, HCA_RING, POOLS.hca_stride, batch.hca),
    ):
        expected = []
        for chunk in chunks:
            for last in range(max(chunk.start, chunk.write_from), chunk.end):
                if (last + 1) % ratio == 0:
                    group = last // ratio
                    per_page = 128 // ratio
                    expected.append((chunk, group, int(chunk.pages[group // per_page]), group % per_page))
        got = list(zip(plan.compress.page.tolist(), plan.compress.offset.tolist(), strict=True))
        assert got == [(page, offset) for _, _, page, offset in expected]
        assert plan.first.tolist() == [group * ratio for _, group, _, _ in expected]
        for sources, (chunk, group, _, _) in zip(plan.compress.src.tolist(), expected, strict=True):
            low = group * ratio - (4 if ratio == 4 else 0)
            for position, src in zip(range(low, (group + 1) * ratio), sources, strict=True):
                if position < 0:
                    assert src == ABSENT
                elif position >= chunk.start:
                    assert positions[src] == (chunk.slot, position)
                else:
                    assert -1 - src == chunk.slot * stride + position % ring
        assert plan.visible.tolist() == [(p + 1) // ratio for _, p in positions]
