"""The second launch of attend_rows in deterministic mode: a row's splits are weighed one after the other.

How they are added up then follows from the row's own number of keys, not from how many splits a batch mate has.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triptych.kernels.attend_rows.portable import extent


@triton.jit
def combine(
    part_ptr,
    peak_ptr,
    weight_ptr,
    sink_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    positions_ptr,
    lowest_ptr,
    table_ptr,
    table_row,
    visible_ptr,
    chosen_ptr,
    chosen_row,
    chosen_count,
    out_ptr,
    heads,
    splits,
    span,
    MODE: tl.constexpr,
    FLAT: tl.constexpr,
    RAW: tl.constexpr,
    REACH: tl.constexpr,
    DIM: tl.constexpr,
    ROPE: tl.constexpr,
):
    """128 dims of one head of one row: the splits' sums by their weights, rotated back if queries came RAW."""
    r = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1)
    d = tl.program_id(0) * 128 + tl.arange(0, 128)
    _, _, total = extent(r, positions_ptr, lowest_ptr, visible_ptr, chosen_count, MODE, REACH, FLAT)
    used = tl.cdiv(total, span)
    line = r * splits * heads + h
    sink = tl.load(sink_ptr + h) * 1.4426950408889634
    highest = sink
    for s in range(0, used):
        highest = tl.maximum(highest, tl.load(peak_ptr + line + s * heads))
    at = d - (DIM - ROPE)
    turns = (at >= 0) & (d < DIM) & RAW
    partner = tl.where(turns, (DIM - ROPE) + (at ^ 1), d)
    weight = tl.exp2(sink - highest)
    acc, turned = tl.zeros([128], tl.float32), tl.zeros([128], tl.float32)
    for s in range(0, used):
        row = line + s * heads
        factor = tl.exp2(tl.load(peak_ptr + row) - highest)
        weight += tl.load(weight_ptr + row) * factor
        acc += tl.load(part_ptr + row * DIM + d, mask=d < DIM, other=0.0) * factor
        if RAW:
            turned += tl.load(part_ptr + row * DIM + partner, mask=turns, other=0.0) * factor
    turn = r * (ROPE // 2) + at // 2
    cos, sin = tl.load(cos_ptr + turn, mask=turns, other=1.0), tl.load(sin_ptr + turn, mask=turns, other=0.0)
    acc = (acc * cos + tl.where(at % 2 == 0, turned, -turned) * sin) / weight
    tl.store(out_ptr + (r * heads + h) * DIM + d, acc.to(out_ptr.dtype.element_ty), mask=d < DIM)
