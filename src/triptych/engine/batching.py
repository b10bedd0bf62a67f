"""From a StepPlan to the Batch the model runs: index arithmetic only, in numpy, once a step for all layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from triptych.cache.geometry import CSA_RING, HCA_RING, LOOKBACK, SLOT_ROWS
from triptych.config import CSA_RATIO, HCA_RATIO, PAGE, WINDOW
from triptych.engine.pools import SNAPSHOT_REACH, Pools
from triptych.kernels.compress.ref import ABSENT, CompressPlan
from triptych.kernels.window.ref import WindowPlan
from triptych.model.batch import Batch, EntryPlan
from triptych.words import Chunk

Ints = npt.NDArray[np.int64]


class _Rows:
    """The chunks of a step as vectors over sequences [B] and rows [R]."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self.chunks = chunks
        self.start = _ints([c.start for c in chunks])
        self.end = _ints([c.end for c in chunks])
        self.slot = _ints([c.slot for c in chunks])
        self.read_from = _ints([c.read_from for c in chunks])
        self.write_from = _ints([c.write_from for c in chunks])
        self.count = self.end - self.start
        self.first_row = _exclusive_sum(self.count)
        self.positions = _ragged(self.start, self.count)
        self.seq = np.repeat(np.arange(len(chunks)), self.count)


def build_batch(chunks: Sequence[Chunk], pools: Pools, *, all_logits: bool = False) -> Batch:
    """The Batch of these chunks. `all_logits` samples every row, for tests."""
    rows = _Rows(chunks)
    table = np.zeros((len(chunks), max(-(-c.end // PAGE) for c in chunks)), np.int64)
    for line, chunk in zip(table, chunks, strict=True):
        used = -(-chunk.end // PAGE)
        line[:used] = chunk.pages[:used]
    sampled = np.arange(len(rows.seq)) if all_logits else _ints([c.samples for c in chunks]).nonzero()[0]
    if not all_logits:
        sampled = (rows.first_row + rows.count - 1)[sampled]
    tokens = np.concatenate([c.tokens for c in chunks]).astype(np.int64)
    return Batch(
        token_ids=torch.from_numpy(tokens),
        positions=torch.from_numpy(rows.positions),
        seq=torch.from_numpy(rows.seq),
        page_table=torch.from_numpy(table),
        window=_window_plan(rows, pools),
        csa=_entry_plan(rows, table, CSA_RATIO, CSA_RING, pools.csa_stride),
        hca=_entry_plan(rows, table, HCA_RATIO, HCA_RING, pools.hca_stride),
        sampled=torch.from_numpy(sampled),
    )


def _window_plan(rows: _Rows, pools: Pools) -> WindowPlan:
    """Where window rows come from and go to; see WindowPlan for the drawing.

    Positions of one sequence:  past_lo ........ start ........ end     past_lo = max(read_from, start - SNAPSHOT_REACH)
    """
    past_lo = np.maximum(rows.read_from, rows.start - SNAPSHOT_REACH)
    past = rows.start - past_lo
    base = _exclusive_sum(past + rows.count)
    past_pos = _ragged(past_lo, past)
    lowest = np.maximum(rows.read_from[rows.seq], rows.positions - (WINDOW - 1))
    keep_lo = np.maximum(rows.start, rows.end - SLOT_ROWS)
    keep_pos = _ragged(keep_lo, rows.end - keep_lo)
    keep_seq = np.repeat(np.arange(len(rows.chunks)), rows.end - keep_lo)
    snap_src, snap_dst = _snapshot_rows(rows, base - past_lo, pools.snapshot_stride)
    return WindowPlan(
        total=int((past + rows.count).sum()),
        past_src=_tensor(np.repeat(rows.slot, past) * pools.window_stride + past_pos % SLOT_ROWS),
        past_dst=_tensor(_ragged(base, past)),
        step_dst=_tensor(_ragged(base + past, rows.count)),
        first=_tensor((base - past_lo)[rows.seq] + lowest),
        count=_tensor(rows.positions - lowest + 1),
        keep_src=_tensor((rows.first_row - rows.start)[keep_seq] + keep_pos),
        keep_dst=_tensor(rows.slot[keep_seq] * pools.window_stride + keep_pos % SLOT_ROWS),
        snap_src=snap_src,
        snap_dst=snap_dst,
    )


def _snapshot_rows(rows: _Rows, shift: Ints, stride: int) -> tuple[Tensor, Tensor]:
    """Rows [b - 132, b - 4) of each snapshot written from inside a chunk; shift[s] maps positions to workspace rows."""
    src, dst = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for s, chunk in enumerate(rows.chunks):
        for write in chunk.snapshots:
            low = write.position - SNAPSHOT_REACH
            pos = np.arange(max(low, chunk.read_from), write.position - LOOKBACK)
            src.append(pos + shift[s])
            dst.append(pos - low + write.snapshot * stride)
    return _tensor(np.concatenate(src)), _tensor(np.concatenate(dst))


def _entry_plan(rows: _Rows, table: Ints, ratio: int, ring: int, stride: int) -> EntryPlan:
    """Groups whose last token lies in [max(start, write_from), end): pooled from this step's rows and the ring.

    A group ends inside the range exactly for g in [max(start, write_from) // m, end // m).
    """
    group_lo = np.maximum(rows.start, rows.write_from) // ratio
    groups = np.maximum(rows.end // ratio - group_lo, 0)
    g = _ragged(group_lo, groups)
    seq = np.repeat(np.arange(len(rows.chunks)), groups)
    per_page = PAGE // ratio
    keep_lo = np.maximum(rows.start, rows.end - ring)
    keep_pos = _ragged(keep_lo, rows.end - keep_lo)
    keep_seq = np.repeat(np.arange(len(rows.chunks)), rows.end - keep_lo)
    visible = (rows.positions + 1) // ratio
    return EntryPlan(
        compress=CompressPlan(
            src=_tensor(_group_sources(rows, g, seq, ratio, ring, stride)),
            page=_tensor(table[seq, g // per_page]),
            offset=_tensor(g % per_page),
            phase=_tensor(rows.positions % ratio),
            keep_src=_tensor((rows.first_row - rows.start)[keep_seq] + keep_pos),
            keep_dst=_tensor(rows.slot[keep_seq] * stride + keep_pos % ring),
        ),
        first=_tensor(g * ratio),
        visible=_tensor(visible),
        max_visible=int(visible.max()),
    )


def _group_sources(rows: _Rows, g: Ints, seq: Ints, ratio: int, ring: int, stride: int) -> Ints:
    """The rows that each group pools [E, k], as CompressPlan.src names them. CSA also pools the group before."""
    reach = ring if ratio == CSA_RATIO else ratio
    if not len(g):  # most decode steps complete no group
        return np.empty((0, reach), np.int64)
    pos = (g * ratio + ratio - reach)[:, None] + np.arange(reach)
    in_step = (rows.first_row - rows.start)[seq][:, None] + pos
    in_ring = -1 - ((rows.slot[seq] * stride)[:, None] + pos % ring)
    return np.where(pos >= rows.start[seq][:, None], in_step, np.where(pos >= 0, in_ring, ABSENT))


def _ints(values: Sequence[int]) -> Ints:
    return np.asarray(values, np.int64)


def _tensor(values: Ints) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


def _exclusive_sum(counts: Ints) -> Ints:
    return np.cumsum(counts) - counts


def _ragged(starts: Ints, counts: Ints) -> Ints:
    """[s0, s0+1, ... s0+n0-1, s1, ...]: one run of consecutive integers per pair."""
    return np.repeat(starts - _exclusive_sum(counts), counts) + np.arange(int(counts.sum()))
