"""Attention for NVIDIA GPUs: each program takes one query row, some heads and a stretch of its keys.

    keys of row r   | window rows | entries: the selected ones, or all visible ones |
    split s          [-- s = 0 --][-- s = 1 --][-- s = 2 --] ...    equal shares of this row's own keys

One pass writes each split's unnormalised sum with its maximum and weight, a second one combines them with the sink.
A single split needs no second pass. The one KV head serves all query heads, so a key is read once for all of them.
Keys of bfloat16 are multiplied as such, with float32 sums; of float32 with three tf32 products, as exact as float32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from triptych.kernels.attend.ref import Attention, WindowRows
from triptych.kernels.attend_rows.triton import attend_packed
from triptych.kernels.gpu import multiprocessors
from triptych.kernels.index.ref import PagedEntries
from triptych.kernels.quant.formats import PackedRows

_LOG2E = 1.4426950408889634
_COMBINED = 128  # dims that one program of the second pass takes: with many splits more would not fit in registers
_MOST_SPLITS = 64
_KEYS = 32  # of a tile
_NO_ENTRIES, _SELECTED, _VISIBLE = 0, 1, 2


class Tiling(NamedTuple):
    """How work is cut: heads and keys of a tile, splits of a row's keys, warps and pipeline stages of a program."""

    heads: int
    keys: int
    splits: int
    warps: int
    stages: int


_FIXED = Tiling(16, _KEYS, 8, 4, 2)
"""The one tiling of deterministic mode."""

_PARTS = 1 << 29  # bytes of the splits' sums alive at once there


def attend(
    q: Tensor,
    window: WindowRows,
    entries: PagedEntries | None,
    selected: Tensor | None,
    attention: Attention,
    tiling: Tiling | None = None,
) -> Tensor:
    """See ref.attend."""
    if isinstance(window.rows, PackedRows):
        return attend_packed(q, window, entries, selected, attention)
    if entries is not None and selected is None and entries.most == 0:
        entries = None
    mode = _NO_ENTRIES if entries is None else _VISIBLE if selected is None else _SELECTED
    pool = window.rows if entries is None else entries.pool
    narrow = pool.dtype == torch.bfloat16
    t = tiling or _tiling(q, entries, selected, narrow)
    rows, heads, dim = q.shape
    out = torch.empty_like(q)
    part, peak, weight = out, attention.sink, attention.sink
    if t.splits > 1:
        part = torch.empty(rows, t.splits, heads, dim, device=q.device)
        peak = torch.empty(rows, t.splits, heads, device=q.device)
        weight = torch.empty_like(peak)
    width = max(16, triton.next_power_of_2(dim))
    _partial[(rows, triton.cdiv(heads, t.heads), t.splits)](
        *(q.contiguous(), window.rows, window.rows.stride(0), window.first, window.count),
        *_entry_arguments(window, entries, selected),
        *(attention.sink, attention.scale * _LOG2E, part, peak, weight, heads, dim, t.splits),
        MODE=mode,
        PER_PAGE=1 if entries is None else entries.pool.shape[1],
        DIM=width,
        HEADS=t.heads,
        KEYS=t.keys,
        WHOLE=t.splits == 1,
        NARROW=narrow,
        num_warps=t.warps,
        num_stages=t.stages,
    )
    if t.splits > 1:
        _combine[(rows, heads, triton.cdiv(dim, _COMBINED))](
            *(part, peak, weight, attention.sink, out, heads, dim, t.splits),
            SPLITS=triton.next_power_of_2(t.splits),
            DIM=_COMBINED,
            num_warps=4,
        )
    return out


def attend_deterministic(
    q: Tensor, window: WindowRows, entries: PagedEntries | None, selected: Tensor | None, attention: Attention
) -> Tensor:
    """See ref.attend; a row's result does not depend on its batch mates. Some rows at a time: all have all splits."""
    if isinstance(window.rows, PackedRows):
        return attend_packed(q, window, entries, selected, attention, fixed=True)
    rows, heads, dim = q.shape
    step = max(1, _PARTS // (4 * _FIXED.splits * heads * dim))
    out = torch.empty_like(q)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        mine = replace(window, first=window.first[part], count=window.count[part])
        some = None if entries is None else entries._replace(seq=entries.seq[part], visible=entries.visible[part])
        chosen = None if selected is None else selected[part]
        out[part] = attend(q[part], mine, some, chosen, attention, _FIXED)
    return out


def _entry_arguments(window: WindowRows, entries: PagedEntries | None, selected: Tensor | None) -> tuple[Any, ...]:
    """Pool, its strides, table, its stride, seq, visible, selected, its stride and width."""
    if entries is None:
        rows = window.rows
        return (rows, 0, 0, window.first, 0, window.first, window.count, window.first, 0, 0)
    pool, table = entries.dense, entries.page_table
    chosen = entries.visible if selected is None else selected
    stride, width = (0, 0) if selected is None else (selected.stride(0), selected.shape[1])
    return (
        *(pool, pool.stride(0), pool.stride(1), table, table.stride(0), entries.seq, entries.visible),
        *(chosen, stride, width),
    )


def _tiling(q: Tensor, entries: PagedEntries | None, selected: Tensor | None, narrow: bool) -> Tiling:
    """The tiling that was fastest on an H100 (benchmarks/results/gpu_kernels.jsonl) for so many rows and keys.

    Small tiles hide the wait for gathered keys better than one tile of all heads spares reading them: they come from
    the L2 cache. Two programs a multiprocessor fill it; only prefill has so many rows that large tiles pay.
    """
    rows, heads, _ = q.shape
    most = 128
    if entries is not None:
        bound = entries.page_table.shape[1] * entries.pool.shape[1]
        most += min(selected.shape[1] if selected is not None else bound, entries.most or bound)
    tile, warps, stages = 16, 4, 3
    if narrow and most > 1024 and rows > 1:
        tile, warps, stages = 32, 4, 2
    elif narrow and rows >= multiprocessors(q.device):
        tile, warps, stages = 64, 8, 3
    tile = min(tile, max(16, triton.next_power_of_2(heads)))
    programs = rows * triton.cdiv(heads, tile)
    shortest = _KEYS if rows == 1 else 2 * _KEYS
    splits = min(2 * multiprocessors(q.device) // programs, triton.cdiv(most, shortest), _MOST_SPLITS)
    return Tiling(tile, _KEYS, max(1, splits), warps, stages if narrow else 2)


@triton.jit
def _weigh(q, k, valid, acc, peak, weight, scale, NARROW: tl.constexpr):
    """One tile of keys k [KEYS, DIM] into the running sum acc [HEADS, DIM], maximum and weight [HEADS]."""
    s = tl.dot(q, tl.trans(k)) if NARROW else tl.dot(q, tl.trans(k), input_precision="tf32x3")
    s = tl.where(valid[None, :], s * scale, -1.0e30)
    highest = tl.maximum(peak, tl.max(s, 1))
    shrink = tl.exp2(peak - highest)
    p = tl.where(valid[None, :], tl.exp2(s - highest[:, None]), 0.0)
    weight = weight * shrink + tl.sum(p, 1)
    if NARROW:
        acc = tl.dot(p.to(tl.bfloat16), k, acc * shrink[:, None])
    else:
        acc = tl.dot(p, k, acc * shrink[:, None], input_precision="tf32x3")
    return acc, highest, weight


@triton.jit
def _over_window(
    q, rows_ptr, stride, begin, end, d, dim, scale, acc, peak, weight, KEYS: tl.constexpr, NARROW: tl.constexpr
):
    """The window rows [begin, end) of a row whose first one is at rows_ptr."""
    for at in range(begin, end, KEYS):
        j = at + tl.arange(0, KEYS)
        valid = j < end
        place = rows_ptr + j.to(tl.int64)[:, None] * stride + d[None, :]
        k = tl.load(place, mask=valid[:, None] & (d < dim)[None, :], other=0.0).to(q.dtype)
        acc, peak, weight = _weigh(q, k, valid, acc, peak, weight, scale, NARROW)
    return acc, peak, weight


@triton.jit
def _over_entries(
    q,
    pool_ptr,
    pool_page,
    pool_entry,
    line,
    chosen_ptr,
    begin,
    end,
    d,
    dim,
    scale,
    acc,
    peak,
    weight,
    MODE: tl.constexpr,
    PER_PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    NARROW: tl.constexpr,
):
    """Entries number [begin, end) of those that the row reads; `line` is its sequence's page table."""
    for at in range(begin, end, KEYS):
        j = at + tl.arange(0, KEYS)
        valid = j < end
        entry = j
        if MODE == 1:
            entry = tl.load(chosen_ptr + j, mask=valid, other=-1).to(tl.int32)
            valid = entry >= 0
            entry = tl.maximum(entry, 0)
        page = tl.load(line + entry // PER_PAGE, mask=valid, other=0)
        place = pool_ptr + page * pool_page + (entry % PER_PAGE) * pool_entry
        k = tl.load(place[:, None] + d[None, :], mask=valid[:, None] & (d < dim)[None, :], other=0.0).to(q.dtype)
        acc, peak, weight = _weigh(q, k, valid, acc, peak, weight, scale, NARROW)
    return acc, peak, weight


@triton.jit
def _stretch(in_window, visible_ptr, chosen, splits, MODE: tl.constexpr, KEYS: tl.constexpr):
    """This program's keys [low, high) of a row's: an equal share in whole tiles."""
    total = in_window
    if MODE == 1:  # those that are not -1 come first
        total = in_window + tl.minimum(tl.load(visible_ptr).to(tl.int32), chosen)
    if MODE == 2:
        total = in_window + tl.load(visible_ptr).to(tl.int32)
    share = tl.cdiv(tl.cdiv(total, splits), KEYS) * KEYS
    low = tl.program_id(2) * share
    return low, tl.minimum(low + share, total)


@triton.jit
def _nothing(HEADS: tl.constexpr, DIM: tl.constexpr):
    """Sum, maximum and weight before any key; the maximum is finite, so that no difference of two is NaN."""
    return tl.zeros([HEADS, DIM], tl.float32), tl.full([HEADS], -1.0e30, tl.float32), tl.zeros([HEADS], tl.float32)


@triton.jit
def _normal(peak, weight, sink):
    """What a whole sum is multiplied by: the sink takes part in the softmax and adds nothing to the sum."""
    sink = sink * 1.4426950408889634
    highest = tl.maximum(peak, sink)
    shrink = tl.exp2(peak - highest)
    return shrink / (weight * shrink + tl.exp2(sink - highest))


@triton.jit
def _partial(
    q_ptr,
    rows_ptr,
    rows_stride,
    first_ptr,
    count_ptr,
    pool_ptr,
    pool_page,
    pool_entry,
    table_ptr,
    table_stride,
    seq_ptr,
    visible_ptr,
    chosen_ptr,
    chosen_stride,
    chosen_count,
    sink_ptr,
    scale,
    part_ptr,
    peak_ptr,
    weight_ptr,
    heads,
    dim,
    splits,
    MODE: tl.constexpr,
    PER_PAGE: tl.constexpr,
    DIM: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    WHOLE: tl.constexpr,
    NARROW: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, DIM)
    part = r * splits + tl.program_id(2)
    kind: tl.constexpr = tl.bfloat16 if NARROW else tl.float32
    mine = (h < heads)[:, None] & (d < dim)[None, :]
    q = tl.load(q_ptr + (r * heads + h[:, None]) * dim + d[None, :], mask=mine, other=0.0).to(kind)
    in_window = tl.load(count_ptr + r).to(tl.int32)
    low, high = _stretch(in_window, visible_ptr + r, chosen_count, splits, MODE, KEYS)
    acc, peak, weight = _nothing(HEADS, DIM)
    rows_ptr += tl.load(first_ptr + r) * rows_stride
    acc, peak, weight = _over_window(
        q, rows_ptr, rows_stride, low, tl.minimum(high, in_window), d, dim, scale, acc, peak, weight, KEYS, NARROW
    )
    if MODE != 0:
        line = table_ptr + tl.load(seq_ptr + r) * table_stride
        chosen_ptr += r * chosen_stride
        begin = tl.maximum(low, in_window) - in_window
        acc, peak, weight = _over_entries(
            *(q, pool_ptr, pool_page, pool_entry, line, chosen_ptr, begin, high - in_window, d, dim, scale),
            *(acc, peak, weight, MODE, PER_PAGE, KEYS, NARROW),
        )
    if WHOLE:
        acc = acc * _normal(peak, weight, tl.load(sink_ptr + h, mask=h < heads, other=0.0))[:, None]
    else:
        tl.store(peak_ptr + part * heads + h, peak, mask=h < heads)
        tl.store(weight_ptr + part * heads + h, weight, mask=h < heads)
    tl.store(part_ptr + (part * heads + h[:, None]) * dim + d[None, :], acc, mask=mine)


@triton.jit
def _combine(
    part_ptr,
    peak_ptr,
    weight_ptr,
    sink_ptr,
    out_ptr,
    heads,
    dim,
    splits,
    SPLITS: tl.constexpr,
    DIM: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    s = tl.arange(0, SPLITS)
    d = tl.program_id(2) * DIM + tl.arange(0, DIM)
    there = s < splits
    peak = tl.load(peak_ptr + (r * splits + s) * heads + h, mask=there, other=-1.0e30)
    weight = tl.load(weight_ptr + (r * splits + s) * heads + h, mask=there, other=0.0)
    sink = tl.load(sink_ptr + h) * 1.4426950408889634
    highest = tl.maximum(tl.max(peak, 0), sink)
    shrink = tl.exp2(peak - highest)
    total = tl.sum(weight * shrink, 0) + tl.exp2(sink - highest)
    place = part_ptr + ((r * splits + s[:, None]) * heads + h) * dim + d[None, :]
    part = tl.load(place, mask=there[:, None] & (d < dim)[None, :], other=0.0)
    out = tl.sum(part * (shrink / total)[:, None], 0)
    tl.store(out_ptr + (r * heads + h) * dim + d, out, mask=d < dim)
