"""Grouped linear maps of few rows that are not rounded, in one launch: each weight read once, straight into registers.

Programs hold 64 outputs and a part of the columns, as many as fill the GPU. The last of those that share outputs adds
up the parts, in their order, and rounds 128 outputs for the product that reads them; counters are back at zero
afterwards.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from triptych.kernels.quant.e4m3 import scale_of
from triptych.kernels.quant.fragments import from_fp8, from_rows, mma_layout, row_layout, weight_layout


@gluon.jit
def _part(
    w_ptr, ws_ptr, xp, row, first,
    K: gl.constexpr, PART: gl.constexpr, TALL: gl.constexpr, N: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Products of blocks [first, first + PART) of 128 columns: float32 [64, N]. xp points at column 0 of x."""
    MMA: gl.constexpr = mma_layout(WARPS)
    AHEAD: gl.constexpr = 2 if WARPS == 4 else 1  # with fewer warps each has more of a block in flight
    W: gl.constexpr = weight_layout(8, WARPS, 4 // WARPS)
    r = gl.convert_layout(row, gl.SliceLayout(1, gl.SliceLayout(2, W)))
    c = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, W)))
    b = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, W)))
    wp = w_ptr + gl.expand_dims(r[:, None] * (K // 4) + c[None, :] * 8, 2) + gl.expand_dims(b[None, :], 1) + first * 32
    fp = ws_ptr + (row // TALL) * (K // 128) + first
    xp += first * 128
    acc = gl.zeros([64, N], gl.float32, MMA)
    zero = gl.zeros([64, N], gl.float32, MMA)
    w0 = gl.load(wp, cache_modifier=".cg")  # past the L1, which is for x
    if AHEAD > 1:
        w1 = gl.load(wp + 32, mask=PART > 1, other=0, cache_modifier=".cg")
    for at in range(0, PART):
        w = w0
        if AHEAD > 1:
            w0 = w1
            w1 = gl.load(wp + (at + 2) * 32, mask=at + 2 < PART, other=0, cache_modifier=".cg")
        else:
            w0 = gl.load(wp + (at + 1) * 32, mask=at + 1 < PART, other=0, cache_modifier=".cg")
        x = gl.load(xp + at * 128).to(gl.float32)
        x = gl.minimum(gl.maximum(x, -65504.0), 65504.0).to(gl.float16)  # bf16 of any likely size is exact in f16
        f = gl.load(fp + at)
        acc += mma_v2(from_fp8(w, 64, MMA), from_rows(x, N, MMA), zero) * f[:, None]
    return acc


@gluon.jit(do_not_specialize=["rows"])
def products(
    x_ptr, w_ptr, ws_ptr, out_ptr, scale_ptr, part_ptr, count_ptr, rows, x_stride,
    K: gl.constexpr, OUT: gl.constexpr, GROUP: gl.constexpr, SPLIT: gl.constexpr, TALL: gl.constexpr,
    ROUND: gl.constexpr, N: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """out [rows, OUT] of x [rows, ..] bf16 by an FP8 matrix, TALL rows of which share a scale.

    Every GROUP outputs have their own K columns of x. ROUND: out are e4m3 values, and scale [rows, OUT / 128] their
    scales. part [SPLIT, rows, OUT] float32 is scratch.
    """
    MMA: gl.constexpr = mma_layout(WARPS)
    X: gl.constexpr = row_layout(N, WARPS)
    r0 = gl.program_id(0) * N  # programs that share weights run side by side
    n0 = gl.program_id(1) * 64
    split = gl.program_id(2)
    PART: gl.constexpr = K // 128 // SPLIT
    n = n0 + gl.arange(0, 64, gl.SliceLayout(1, MMA))
    row = gl.minimum(n, OUT - 1)
    xrow = gl.minimum(r0 + gl.arange(0, N, gl.SliceLayout(1, gl.SliceLayout(2, X))), rows - 1)
    xc = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, X)))
    xb = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, X)))
    xp = x_ptr + n0 // GROUP * K
    xp = xp + gl.expand_dims(xrow[:, None] * x_stride + xc[None, :] * 32, 2) + gl.expand_dims(xb[None, :], 1)
    acc = _part(w_ptr, ws_ptr, xp, row, split * PART, K, PART, TALL, N, WARPS)
    j = r0 + gl.arange(0, N, gl.SliceLayout(0, MMA))
    keep = (j < rows)[None, :] & (n < OUT)[:, None]
    at = j[None, :] * OUT + n[:, None]
    HALVES: gl.constexpr = 2 if ROUND else 1  # tiles of 64 outputs that are finished together
    if SPLIT * HALVES == 1:
        gl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=keep)
    else:
        gl.store(part_ptr + split * rows * OUT + at, acc, mask=keep)
        gl.thread_barrier()
        mine = count_ptr + gl.program_id(0) * (OUT // 64) + gl.program_id(1) // HALVES
        if gl.atomic_add(mine, 1, sem="acq_rel") == SPLIT * HALVES - 1:
            at -= gl.program_id(1) % HALVES * 64
            total = _total(part_ptr + at, rows * OUT, keep, SPLIT)
            if ROUND:
                other = _total(part_ptr + at + 64, rows * OUT, keep, SPLIT)
                scale_at = scale_ptr + j * (OUT // 128) + n0 // 128
                _store_rounded(total, other, out_ptr + at, scale_at, j < rows)
            else:
                gl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=keep)
            gl.store(mine, 0)


@gluon.jit
def _store_rounded(low, high, out_ptr, scale_ptr, there):
    """Outputs [64, N] and the 64 behind them, bf16 first as the activations that they are, then e4m3 and their scales.

    There are only rows `there` [N]."""
    low, high = low.to(gl.bfloat16).to(gl.float32), high.to(gl.bfloat16).to(gl.float32)
    scale, inverse = scale_of(gl.maximum(gl.max(gl.abs(low), 0), gl.max(gl.abs(high), 0)))
    gl.store(scale_ptr, scale, mask=there)
    gl.store(out_ptr, (low * inverse[None, :]).to(gl.float8e4nv), mask=there[None, :])
    gl.store(out_ptr + 64, (high * inverse[None, :]).to(gl.float8e4nv), mask=there[None, :])


@gluon.jit
def _total(part_ptr, stride, keep, SPLIT: gl.constexpr):
    """The parts at part_ptr [64, N], `stride` apart, added up in their order."""
    total = gl.load(part_ptr, mask=keep, other=0.0, cache_modifier=".cg")
    for s in gl.static_range(1, SPLIT):
        total += gl.load(part_ptr + s * stride, mask=keep, other=0.0, cache_modifier=".cg")
    return total
