"""From a StepPlan to the Batch the model runs: index arithmetic only, in numpy, once a step for all layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from triptych.cache.geometry import CSA_RING, HCA_RING, RESTORED, SLOT_ROWS, trapezoid_start
from triptych.config import CSA_RATIO, HCA_RATIO, PAGE, WINDOW
from triptych.engine.pools import Pools
from triptych.kernels.compress.ref import ABSENT, CompressPlan
from triptych.kernels.window.ref import WindowPlan
from triptych.model.batch import Batch, EntryPlan, Narrowing
from triptych.words import Chunk

Ints = npt.NDArray[np.int64]
_NOTHING = torch.empty(0, dtype=torch.int64)


class _Rows:
    """The rows of a step in one layer as vectors over sequences [B] and rows [R]; a sequence may have none."""

    def __init__(self, chunks: Sequence[Chunk], start: Ints, read_from: Ints) -> None:
        self.chunks = chunks
        self.start = start
        self.end = _ints([c.end for c in chunks])
        self.slot = _ints([c.slot for c in chunks])
        self.read_from = read_from
        self.write_from = _ints([c.write_from for c in chunks])
        self.count = self.end - self.start
        self.first_row = _exclusive_sum(self.count)
        self.positions = _ragged(self.start, self.count)
        self.seq = np.repeat(np.arange(len(chunks)), self.count)

    @classmethod
    def of(cls, chunks: Sequence[Chunk]) -> _Rows:
        """All rows of all chunks."""
        return cls(chunks, _ints([c.start for c in chunks]), _ints([c.read_from for c in chunks]))

    def from_layer(self, layer: int, layers: int) -> _Rows:
        """The rows that `layer` runs: those of a trapezoid from its own start on (cache/geometry.py)."""
        first = _ints([trapezoid_start(c.replay_to, layers, layer) if c.replay_to else 0 for c in self.chunks])
        start = np.clip(first, self.start, self.end)
        return _Rows(self.chunks, start, np.minimum(np.maximum(self.read_from, first), start))


def build_batch(chunks: Sequence[Chunk], pools: Pools, *, all_logits: bool = False) -> Batch:
    """The Batch of these chunks. `all_logits` samples every row that reaches the last layer, for tests."""
    rows = _Rows.of(chunks)
    table = np.zeros((len(chunks), max(-(-c.end // PAGE) for c in chunks)), np.int64)
    for line, chunk in zip(table, chunks, strict=True):
        used = -(-chunk.end // PAGE)
        line[:used] = chunk.pages[:used]
    tokens = np.concatenate([c.tokens for c in chunks]).astype(np.int64)
    batch = _assemble(rows, tokens, table, pools, all_logits)
    if any(c.replay_to > c.start for c in chunks):
        return replace(batch, narrow=_narrowings(rows, tokens, table, pools, all_logits))
    return batch


def _narrowings(rows: _Rows, tokens: Ints, table: Ints, pools: Pools, all_logits: bool) -> dict[int, Narrowing]:
    """What layers run from which on fewer rows go on. A trapezoid narrows at every layer, for 127 rows each."""
    out: dict[int, Narrowing] = {}
    layers = len(pools.layers)
    for layer in range(1, layers):
        fewer = rows.from_layer(layer, layers)
        if np.array_equal(fewer.start, rows.start):
            continue
        keep = (rows.positions >= fewer.start[rows.seq]).nonzero()[0]
        rows, tokens = fewer, tokens[keep]
        out[layer] = Narrowing(_tensor(keep), _assemble(rows, tokens, table, pools, all_logits))
    return out


def _assemble(rows: _Rows, tokens: Ints, table: Ints, pools: Pools, all_logits: bool) -> Batch:
    sampled = np.arange(len(rows.seq)) if all_logits else _ints([c.samples for c in rows.chunks]).nonzero()[0]
    if not all_logits:
        sampled = (rows.first_row + rows.count - 1)[sampled]
    return Batch(
        token_ids=torch.from_numpy(tokens),
        positions=torch.from_numpy(rows.positions),
        seq=torch.from_numpy(rows.seq),
        page_table=torch.from_numpy(table),
        window=_window_plan(rows, pools),
        csa=_entry_plan(rows, table, CSA_RATIO, CSA_RING, pools.csa_stride),
        hca=_entry_plan(rows, table, HCA_RATIO, HCA_RING, pools.hca_stride),
        sampled=torch.from_numpy(sampled),
        scored=_scored(rows),
    )


def _scored(rows: _Rows) -> Tensor:
    """The rows before tokens whose log-probabilities are wanted: the first ones of their chunks."""
    counts = [0 if c.targets is None else len(c.targets) for c in rows.chunks]
    return _tensor(_ragged(rows.first_row, _ints(counts))) if any(counts) else _NOTHING


def _window_plan(rows: _Rows, pools: Pools) -> WindowPlan:
    """Where window rows come from and go to; see WindowPlan for the drawing.

    Positions of one sequence:  past_lo ........ start ........ end     past_lo = max(read_from, start - RESTORED)
    """
    past_lo = np.maximum(rows.read_from, rows.start - RESTORED)
    past = rows.start - past_lo
    base = _exclusive_sum(past + rows.count)
    past_pos = _ragged(past_lo, past)
    lowest = np.maximum(rows.read_from[rows.seq], rows.positions - (WINDOW - 1))
    keep_lo = np.maximum(rows.start, rows.end - SLOT_ROWS)
    keep_pos = _ragged(keep_lo, rows.end - keep_lo)
    keep_seq = np.repeat(np.arange(len(rows.chunks)), rows.end - keep_lo)
    snap_src, snap_row, snap_of, snap_table = _snapshot_rows(rows, base - past_lo)
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
        snap_row=snap_row,
        snap_of=snap_of,
        snap_table=snap_table,
    )


def _snapshot_rows(rows: _Rows, shift: Ints) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows [b - 132, b - 4) of each snapshot written from inside a chunk, as WindowPlan.snap_* name them.

    shift[s] maps positions of sequence s to workspace rows.
    """
    writes = [(s, chunk, write) for s, chunk in enumerate(rows.chunks) for write in chunk.snapshots]
    if not writes:
        return _NOTHING, _NOTHING, _NOTHING, _NOTHING[:, None]
    low = _ints([write.position - RESTORED for _, _, write in writes])
    sequence = _ints([s for s, _, _ in writes])
    first = np.maximum(low, rows.read_from[sequence])
    count = np.maximum(low + WINDOW - first, 0)
    of = np.repeat(np.arange(len(writes)), count)
    positions = _ragged(first, count)
    table = np.asarray([write.frames for _, _, write in writes], np.int64)
    return _tensor(positions + shift[sequence][of]), _tensor(positions - low[of]), _tensor(of), _tensor(table)


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
        max_visible=int(visible.max(initial=0)),
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
    run: Ints = np.repeat(starts - _exclusive_sum(counts), counts) + np.arange(int(counts.sum()))
    return run


# ---- decode rows in fixed shapes


def is_decode(chunk: Chunk) -> bool:
    """True for one sampled row with nothing else about it: what a DecodeBatch can hold."""
    return (
        chunk.rows == 1
        and chunk.samples
        and chunk.targets is None
        and chunk.restore is None
        and not chunk.snapshots
        and chunk.replay_to <= chunk.start
        and chunk.write_from <= chunk.start
    )


def decode_vectors(out: Ints, chunks: Sequence[Chunk], spare_slot: int) -> Ints:
    """Fill out [4, B] with tokens, positions, slots and lowest positions of the chunks, then padding; returns it.

    A token of -1 is one that only the device knows (model/batch.py says what the others mean).
    """
    n = len(chunks)
    out[0, :n] = [chunk.tokens[0] for chunk in chunks]
    out[1, :n] = [chunk.start for chunk in chunks]
    out[2, :n] = [chunk.slot for chunk in chunks]
    out[3, :n] = [chunk.read_from for chunk in chunks]
    np.maximum(out[3, :n], out[1, :n] - (WINDOW - 1), out=out[3, :n])
    out[:, n:] = 0
    out[2, n:] = spare_slot
    return out


class Staging:
    """Two host buffers of `size` int64 that take turns, so that one is filled while the other is being copied."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._buffers = [torch.zeros(size, dtype=torch.int64, pin_memory=self._cuda) for _ in range(2)]
        self._copied = [torch.cuda.Event() if self._cuda else None for _ in range(2)]
        self._turn = 0

    @contextmanager
    def turn(self) -> Iterator[Ints]:
        """The next buffer, to be filled; waits for its last copy, which is two steps old."""
        self._turn ^= 1
        event = self._copied[self._turn]
        if event is not None:
            event.synchronize()
        yield self._buffers[self._turn].numpy()

    def send(self, size: int, target: Tensor) -> None:
        """Copy the first `size` numbers of the buffer whose turn it is into target."""
        target[:size].copy_(self._buffers[self._turn][:size], non_blocking=True)
        event = self._copied[self._turn]
        if event is not None:
            event.record()


class PageTables:
    """Each slot's pages on the device [slots, pages] int32; only what changed is sent.

    A request's table grows at its end and is replaced by another array when anything else of it changes.
    """

    def __init__(self, slots: int, pages: int, device: torch.device) -> None:
        self.device = torch.zeros(slots, pages, dtype=torch.int32, device=device)
        self._sent: list[tuple[object, int]] = [(None, 0)] * slots

    def update(self, chunks: Sequence[Chunk]) -> None:
        """Bring the lines of these chunks' slots up to date, as far as their rows read."""
        places, pages = [], []
        for chunk in chunks:
            source = chunk.pages if chunk.pages.base is None else chunk.pages.base
            need = -(-chunk.end // PAGE)
            known = self._sent[chunk.slot][1] if self._sent[chunk.slot][0] is source else 0
            if need > known:
                places.append(np.arange(known, need) + chunk.slot * self.device.shape[1])
                pages.append(chunk.pages[known:need])
                self._sent[chunk.slot] = source, need
        if places:
            at, new = (to_device(np.concatenate(part), self.device.device) for part in (places, pages))
            self.device.view(-1).index_copy_(0, at, new)


def to_device(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A vector on `device`, which the host does not wait for."""
    there = torch.from_numpy(np.ascontiguousarray(values))
    return there if device.type == "cpu" else there.pin_memory().to(device, non_blocking=True)
