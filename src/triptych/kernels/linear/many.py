"""Products of e4m3 rows and e4m3 matrices on the tensor cores, for more rows than a stream of weights serves well."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(
    x_ptr,
    xs_ptr,
    w_ptr,
    ws_ptr,
    out_ptr,
    part_ptr,
    count_ptr,
    rows,
    columns,
    depth,
    xs_row,
    xs_group,
    out_row,
    SPLIT: tl.constexpr,
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
    SHARE: tl.constexpr,
    NARROW: tl.constexpr,
):
    """out = x [rows, depth] w [columns, depth]^T, in bf16 values if NARROW. WIDE divides 128."""
    at, split = tl.program_id(0), tl.program_id(1)
    down, across = tl.cdiv(rows, TALL), tl.cdiv(columns, WIDE)
    band = at // (SHARE * across) * SHARE  # tiles that share rows and weights run together
    height = tl.minimum(down - band, SHARE)
    r0 = band + at % (SHARE * across) % height
    c0 = at % (SHARE * across) // height
    r = (r0 * TALL + tl.arange(0, TALL)).to(tl.int64)
    c = (c0 * WIDE + tl.arange(0, WIDE)).to(tl.int64)
    d = tl.arange(0, 128)
    there = (r < rows)[:, None]  # masked, not clamped: everybody reading one row again and again is slow
    rr, cc = tl.minimum(r, rows - 1), tl.minimum(c, columns - 1)
    width = depth // 128 // SPLIT * 128
    x_at = x_ptr + rr[:, None] * depth + split * width + d[None, :]
    w_at = w_ptr + cc[None, :] * depth + split * width + d[:, None]
    s_at = xs_ptr + rr * xs_row + split * (width // 128) * xs_group
    f_at = ws_ptr + (c0 * WIDE // 128) * (depth // 128) + split * (width // 128)
    total = tl.zeros([TALL, WIDE], tl.float32)
    for k in range(0, width // 128):
        some = tl.dot(tl.load(x_at + k * 128, mask=there, other=0.0), tl.load(w_at + k * 128))
        total += some * (tl.load(s_at + k * xs_group) * tl.load(f_at + k))[:, None]
    keep = there & (c < columns)[None, :]
    place = r[:, None] * columns + c[None, :]
    out_ptr += r[:, None] * out_row + c[None, :]
    if SPLIT == 1:
        _put(out_ptr, total, keep, NARROW)
    else:
        tl.store(part_ptr + split * rows * columns + place, total, mask=keep)
        tl.debug_barrier()
        if tl.atomic_add(count_ptr + at, 1, sem="acq_rel") == SPLIT - 1:
            total = tl.zeros([TALL, WIDE], tl.float32)
            for s in range(SPLIT):
                more = part_ptr + s * rows * columns + place
                total += tl.load(more, mask=keep, other=0.0, cache_modifier=".cg")
            _put(out_ptr, total, keep, NARROW)
            tl.store(count_ptr + at, 0)


@triton.jit
def _put(place, total, keep, NARROW: tl.constexpr):
    """Store a tile, rounded to bf16 first if NARROW."""
    if NARROW:
        total = total.to(tl.bfloat16)
    tl.store(place, total.to(place.dtype.element_ty), mask=keep)


@triton.jit
def dequantised(w_ptr, ws_ptr, out_ptr, depth, rows, tall, scale_rows, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """bf16 of e4m3 matrices of `rows` rows and `depth` columns in a row; `tall` rows and 128 columns share a scale.

    A program has ROWS rows, of which all share their scales, and GROUPS groups of 128 columns.
    """
    first = tl.program_id(0) * ROWS
    g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    groups = depth // 128
    place = (first // rows * scale_rows + first % rows // tall) * groups + g
    scale = tl.load(ws_ptr + place, mask=g < groups, other=0.0)[None, :, None]
    r = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
    at = r * depth + (g[:, None] * 128 + tl.arange(0, 128)[None, :])[None, :, :]
    there = (g < groups)[None, :, None]
    w = tl.load(w_ptr + at, mask=there, other=0.0).to(tl.float32) * scale
    tl.store(out_ptr + at, w.to(tl.bfloat16), mask=there)
