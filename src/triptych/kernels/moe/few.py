"""Experts of few rows (decode), from weights as released: two launches behind the router.

    up     routed w13 in MXFP4 and the shared one in FP8, SwiGLU, routing weight, rounding to the e4m3 grid
    down   w2 of all of them, and the sum over a row's experts

A program has 64 rows of weights or 128 (TILES) and up to eight pairs of one expert, mostly one such piece: programs
that stayed for more were slower, however the pieces were shared out. Whoever finishes last what another step needs
whole, a group of 128 hidden values or all experts of a row, does that step; sums are in a fixed order, so results do
not depend on who that was. Counters are back at zero afterwards.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from triptych.kernels.moe.stream import (
    begin,
    factor_layout,
    halves_layout,
    multiply,
    room_for_rows,
    rows_of_halves,
    rows_of_slots,
    slots_layout,
    stages,
)
from triptych.kernels.quant.fragments import (
    from_fp8_paired,
    from_rows,
    mma_layout,
    paired,
    row_layout,
    scale_of,
    weight_layout,
)


@gluon.jit
def _fp8_rows(w_ptr, ws_ptr, x_ptr, xs_ptr, row, xrow, xrow_of, K: gl.constexpr, TILES: gl.constexpr):
    """sum over K of w[row] x[xrow] -> float32 [64 TILES, 8], of an FP8 matrix [.., K] with scales [.., K / 128].

    `row` and `xrow_of` are in the layout of the result, `xrow` as x, whose rows are f16 in the order of
    fragments.paired. Rows beyond those wanted may be any that exist: nobody stores their products.
    """
    MMA: gl.constexpr = mma_layout(4 * TILES)
    W: gl.constexpr = weight_layout(8, 4 * TILES)
    X: gl.constexpr = row_layout(8, 4 * TILES)
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
    acc = gl.zeros([64 * TILES, 8], gl.float32, MMA)
    zero = gl.zeros([64 * TILES, 8], gl.float32, MMA)
    w0 = gl.load(wp, cache_modifier=".cg")
    w1 = gl.load(wp + 32, mask=BLOCKS > 1, other=0, cache_modifier=".cg")
    for at in range(0, BLOCKS):
        w = w0
        w0 = w1
        w1 = gl.load(wp + (at + 2) * 32, mask=at + 2 < BLOCKS, other=0, cache_modifier=".cg")
        x = gl.load(xp + at * 128)
        s = gl.load(sp + at)
        f = gl.load(fp + at)
        part = mma_v2(from_fp8_paired(w, 64 * TILES, MMA), from_rows(x, 8, MMA), zero)
        acc += part * (f[:, None] * s[None, :])
    return acc


@gluon.jit(do_not_specialize=["rows", "pairs", "tiles", "shared"])
def up(
    x_ptr, xs_ptr, tile_ptr, order_ptr, gate_ptr, values, scales, top_ptr, shared_ptr, shared_scale_ptr,
    h_ptr, hq_ptr, sq_ptr, hs_ptr, count_ptr, rows, pairs, tiles, limit, shared,
    DIM: gl.constexpr, INNER: gl.constexpr, TOPK: gl.constexpr,
    TILES: gl.constexpr, KS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Hidden values of 32 TILES columns and up to 8 pairs of one expert; tiles below `shared` are the shared expert's.

    tile [.., 3] int32: expert (-1: none), first place in `order`, pairs. A pair is row * TOPK + choice; the shared
    expert's follow all. values and scales are descriptors of w13's tiles, in blocks of KS. h float32 [pairs + rows,
    INNER] is scratch; hq [pairs, INNER] e4m3 in slots, sq [rows, INNER] f16 paired, hs [pairs + rows, INNER / 128]."""
    PIECES: gl.constexpr = INNER // (32 * TILES)
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4 * TILES, 1], [16, 8, 32])
    SOME: gl.constexpr = 8 if DIM % 1024 == 0 else (2 if DIM % 256 == 0 else 1)
    ws, es, bar = stages(KS, TILES, STAGES)
    room = room_for_rows(DIM, SOME)
    xs = room._reinterpret(gl.float8e4nv, [DIM // 128, 8, 128], gl.NVMMASharedLayout(128, 8))
    _shared_up(
        x_ptr, xs_ptr, shared_ptr, shared_scale_ptr, h_ptr, sq_ptr, hs_ptr, count_ptr, order_ptr,
        rows, pairs, limit, shared, DIM, INNER, TILES,
    )  # fmt: skip
    it = 0
    step = gl.num_programs(0)
    for item in range((gl.program_id(0) + step - shared * PIECES % step) % step, tiles * PIECES, step):
        tile = item // PIECES
        expert, first, count = _entry(tile_ptr, tile)
        if expert >= 0:
            at = expert * (INNER // 32) + item % PIECES * TILES
            begin(values, scales, ws, es, bar, at, KS, TILES, STAGES)
            jh = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, halves_layout(TILES))))
            ph = gl.load(order_ptr + first + jh, mask=jh < count, other=0)
            rows_of_halves(room, x_ptr, ph // TOPK, jh < count, DIM, SOME, TILES)
            fence_async_shared()  # by those who wrote x, before the barrier
            gl.thread_barrier()
            F: gl.constexpr = factor_layout(TILES, KS)
            jf = gl.arange(0, 8, gl.SliceLayout(1, F))
            pf = gl.load(order_ptr + first + jf, mask=jf < count, other=0) // TOPK
            factor_ptr = xs_ptr + (pf * (DIM // 128))[:, None] + gl.arange(0, KS, gl.SliceLayout(0, F))[None, :]
            n0 = item % PIECES * (32 * TILES)
            m = gl.arange(0, 64 * TILES, gl.SliceLayout(1, MMA))
            top = gl.load(top_ptr + expert * (2 * INNER) + n0 + (m // 16) * 8 + m % 8 + ((m // 8) % 2) * INNER)
            jo = gl.arange(0, 8, gl.SliceLayout(0, MMA))
            po = gl.load(order_ptr + first + jo, mask=jo < count, other=0)
            gates = gl.load(gate_ptr + po, mask=jo < count, other=0.0)
            acc = multiply(values, scales, ws, es, bar, it, at, xs, factor_ptr, top, DIM, KS, TILES, STAGES, MMA)
            it += DIM // 128 // KS
            _finish(
                acc, po, jo < count, gates, n0, shared + tile, limit,
                h_ptr, hq_ptr, hs_ptr, count_ptr, first, order_ptr, count, pairs, False, INNER, TILES,
            )  # fmt: skip


@gluon.jit
def _entry(tile_ptr, tile):
    """Expert, first place in `order` and pairs of a tile."""
    return gl.load(tile_ptr + tile * 3), gl.load(tile_ptr + tile * 3 + 1), gl.load(tile_ptr + tile * 3 + 2)


@gluon.jit
def _shared_up(
    x_ptr, xs_ptr, w_ptr, scale_ptr, h_ptr, sq_ptr, hs_ptr, count_ptr, order_ptr,
    rows, pairs, limit, shared,
    DIM: gl.constexpr, INNER: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """A program's share of the shared expert's hidden values."""
    PIECES: gl.constexpr = INNER // (32 * TILES)
    MMA: gl.constexpr = mma_layout(4 * TILES)
    for piece in range(gl.program_id(0), shared * PIECES, gl.num_programs(0)):
        tile, n0 = piece // PIECES, piece % PIECES * (32 * TILES)
        m = gl.arange(0, 64 * TILES, gl.SliceLayout(1, MMA))
        row = n0 + (m // 16) * 8 + m % 8 + ((m // 8) % 2) * INNER  # a thread's two rows are a gate and its up
        jx = gl.arange(0, 8, gl.SliceLayout(1, gl.SliceLayout(2, row_layout(8, 4 * TILES))))
        jo = gl.arange(0, 8, gl.SliceLayout(0, MMA))
        first, count = tile * 8, gl.minimum(rows - tile * 8, 8)
        tx, to = gl.minimum(first + jx, rows - 1), gl.minimum(first + jo, rows - 1)
        acc = _fp8_rows(w_ptr, scale_ptr, x_ptr, xs_ptr, row, tx, to, DIM, TILES)
        gates = gl.full([8], 1.0, gl.float32, gl.SliceLayout(0, MMA))
        _finish(
            acc, pairs + first + jo, jo < count, gates, n0, tile, limit,
            h_ptr, sq_ptr, hs_ptr, count_ptr, pairs + first, order_ptr, count, pairs, True, INNER, TILES,
        )  # fmt: skip


@gluon.jit
def _shared_down(
    sq_ptr, hs_ptr, w_ptr, scale_ptr, each_ptr, out_ptr, count_ptr, rows, pairs, shared,
    DIM: gl.constexpr, INNER: gl.constexpr, TOPK: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """A program's share of the shared expert's output."""
    PIECES: gl.constexpr = DIM // (64 * TILES)
    MMA: gl.constexpr = mma_layout(4 * TILES)
    for piece in range(gl.program_id(0), shared * PIECES, gl.num_programs(0)):
        tile, n0 = piece // PIECES, piece % PIECES * (64 * TILES)
        row = n0 + gl.arange(0, 64 * TILES, gl.SliceLayout(1, MMA))
        jx = gl.arange(0, 8, gl.SliceLayout(1, gl.SliceLayout(2, row_layout(8, 4 * TILES))))
        jo = gl.arange(0, 8, gl.SliceLayout(0, MMA))
        first, count = tile * 8, gl.minimum(rows - tile * 8, 8)
        tx, to = gl.minimum(first + jx, rows - 1), gl.minimum(first + jo, rows - 1)
        acc = _fp8_rows(w_ptr, scale_ptr, sq_ptr, hs_ptr, row, tx, to, INNER, TILES)
        _add(
            acc, pairs + to, to, jo < count, out_ptr, each_ptr, out_ptr, count_ptr, row, n0, pairs,
            TOPK, DIM, TILES, False,
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
    q_ptr,
    hs_ptr,
    count_ptr,
    first,
    order_ptr,
    count,
    pairs,
    SHARED: gl.constexpr,
    INNER: gl.constexpr,
    TILES: gl.constexpr,
):
    """SwiGLU of acc [64 TILES, 8]; the last of the programs of 128 columns rounds them to the e4m3 grid."""
    halves = gl.permute(gl.reshape(acc, [4 * TILES, 2, 8, 8]), (0, 2, 3, 1))
    gate, up_ = gl.split(halves)
    gate, up_ = gl.reshape(gate, [32 * TILES, 8]), gl.reshape(up_, [32 * TILES, 8])
    L: gl.constexpr = gate.type.layout
    j = gl.convert_layout(pair, gl.SliceLayout(0, L))
    keep = gl.convert_layout(wanted.to(gl.int32), gl.SliceLayout(0, L)) != 0
    weight = gl.convert_layout(gates, gl.SliceLayout(0, L))
    gate = gl.where(gate > limit, limit, gate)
    up_ = gl.where(up_ > limit, limit, gl.where(up_ < -limit, -limit, up_))
    hidden = gate / (1.0 + gl.exp(-gate)) * up_ * weight[None, :]
    n = n0 + gl.arange(0, 32 * TILES, gl.SliceLayout(1, L))
    gl.store(h_ptr + j[None, :] * INNER + n[:, None], hidden, mask=keep[None, :])
    gl.thread_barrier()
    group = n0 // 128
    mine = count_ptr + tile * (INNER // 128) + group
    if gl.atomic_add(mine, 1, sem="acq_rel") == 4 // TILES - 1:
        B: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4 * TILES, 1], [1, 0])
        i = gl.arange(0, 8, gl.SliceLayout(1, B))
        p = first + i
        if not SHARED:
            p = gl.load(order_ptr + first + i, mask=i < count, other=0)
        d = gl.arange(0, 128, gl.SliceLayout(0, B))
        there = (i < count)[:, None]
        at = p[:, None] * INNER + group * 128
        values = gl.load(h_ptr + at + d[None, :], mask=there, other=0.0, cache_modifier=".cg")
        scale, inverse = scale_of(gl.max(gl.abs(values), axis=1))
        values = (values * inverse[:, None]).to(gl.float8e4nv)
        if SHARED:
            gl.store(q_ptr + at - pairs * INNER + paired(d)[None, :], values.to(gl.float16), mask=there)
        else:
            slot = d // 8 % 4 * 32 + d // 4 % 2 * 16 + d // 32 * 4 + d % 4
            gl.store(q_ptr + at + slot[None, :], values.to(gl.uint8, bitcast=True), mask=there)
        gl.store(hs_ptr + p * (INNER // 128) + group, scale, mask=i < count)
        gl.store(mine, 0)


@gluon.jit(do_not_specialize=["rows", "pairs", "tiles", "shared"])
def down(
    hq_ptr, sq_ptr, hs_ptr, tile_ptr, order_ptr, values, scales, top_ptr, shared_ptr, shared_scale_ptr,
    apart_ptr, each_ptr, out_ptr, count_ptr, rows, pairs, tiles, shared,
    DIM: gl.constexpr, INNER: gl.constexpr, TOPK: gl.constexpr,
    TILES: gl.constexpr, KS: gl.constexpr, STAGES: gl.constexpr, APART: gl.constexpr,
):  # fmt: skip
    """64 TILES columns of w2 for the pairs of a tile, into each [pairs + rows, DIM] float32.

    The last of a row's experts adds them up, in the order of the row's choices and the shared expert last, into out
    [rows, DIM]. APART: the shared expert's output is there already, apart [rows, DIM], and `shared` is 0.
    """
    PIECES: gl.constexpr = DIM // (64 * TILES)
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4 * TILES, 1], [16, 8, 32])
    SOME: gl.constexpr = 8 if INNER % 1024 == 0 else (2 if INNER % 256 == 0 else 1)
    ws, es, bar = stages(KS, TILES, STAGES)
    room = room_for_rows(INNER, SOME)
    xs = room._reinterpret(gl.float8e4nv, [INNER // 128, 8, 128], gl.NVMMASharedLayout(128, 8))
    _shared_down(
        sq_ptr, hs_ptr + pairs * (INNER // 128), shared_ptr, shared_scale_ptr, each_ptr, out_ptr, count_ptr,
        rows, pairs, shared, DIM, INNER, TOPK, TILES,
    )  # fmt: skip
    it = 0
    step = gl.num_programs(0)
    for item in range((gl.program_id(0) + step - shared * PIECES % step) % step, tiles * PIECES, step):
        tile = item // PIECES
        expert, first, count = _entry(tile_ptr, tile)
        if expert >= 0:
            at = expert * (DIM // 64) + item % PIECES * TILES
            begin(values, scales, ws, es, bar, at, KS, TILES, STAGES)
            jh = gl.arange(0, 8 * SOME, gl.SliceLayout(1, slots_layout(TILES))) % 8
            ph = gl.load(order_ptr + first + jh, mask=jh < count, other=0)
            rows_of_slots(room, hq_ptr, ph, jh < count, INNER, SOME, TILES)
            fence_async_shared()
            gl.thread_barrier()
            F: gl.constexpr = factor_layout(TILES, KS)
            jf = gl.arange(0, 8, gl.SliceLayout(1, F))
            pf = gl.load(order_ptr + first + jf, mask=jf < count, other=0)
            factor_ptr = hs_ptr + (pf * (INNER // 128))[:, None] + gl.arange(0, KS, gl.SliceLayout(0, F))[None, :]
            n0 = item % PIECES * (64 * TILES)
            row = n0 + gl.arange(0, 64 * TILES, gl.SliceLayout(1, MMA))
            top = gl.load(top_ptr + expert * DIM + row)
            jo = gl.arange(0, 8, gl.SliceLayout(0, MMA))
            po = gl.load(order_ptr + first + jo, mask=jo < count, other=0)
            acc = multiply(values, scales, ws, es, bar, it, at, xs, factor_ptr, top, INNER, KS, TILES, STAGES, MMA)
            it += INNER // 128 // KS
            _add(
                acc, po, po // TOPK, jo < count, apart_ptr, each_ptr, out_ptr, count_ptr, row, n0, pairs,
                TOPK, DIM, TILES, APART,
            )  # fmt: skip


@gluon.jit
def _add(
    acc,
    pair,
    token,
    wanted,
    apart_ptr,
    each_ptr,
    out_ptr,
    count_ptr,
    row,
    n0,
    pairs,
    TOPK: gl.constexpr,
    DIM: gl.constexpr,
    TILES: gl.constexpr,
    APART: gl.constexpr,
):
    """Store products of pairs; who stores the last of a row adds them up."""
    gl.store(each_ptr + pair[None, :] * DIM + row[:, None], acc, mask=wanted[None, :])
    B: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [4 * TILES, 1], [1, 0])
    T: gl.constexpr = gl.SliceLayout(1, B)
    t = gl.convert_layout(token, T)
    there = gl.convert_layout(wanted.to(gl.int32), T) != 0
    gl.thread_barrier()
    mine = count_ptr + t * (DIM // 64) + n0 // 64
    before = gl.atomic_add(mine, gl.full([8], 1, gl.int32, T), mask=there, sem="acq_rel")
    last = there & (before == TOPK - APART)
    if gl.max(last.to(gl.int32), axis=0) > 0:
        d = n0 + gl.arange(0, 64 * TILES, gl.SliceLayout(0, B))
        keep = last[:, None]
        total = gl.zeros([8, 64 * TILES], gl.float32, B)
        for s in gl.static_range(TOPK):
            at = each_ptr + (t * TOPK + s)[:, None] * DIM + d[None, :]
            total += gl.load(at, mask=keep, other=0.0, cache_modifier=".cg")
        if APART:
            shared = gl.load(apart_ptr + t[:, None] * DIM + d[None, :], mask=keep, other=0.0).to(gl.float32)
        else:
            at = each_ptr + (pairs + t)[:, None] * DIM + d[None, :]
            shared = gl.load(at, mask=keep, other=0.0, cache_modifier=".cg")
        total += shared
        gl.store(out_ptr + t[:, None] * DIM + d[None, :], total.to(out_ptr.dtype.element_ty), mask=keep)
        gl.store(mine, gl.full([8], 0, gl.int32, T), mask=last)
