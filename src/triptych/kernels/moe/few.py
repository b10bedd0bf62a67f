"""Experts of few rows (decode), from weights as released: two launches behind the router.

    up     routed w13 in MXFP4 and the shared one in FP8, SwiGLU, routing weight, rounding to the e4m3 grid
    down   w2 of all of them, and the sum over a row's experts

The first programs are the shared expert's (shared.py). Each of the others has 64 rows of weights or 128 (TILES) and up
to eight pairs of one expert, of many rows several such pieces one after the other (RUN): then it takes its pairs'
rows once, and the next piece's weights are on their way before the last one's sums are done. Whoever finishes last what
another step needs whole, a group of 128 hidden values or all experts of a row, does that step; sums are in a fixed
order, so results do not depend on who that was. Counters are back at zero afterwards.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from triptych.kernels.barriers import forget
from triptych.kernels.moe.shared import shared_down, shared_up, swiglu
from triptych.kernels.moe.stream import begin, multiply, rows_in_slots, rows_layout, scales_of_rows, stages
from triptych.kernels.quant.e4m3 import scale_of


@gluon.jit(do_not_specialize=["rows", "pairs", "tiles", "shared"])
def up(
    x_ptr, xs_ptr, tile_ptr, order_ptr, gate_ptr, values, scales, top_ptr, x, shared_w, shared_scale_ptr, sums_ptr,
    h_ptr, hq_ptr, hs_ptr, count_ptr, rows, pairs, tiles, limit, shared,
    DIM: gl.constexpr, INNER: gl.constexpr, TOPK: gl.constexpr, RUN: gl.constexpr, TILES: gl.constexpr,
    KS: gl.constexpr, STAGES: gl.constexpr, SHARED_ROWS: gl.constexpr, PARTS: gl.constexpr, SHARED_STAGES: gl.constexpr,
):  # fmt: skip
    """Hidden values of RUN times 32 TILES columns and up to 8 pairs of one expert, or, first, those of the shared
    expert for `shared` times SHARED_ROWS rows.

    x [rows, DIM] e4m3, xs [DIM / 128, rows]. tile [.., 3] int32: expert (-1: none), first place in `order`, pairs. A
    pair is row * TOPK + choice. values and scales are descriptors of w13's tiles, in blocks of KS; x and shared_w of x
    and of the shared w13. h float32 [pairs, INNER] and sums, see shared_up, are scratch; hq [pairs + rows, INNER] e4m3
    and hs [INNER / 128, pairs + rows] are results, the shared expert's behind all others."""
    RUNS: gl.constexpr = INNER // (32 * TILES * RUN)
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4 * TILES, 1], [16, 8, 32])
    others = shared * (INNER // 32 * PARTS)
    if gl.program_id(0) < others:
        shared_up(
            shared_w, shared_scale_ptr, x, xs_ptr, sums_ptr, hq_ptr, hs_ptr, count_ptr, gl.program_id(0), rows, pairs,
            limit, DIM, INNER, SHARED_ROWS, PARTS, SHARED_STAGES,
        )  # fmt: skip
    else:
        ws, es, bar = stages(KS, TILES, STAGES)
        it = 0
        for item in range(gl.program_id(0) - others, tiles * RUNS, gl.num_programs(0) - others):
            tile = item // RUNS
            expert, first, count = entry(tile_ptr, tile)
            if expert >= 0:
                start = item % RUNS * RUN
                row = (expert * RUNS * RUN + start) * TILES
                begin(values, scales, ws, es, bar, it, row, KS, TILES, STAGES)
                xs, fs = _operands(x_ptr, xs_ptr, rows, order_ptr + first, count, DIM, KS, TOPK, TILES)
                m = gl.arange(0, 64 * TILES, gl.SliceLayout(1, MMA))
                top_at = top_ptr + expert * (2 * INNER) + (m // 16) * 8 + m % 8 + ((m // 8) % 2) * INNER
                jo = gl.arange(0, 8, gl.SliceLayout(0, MMA))
                po = gl.load(order_ptr + first + jo, mask=jo < count, other=0)
                gates = gl.load(gate_ptr + po, mask=jo < count, other=0.0)
                for i in range(RUN):
                    n0 = (start + i) * (32 * TILES)
                    top = gl.load(top_at + n0)
                    next_row = gl.where(i + 1 < RUN, row + TILES, -1)
                    acc = multiply(
                        values, scales, ws, es, bar, it, row, next_row, xs, fs, top, DIM, KS, TILES, STAGES, MMA
                    )
                    it += DIM // 128 // KS
                    row += TILES
                    _finish(
                        acc, po, jo < count, gates, n0, shared + tile, limit,
                        h_ptr, hq_ptr, hs_ptr, count_ptr, first, order_ptr, count, pairs + rows, INNER, TILES,
                    )  # fmt: skip
        forget(bar, STAGES)


@gluon.jit
def entry(tile_ptr, tile):
    """Expert, first place in `order` and pairs of a tile."""
    return gl.load(tile_ptr + tile * 3), gl.load(tile_ptr + tile * 3 + 1), gl.load(tile_ptr + tile * 3 + 2)


@gluon.jit
def _operands(
    x_ptr, xs_ptr, stride, order_ptr, count, K: gl.constexpr, KS: gl.constexpr, PER: gl.constexpr, TILES: gl.constexpr
):  # fmt: skip
    """Rows order[j] / PER of x, j < count, and their scales [K / 128, stride] in shared memory."""
    j = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, rows_layout(TILES))))
    pair = gl.load(order_ptr + j, mask=j < count, other=0)
    fs = scales_of_rows(xs_ptr, stride, order_ptr, count, K, KS, PER, TILES)
    xs = rows_in_slots(x_ptr, pair // PER, j < count, K, TILES)
    fence_async_shared()  # by those who wrote x, before the barrier
    gl.thread_barrier()
    return xs, fs


@gluon.jit
def _finish(
    acc, pair, wanted, gates, n0, tile, limit, h_ptr, q_ptr, hs_ptr, count_ptr, first, order_ptr, count, stride,
    INNER: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """SwiGLU of acc [64 TILES, 8]; the last of the programs of 128 columns rounds them to the e4m3 grid."""
    halves = gl.permute(gl.reshape(acc, [4 * TILES, 2, 8, 8]), (0, 2, 3, 1))
    gate, up_ = gl.split(halves)
    gate, up_ = gl.reshape(gate, [32 * TILES, 8]), gl.reshape(up_, [32 * TILES, 8])
    L: gl.constexpr = gate.type.layout
    j = gl.convert_layout(pair, gl.SliceLayout(0, L))
    keep = gl.convert_layout(wanted.to(gl.int32), gl.SliceLayout(0, L)) != 0
    weight = gl.convert_layout(gates, gl.SliceLayout(0, L))
    hidden = swiglu(gate, up_, limit) * weight[None, :]
    n = n0 + gl.arange(0, 32 * TILES, gl.SliceLayout(1, L))
    gl.store(h_ptr + j[None, :] * INNER + n[:, None], hidden, mask=keep[None, :])
    gl.thread_barrier()
    group = n0 // 128
    mine = count_ptr + tile * (INNER // 128) + group
    if gl.atomic_add(mine, 1, sem="acq_rel") == 4 // TILES - 1:
        B: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4 * TILES, 1], [1, 0])
        i = gl.arange(0, 8, gl.SliceLayout(1, B))
        p = gl.load(order_ptr + first + i, mask=i < count, other=0)
        d = gl.arange(0, 128, gl.SliceLayout(0, B))
        there = (i < count)[:, None]
        at = p[:, None] * INNER + group * 128
        values = gl.load(h_ptr + at + d[None, :], mask=there, other=0.0, cache_modifier=".cg")
        scale, inverse = scale_of(gl.max(gl.abs(values), axis=1))
        values = (values * inverse[:, None]).to(gl.float8e4nv)
        gl.store(q_ptr + at + d[None, :], values.to(gl.uint8, bitcast=True), mask=there)
        gl.store(hs_ptr + group * stride + p, scale, mask=i < count)
        gl.store(mine, 0)


@gluon.jit(do_not_specialize=["rows", "pairs", "tiles", "shared"])
def down(
    hq_ptr, hs_ptr, tile_ptr, order_ptr, values, scales, top_ptr, h, shared_w, shared_scale_ptr,
    each_ptr, out_ptr, count_ptr, rows, pairs, tiles, shared,
    DIM: gl.constexpr, INNER: gl.constexpr, TOPK: gl.constexpr, RUN: gl.constexpr, TILES: gl.constexpr,
    KS: gl.constexpr, STAGES: gl.constexpr, SHARED_ROWS: gl.constexpr, PARTS: gl.constexpr, SHARED_STAGES: gl.constexpr,
):  # fmt: skip
    """RUN times 64 TILES columns of w2 for the pairs of a tile, into each [pairs + PARTS * rows, DIM] float32.

    The last of a row's experts adds them up, in the order of the row's choices and the shared expert last, into out
    [rows, DIM]. h is the descriptor of the shared expert's rows of hq.
    """
    RUNS: gl.constexpr = DIM // (64 * TILES * RUN)
    others = shared * (DIM // 64 * PARTS)
    if gl.program_id(0) < others:
        N: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4 * TILES, 1], [16, SHARED_ROWS, 32])
        acc, row, first, part = shared_down(
            shared_w, shared_scale_ptr, h, hs_ptr, gl.program_id(0), rows, pairs,
            INNER, SHARED_ROWS, PARTS, SHARED_STAGES, N,
        )  # fmt: skip
        t = first + gl.arange(0, SHARED_ROWS, gl.SliceLayout(0, N))
        keep(acc, pairs + part * rows + t, t < rows, each_ptr, row * 64, DIM)
        for t0 in range(first, gl.minimum(first + SHARED_ROWS, rows), 8):
            t8 = t0 + gl.arange(0, 8, gl.SliceLayout(1, sum_layout(TILES)))
            add(t8, t8 < rows, each_ptr, out_ptr, count_ptr, row * 64, rows, pairs, TOPK, PARTS, DIM, TILES)
    else:
        MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4 * TILES, 1], [16, 8, 32])
        ws, es, bar = stages(KS, TILES, STAGES)
        it = 0
        for item in range(gl.program_id(0) - others, tiles * RUNS, gl.num_programs(0) - others):
            tile = item // RUNS
            expert, first, count = entry(tile_ptr, tile)
            if expert >= 0:
                start = item % RUNS * RUN
                row = (expert * RUNS * RUN + start) * TILES
                begin(values, scales, ws, es, bar, it, row, KS, TILES, STAGES)
                xs, fs = _operands(hq_ptr, hs_ptr, pairs + rows, order_ptr + first, count, INNER, KS, 1, TILES)
                top_at = top_ptr + expert * DIM + gl.arange(0, 64 * TILES, gl.SliceLayout(1, MMA))
                jo = gl.arange(0, 8, gl.SliceLayout(0, MMA))
                po = gl.load(order_ptr + first + jo, mask=jo < count, other=0)
                j8 = gl.arange(0, 8, gl.SliceLayout(1, sum_layout(TILES)))
                t8 = gl.load(order_ptr + first + j8, mask=j8 < count, other=0) // TOPK
                for i in range(RUN):
                    n0 = (start + i) * (64 * TILES)
                    top = gl.load(top_at + n0)
                    next_row = gl.where(i + 1 < RUN, row + TILES, -1)
                    acc = multiply(
                        values, scales, ws, es, bar, it, row, next_row, xs, fs, top, INNER, KS, TILES, STAGES, MMA
                    )
                    it += INNER // 128 // KS
                    row += TILES
                    keep(acc, po, jo < count, each_ptr, n0, DIM)
                    add(t8, j8 < count, each_ptr, out_ptr, count_ptr, n0, rows, pairs, TOPK, PARTS, DIM, TILES)
        forget(bar, STAGES)


@gluon.jit
def keep(acc, pair, wanted, each_ptr, n0, DIM: gl.constexpr):
    """Products acc [64 TILES, N] into rows `pair` [N] of each."""
    MMA: gl.constexpr = acc.type.layout
    row = n0 + gl.arange(0, acc.shape[0], gl.SliceLayout(1, MMA))
    gl.store(each_ptr + pair[None, :] * DIM + row[:, None], acc, mask=wanted[None, :])
    gl.thread_barrier()


@gluon.constexpr_function
def sum_layout(tiles):
    """[8, 64 tiles] float32 of outputs."""
    return gl.BlockedLayout([1, 2], [1, 32], [4 * tiles, 1], [1, 0])


@gluon.jit
def add(
    t, there, each_ptr, out_ptr, count_ptr, n0, rows, pairs,
    TOPK: gl.constexpr, PARTS: gl.constexpr, DIM: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """Another of the products of rows t [8] is kept; of those whose last it is they are added up."""
    B: gl.constexpr = sum_layout(TILES)
    mine = count_ptr + t * (DIM // 64) + n0 // 64
    before = gl.atomic_add(mine, gl.full([8], 1, gl.int32, gl.SliceLayout(1, B)), mask=there, sem="acq_rel")
    last = there & (before == TOPK + PARTS - 1)
    if gl.max(last.to(gl.int32), axis=0) > 0:
        d = n0 + gl.arange(0, 64 * TILES, gl.SliceLayout(0, B))
        keep = last[:, None]
        total = gl.zeros([8, 64 * TILES], gl.float32, B)
        for s in gl.static_range(TOPK + PARTS):
            place = t * TOPK + s if s < TOPK else pairs + (s - TOPK) * rows + t
            at = each_ptr + place[:, None] * DIM + d[None, :]
            total += gl.load(at, mask=keep, other=0.0, cache_modifier=".cg")
        gl.store(out_ptr + t[:, None] * DIM + d[None, :], total.to(out_ptr.dtype.element_ty), mask=keep)
        gl.store(mine, gl.full([8], 0, gl.int32, gl.SliceLayout(1, B)), mask=last)
