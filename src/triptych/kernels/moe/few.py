"""Experts of few rows (decode), from weights as released: two launches behind the router.

    up     routed w13 in MXFP4 and the shared one in FP8, SwiGLU, routing weight, rounding to the e4m3 grid
    down   w2 of all of them, and the sum over a row's experts

Whoever finishes last what another step needs whole, a group of 128 hidden values or all experts of a row, does that
step; sums are in a fixed order, so results do not depend on who that was. Counters are back at zero afterwards.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from triptych.kernels.quant.fragments import (
    DEPTH,
    RAISED,
    from_fp8_paired,
    from_mxfp4,
    from_rows,
    mma_layout,
    paired,
    row_layout,
    scale_of,
    weight_layout,
)

STAGES: Any = gl.constexpr(4)
"""Pairs of blocks of weights, 8 KB each, on their way or in use."""


@gluon.jit
def _largest_codes(code_ptr, row, K: gl.constexpr):
    """Largest e8m0 code of each row [ROWS] of scales [.., K / 32]; code_ptr is the expert's. int32."""
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [16, 2], [4, 1], [1, 0])
    r = gl.convert_layout(row, gl.SliceLayout(1, layout))
    g = gl.arange(0, 32, gl.SliceLayout(0, layout))
    top = gl.full([64], 0, gl.int32, gl.SliceLayout(1, layout))
    for at in gl.static_range(0, K // 32, 32):
        there = (at + g < K // 32)[None, :]
        codes = gl.load(code_ptr + r[:, None] * (K // 32) + at + g[None, :], mask=there, other=0)
        top = gl.maximum(top, gl.max(codes.to(gl.int32), axis=1))
    return top


@gluon.jit
def _mxfp4_rows(w_ptr, code_ptr, x_ptr, xs_ptr, row, xrow, xrow_of, K: gl.constexpr, N: gl.constexpr):
    """sum over K of w[row] x[xrow] -> float32 [64, N]; `row` and `xrow_of` in the layout of the result, `xrow` as x.

    Rows of x beyond those wanted may be any that exist: nobody stores their products.
    """
    MMA: gl.constexpr = mma_layout(4)
    W: gl.constexpr = weight_layout(4, 4)
    X: gl.constexpr = row_layout(N, 4)
    C: gl.constexpr = gl.BlockedLayout([1, 1, 4], [8, 4, 1], [4, 1, 1], [2, 1, 0])
    L: gl.constexpr = gl.SliceLayout(2, W)
    BLOCKS: gl.constexpr = K // 128
    # weights wait in shared memory: loads into registers would have to be waited for in the order of few scoreboards
    ws = gl.allocate_shared_memory(gl.int32, [STAGES * 2, 64, 4, 4], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    r = gl.convert_layout(row, gl.SliceLayout(1, gl.SliceLayout(2, C)))
    c = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, C)))
    b = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, C)))
    wp = w_ptr + gl.expand_dims(r[:, None] * (K // 8) + c[None, :] * 4, 2) + gl.expand_dims(b[None, :], 1)
    for early in gl.static_range(STAGES - 1):
        _fetch(ws, wp, early * 2, BLOCKS)
    cp = code_ptr + gl.convert_layout(row, gl.SliceLayout(1, L))[:, None] * (K // 32)
    cp = cp + gl.arange(0, 4, gl.SliceLayout(0, L))[None, :]
    xc = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, X)))
    xb = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, X)))
    xp = x_ptr + gl.expand_dims(xrow[:, None] * K + xc[None, :] * 32, 2) + gl.expand_dims(xb[None, :], 1)
    sp = xs_ptr + xrow_of * BLOCKS
    acc = gl.zeros([64, N], gl.float32, MMA)
    zero = gl.zeros([64, N], gl.float32, MMA)
    top = _largest_codes(code_ptr, row, K)
    down = gl.convert_layout(top, gl.SliceLayout(1, L)) - DEPTH
    # the compiler fails over a loop that it knows to run once: there the start, zero, is not told
    start = gl.program_id(2) if BLOCKS <= 2 else 0
    for at in range(start, BLOCKS, 2):
        async_copy.wait_group(STAGES - 2)
        gl.thread_barrier()
        _fetch(ws, wp, at + (STAGES - 1) * 2, BLOCKS)
        for step in gl.static_range(2):
            # of an odd number of blocks the last is multiplied twice, the second time by a scale of zero
            k = gl.minimum(at + step, BLOCKS - 1) if BLOCKS % 2 else at + step
            w = ws.index((at + step) % (STAGES * 2)).load(W)
            e = gl.load(cp + k * 4).to(gl.int32)
            x = gl.load(xp + k * 128)
            s = gl.load(sp + k)
            shift = gl.maximum(e - down[:, None], 0) * 0x04000400
            if BLOCKS % 2:
                shift = gl.where(at + step < BLOCKS, shift, 0)
            part = mma_v2(from_mxfp4(w, shift, 64, MMA), from_rows(x, N, MMA), zero)
            acc += part * s[None, :]
    top = gl.convert_layout(top, gl.SliceLayout(1, MMA))
    # a row whose largest scale is 2^-115 is nothing
    factor = (gl.maximum(top - RAISED, 1) << 23).to(gl.float32, bitcast=True)
    return acc * factor[:, None]


@gluon.jit
def _fetch(ws, wp, k, BLOCKS: gl.constexpr):
    """Blocks k and k + 1, neighbours in memory, on their way into shared memory."""
    if k < BLOCKS:
        async_copy.async_copy_global_to_shared(ws.index(k % (STAGES * 2)), wp + k * 16, cache_modifier=".cg")
    if k + 1 < BLOCKS:
        async_copy.async_copy_global_to_shared(ws.index((k + 1) % (STAGES * 2)), wp + k * 16 + 16, cache_modifier=".cg")
    async_copy.commit_group()


@gluon.jit
def _fp8_rows(w_ptr, ws_ptr, x_ptr, xs_ptr, row, xrow, xrow_of, K: gl.constexpr, N: gl.constexpr):
    """As _mxfp4_rows, of an FP8 matrix [.., K] with scales [.., K / 128]."""
    MMA: gl.constexpr = mma_layout(4)
    W: gl.constexpr = weight_layout(8, 4)
    X: gl.constexpr = row_layout(N, 4)
    BLOCKS: gl.constexpr = K // 128
    r = gl.convert_layout(row, gl.SliceLayout(1, gl.SliceLayout(2, W)))
    c = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, W)))
    b = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, W)))
    wp = w_ptr + gl.expand_dims(r[:, None] * (K // 4) + c[None, :] * 8, 2) + gl.expand_dims(b[None, :], 1)
    xc = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, X)))
    xb = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, X)))
    xp = x_ptr + gl.expand_dims(xrow[:, None] * K + xc[None, :] * 32, 2) + gl.expand_dims(xb[None, :], 1)
    sp = xs_ptr + xrow_of * BLOCKS
    fp = ws_ptr + (row // 128) * BLOCKS
    acc = gl.zeros([64, N], gl.float32, MMA)
    zero = gl.zeros([64, N], gl.float32, MMA)
    w0 = gl.load(wp, cache_modifier=".cg")
    w1 = gl.load(wp + 32, mask=BLOCKS > 1, other=0, cache_modifier=".cg")
    for at in range(0, BLOCKS):
        w = w0
        w0 = w1
        w1 = gl.load(wp + (at + 2) * 32, mask=at + 2 < BLOCKS, other=0, cache_modifier=".cg")
        x = gl.load(xp + at * 128)
        s = gl.load(sp + at)
        f = gl.load(fp + at)
        part = mma_v2(from_fp8_paired(w, 64, MMA), from_rows(x, N, MMA), zero)
        acc += part * (f[:, None] * s[None, :])
    return acc


@gluon.jit(do_not_specialize=["rows", "pairs", "shared"])
def up(
    x_ptr,
    xs_ptr,
    tile_ptr,
    order_ptr,
    gate_ptr,
    w_ptr,
    code_ptr,
    shared_ptr,
    shared_scale_ptr,
    h_ptr,
    hq_ptr,
    hs_ptr,
    count_ptr,
    rows,
    pairs,
    limit,
    shared,
    DIM: gl.constexpr,
    INNER: gl.constexpr,
    TOPK: gl.constexpr,
    N: gl.constexpr,
):
    """Hidden values of 32 columns and up to N pairs of one expert; tiles below `shared` are the shared expert's.

    tile [.., 3] int32: expert (-1: none), first place in `order`, pairs. A pair is row * TOPK + choice; the shared
    expert's follow all. h float32, hq f16 [pairs + rows, INNER] paired, hs [pairs + rows, INNER / 128]."""
    MMA: gl.constexpr = mma_layout(4)
    X: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, row_layout(N, 4)))
    A: gl.constexpr = gl.SliceLayout(0, MMA)
    tile = gl.program_id(1)
    n0 = gl.program_id(0) * 32
    m = gl.arange(0, 64, gl.SliceLayout(1, MMA))
    row = n0 + (m // 16) * 8 + m % 8 + ((m // 8) % 2) * INNER  # a thread's two rows are a gate and its up
    jx, jo = gl.arange(0, N, X), gl.arange(0, N, A)
    if tile < shared:
        first, count = tile * N, gl.minimum(rows - tile * N, N)
        tx, to = gl.minimum(first + jx, rows - 1), gl.minimum(first + jo, rows - 1)
        acc = _fp8_rows(shared_ptr, shared_scale_ptr, x_ptr, xs_ptr, row, tx, to, DIM, N)
        _finish(
            acc, pairs + first + jo, jo < count, gl.full([N], 1.0, gl.float32, A), n0, tile, limit,
            h_ptr, hq_ptr, hs_ptr, count_ptr, pairs + first, order_ptr, count, True, INNER, N,
        )  # fmt: skip
    else:
        entry = tile_ptr + (tile - shared) * 3
        expert = gl.load(entry)
        if expert >= 0:
            first, count = gl.load(entry + 1), gl.load(entry + 2)
            px = gl.load(order_ptr + first + jx, mask=jx < count, other=0)
            po = gl.load(order_ptr + first + jo, mask=jo < count, other=0)
            acc = _mxfp4_rows(
                w_ptr + expert.to(gl.int64) * (2 * INNER * (DIM // 8)),
                code_ptr + expert.to(gl.int64) * (2 * INNER * (DIM // 32)),
                *(x_ptr, xs_ptr, row, px // TOPK, po // TOPK, DIM, N),
            )
            gates = gl.load(gate_ptr + po, mask=jo < count, other=0.0)
            _finish(
                acc, po, jo < count, gates, n0, tile, limit,
                h_ptr, hq_ptr, hs_ptr, count_ptr, first, order_ptr, count, False, INNER, N,
            )  # fmt: skip


@gluon.jit
def _finish(
    acc,
    pair,
    wanted,
    gates,
    n0,
    tile,
    limit,
    h_ptr,
    hq_ptr,
    hs_ptr,
    count_ptr,
    first,
    order_ptr,
    count,
    PLAIN: gl.constexpr,
    INNER: gl.constexpr,
    N: gl.constexpr,
):
    """SwiGLU of acc [64, N]; the last of the four programs of 128 columns rounds them to the e4m3 grid."""
    halves = gl.permute(gl.reshape(acc, [4, 2, 8, N]), (0, 2, 3, 1))
    gate, up_ = gl.split(halves)
    gate, up_ = gl.reshape(gate, [32, N]), gl.reshape(up_, [32, N])
    L: gl.constexpr = gate.type.layout
    j = gl.convert_layout(pair, gl.SliceLayout(0, L))
    keep = gl.convert_layout(wanted.to(gl.int32), gl.SliceLayout(0, L)) != 0
    weight = gl.convert_layout(gates, gl.SliceLayout(0, L))
    gate = gl.where(gate > limit, limit, gate)
    up_ = gl.where(up_ > limit, limit, gl.where(up_ < -limit, -limit, up_))
    hidden = gate / (1.0 + gl.exp(-gate)) * up_ * weight[None, :]
    n = n0 + gl.arange(0, 32, gl.SliceLayout(1, L))
    gl.store(h_ptr + j[None, :] * INNER + n[:, None], hidden, mask=keep[None, :])
    gl.thread_barrier()
    group = n0 // 128
    mine = count_ptr + tile * (INNER // 128) + group
    if gl.atomic_add(mine, 1, sem="acq_rel") == 3:
        B: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
        i = gl.arange(0, N, gl.SliceLayout(1, B))
        p = first + i
        if not PLAIN:
            p = gl.load(order_ptr + first + i, mask=i < count, other=0)
        d = group * 128 + gl.arange(0, 128, gl.SliceLayout(0, B))
        there = (i < count)[:, None]
        values = gl.load(h_ptr + p[:, None] * INNER + d[None, :], mask=there, other=0.0, cache_modifier=".cg")
        scale, inverse = scale_of(gl.max(gl.abs(values), axis=1))
        gl.store(
            hq_ptr + p[:, None] * INNER + paired(d)[None, :],
            (values * inverse[:, None]).to(gl.float8e4nv).to(gl.float16),
            mask=there,
        )
        gl.store(hs_ptr + p * (INNER // 128) + group, scale, mask=i < count)
        gl.store(mine, 0)


@gluon.jit(do_not_specialize=["rows", "pairs", "shared"])
def down(
    hq_ptr,
    hs_ptr,
    tile_ptr,
    order_ptr,
    w_ptr,
    code_ptr,
    shared_ptr,
    shared_scale_ptr,
    each_ptr,
    out_ptr,
    count_ptr,
    rows,
    pairs,
    shared,
    DIM: gl.constexpr,
    INNER: gl.constexpr,
    TOPK: gl.constexpr,
    N: gl.constexpr,
):
    """64 columns of w2 for the pairs of a tile, into each [pairs + rows, DIM] float32; the last of a row's experts
    adds them up, in the order of the row's choices and the shared expert last, into out [rows, DIM]."""
    MMA: gl.constexpr = mma_layout(4)
    X: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, row_layout(N, 4)))
    A: gl.constexpr = gl.SliceLayout(0, MMA)
    tile = gl.program_id(1)
    n0 = gl.program_id(0) * 64
    row = n0 + gl.arange(0, 64, gl.SliceLayout(1, MMA))
    jx, jo = gl.arange(0, N, X), gl.arange(0, N, A)
    if tile < shared:
        first, count = tile * N, gl.minimum(rows - tile * N, N)
        px, po = pairs + gl.minimum(first + jx, rows - 1), pairs + gl.minimum(first + jo, rows - 1)
        acc = _fp8_rows(shared_ptr, shared_scale_ptr, hq_ptr, hs_ptr, row, px, po, INNER, N)
        _add(acc, po, first + jo, jo < count, each_ptr, out_ptr, count_ptr, row, n0, pairs, TOPK, DIM, N)
    else:
        entry = tile_ptr + (tile - shared) * 3
        expert = gl.load(entry)
        if expert >= 0:
            first, count = gl.load(entry + 1), gl.load(entry + 2)
            px = gl.load(order_ptr + first + jx, mask=jx < count, other=0)
            po = gl.load(order_ptr + first + jo, mask=jo < count, other=0)
            acc = _mxfp4_rows(
                w_ptr + expert.to(gl.int64) * (DIM * (INNER // 8)),
                code_ptr + expert.to(gl.int64) * (DIM * (INNER // 32)),
                *(hq_ptr, hs_ptr, row, px, po, INNER, N),
            )
            _add(acc, po, po // TOPK, jo < count, each_ptr, out_ptr, count_ptr, row, n0, pairs, TOPK, DIM, N)


@gluon.jit
def _add(
    acc,
    pair,
    token,
    wanted,
    each_ptr,
    out_ptr,
    count_ptr,
    row,
    n0,
    pairs,
    TOPK: gl.constexpr,
    DIM: gl.constexpr,
    N: gl.constexpr,
):
    gl.store(each_ptr + pair[None, :] * DIM + row[:, None], acc, mask=wanted[None, :])
    B: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0])
    T: gl.constexpr = gl.SliceLayout(1, B)
    t = gl.convert_layout(token, T)
    there = gl.convert_layout(wanted.to(gl.int32), T) != 0
    gl.thread_barrier()
    mine = count_ptr + t * (DIM // 64) + n0 // 64
    before = gl.atomic_add(mine, gl.full([N], 1, gl.int32, T), mask=there, sem="acq_rel")
    last = there & (before == TOPK)
    if gl.max(last.to(gl.int32), axis=0) > 0:
        d = n0 + gl.arange(0, 64, gl.SliceLayout(0, B))
        keep = last[:, None]
        total = gl.zeros([N, 64], gl.float32, B)
        for s in gl.static_range(TOPK):
            at = each_ptr + (t * TOPK + s)[:, None] * DIM + d[None, :]
            total += gl.load(at, mask=keep, other=0.0, cache_modifier=".cg")
        at = each_ptr + (pairs + t)[:, None] * DIM + d[None, :]
        total += gl.load(at, mask=keep, other=0.0, cache_modifier=".cg")
        gl.store(out_ptr + t[:, None] * DIM + d[None, :], total.to(out_ptr.dtype.element_ty), mask=keep)
        gl.store(mine, gl.full([N], 0, gl.int32, T), mask=last)
