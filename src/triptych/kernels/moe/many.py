"""Experts of many rows (prefill), from tiles of MXFP4 on the FP8 tensor cores.

A product is computed turned over, W x^T: its left operand may lie in registers, so MXFP4 becomes e4m3 there
(stream.py), and only packed weights go through shared memory. The rows of x are those of the pairs, sorted by expert,
so what a program multiplies by is one block of memory, and bulk copies fetch it. Programs stay and take one piece of
work after another, so that fetching never stops; two of them share a multiprocessor, and while one sums up in float32
the other has the tensor cores.

Each 128 columns are summed apart and scaled in float32, since the tensor cores keep few bits of an e4m3 sum.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from triptych.kernels.barriers import forget
from triptych.kernels.moe.stream import expand, shifts


@gluon.jit
def _stages(N: gl.constexpr, KS: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr):
    """Shared memory for x, tiles and their scales, and what says that they came."""
    xs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * KS, N, 128], gl.NVMMASharedLayout(128, 8))
    ws = gl.allocate_shared_memory(gl.uint8, [STAGES, TILES, KS * 32, 128], gl.NVMMASharedLayout(128, 8, rank=3))
    es = gl.allocate_shared_memory(
        gl.uint8, [STAGES, TILES, KS * 2, 128], gl.NVMMASharedLayout(0 if KS < 4 else 128, 8, rank=3)
    )
    bar = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(bar.index(s), count=1)
    fence_async_shared()
    gl.thread_barrier()
    return xs, ws, es, bar


@gluon.jit
def _fetch(sources, room, first, row, chunk, s, N: gl.constexpr, KS: gl.constexpr, TILES: gl.constexpr):
    """Blocks [KS chunk, KS chunk + KS) of N rows of x and of tiles [row, row + TILES), on their way into stage s."""
    x, values, scales = sources
    xs, ws, es, bars = room
    bar = bars.index(s)
    mbarrier.expect(bar, KS * (N * 128 + TILES * 4352))
    for j in gl.static_range(KS):
        tma.async_copy_global_to_shared(x, [first, (chunk * KS + j) * 128], bar, xs.index(s * KS + j))
    tma.async_copy_global_to_shared(values, [row, chunk * KS * 32, 0], bar, ws.index(s))
    tma.async_copy_global_to_shared(scales, [row, chunk * KS * 2, 0], bar, es.index(s))


@gluon.jit
def _multiply(
    sources, room, scale_ptr, padded, it, first, row, next_first, next_row,
    K: gl.constexpr, N: gl.constexpr, KS: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """sum over K of row tiles [row, row + TILES) times x[first ..] -> float32 [64 TILES, N], without the rows' largest
    scales; next_row is -1 if nothing comes next. See stream.multiply."""
    CHUNKS: gl.constexpr = K // 128 // KS
    A: gl.constexpr = gl.SliceLayout(0, MMA)
    xs, ws, es, bars = room
    factor_ptr = scale_ptr + first + gl.arange(0, N, A)  # there are N more columns than pairs
    total = gl.zeros([64 * TILES, N], gl.float32, MMA)
    zero = gl.zeros([64 * TILES, N], gl.float32, MMA)
    for chunk in range(0, CHUNKS):
        s = (it + chunk) % STAGES
        mbarrier.wait(bars.index(s), ((it + chunk) // STAGES) & 1)
        shift = shifts(es.index(s), TILES, KS)
        for step in gl.static_range(KS):
            a = expand(ws.index(s).slice(step * 32, 32, 1), shift, step, KS, TILES, MMA)
            x = xs.index(s * KS + step).permute((1, 0))
            running = warpgroup_mma(a, x, zero, use_acc=False, is_async=True)
            factor = gl.load(factor_ptr)
            factor_ptr += padded
            part = warpgroup_mma_wait(0, deps=[running])
            total += part * factor[None, :]
        gl.thread_barrier()
        if chunk + STAGES < CHUNKS:
            _fetch(sources, room, first, row, chunk + STAGES, s, N, KS, TILES)
        elif next_row >= 0:
            _fetch(sources, room, next_first, next_row, chunk + STAGES - CHUNKS, s, N, KS, TILES)
    return total


@gluon.jit
def _raised(total, top_ptr):
    """total [R, N] times the largest scales of its rows; top_ptr [R]."""
    return total * (gl.maximum(gl.load(top_ptr).to(gl.int32) - 6, 1) << 23).to(gl.float32, bitcast=True)[:, None]


@gluon.jit
def _place(tile_ptr, item, items, PIECES: gl.constexpr, ROW_TILES: gl.constexpr, TILES: gl.constexpr):
    """First pair and first row tile of a piece of work, -1 if there is none."""
    entry = tile_ptr + item // PIECES * 3
    known = item < items
    expert = gl.load(entry, mask=known, other=0)
    row = gl.where(known, expert * ROW_TILES + item % PIECES * TILES, -1)
    return gl.load(entry + 1, mask=known, other=0), row


@gluon.jit
def up(
    x, values, scales, scale_ptr, padded, tile_ptr, tiles_ptr, gate_ptr, top_ptr, h_ptr, limit,
    ROWS: gl.constexpr, K: gl.constexpr, N: gl.constexpr, KS: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Hidden values h [pairs, ROWS / 2], 32 TILES columns of up to N sorted pairs of an expert at a time.

    x is the descriptor of rows [pairs, K] e4m3 in slots, values and scales those of w13's tiles. scale [K / 128,
    padded] float32 has at least 128 columns more than pairs. tile [.., 3] int32: expert, first pair, pairs, of which
    there are tiles_ptr[0]; gate [pairs] the routing weights.
    """
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4 * TILES, 1], [16, N, 32])
    PIECES: gl.constexpr = ROWS // (64 * TILES)
    INNER: gl.constexpr = ROWS // 2
    items = gl.load(tiles_ptr) * PIECES
    room = _stages(N, KS, TILES, STAGES)
    sources = (x, values, scales)
    item = gl.program_id(0)
    first, row = _place(tile_ptr, item, items, PIECES, ROWS // 64, TILES)
    if item < items:
        for s in gl.static_range(STAGES):
            _fetch(sources, room, first, row, s, s, N, KS, TILES)
    it = 0
    while item < items:
        next_first, next_row = _place(tile_ptr, item + gl.num_programs(0), items, PIECES, ROWS // 64, TILES)
        total = _multiply(
            sources, room, scale_ptr, padded, it, first, row, next_first, next_row, K, N, KS, TILES, STAGES, MMA
        )
        entry = tile_ptr + item // PIECES * 3
        n0 = item % PIECES * (32 * TILES)
        m = gl.arange(0, 64 * TILES, gl.SliceLayout(1, MMA))
        # a thread's two rows are a gate and its up
        total = _raised(total, top_ptr + gl.load(entry) * ROWS + n0 + (m // 16) * 8 + m % 8 + ((m // 8) % 2) * INNER)
        gate, up_ = gl.split(gl.permute(gl.reshape(total, [4 * TILES, 2, 8, N]), (0, 2, 3, 1)))
        gate, up_ = gl.reshape(gate, [32 * TILES, N]), gl.reshape(up_, [32 * TILES, N])
        L: gl.constexpr = gate.type.layout
        j = gl.arange(0, N, gl.SliceLayout(0, L))
        count = gl.load(entry + 2)
        weight = gl.load(gate_ptr + first + j, mask=j < count, other=0.0)
        gate = gl.where(gate > limit, limit, gate)
        up_ = gl.where(up_ > limit, limit, gl.where(up_ < -limit, -limit, up_))
        hidden = gate / (1.0 + gl.exp(-gate)) * up_ * weight[None, :]
        n = n0 + gl.arange(0, 32 * TILES, gl.SliceLayout(1, L))
        at = (first + j).to(gl.int64)[None, :] * INNER + n[:, None]
        gl.store(h_ptr + at, hidden.to(h_ptr.dtype.element_ty), mask=(j < count)[None, :])
        it += K // 128 // KS
        item += gl.num_programs(0)
        first, row = next_first, next_row
    forget(room[3], STAGES)


@gluon.jit
def down(
    x, values, scales, scale_ptr, padded, tile_ptr, tiles_ptr, top_ptr, each_ptr,
    ROWS: gl.constexpr, K: gl.constexpr, N: gl.constexpr, KS: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """each [pairs, ROWS], 64 TILES columns of up to N sorted pairs of an expert at a time; x [pairs, K] as above."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4 * TILES, 1], [16, N, 32])
    PIECES: gl.constexpr = ROWS // (64 * TILES)
    items = gl.load(tiles_ptr) * PIECES
    room = _stages(N, KS, TILES, STAGES)
    sources = (x, values, scales)
    item = gl.program_id(0)
    first, row = _place(tile_ptr, item, items, PIECES, ROWS // 64, TILES)
    if item < items:
        for s in gl.static_range(STAGES):
            _fetch(sources, room, first, row, s, s, N, KS, TILES)
    it = 0
    while item < items:
        next_first, next_row = _place(tile_ptr, item + gl.num_programs(0), items, PIECES, ROWS // 64, TILES)
        total = _multiply(
            sources, room, scale_ptr, padded, it, first, row, next_first, next_row, K, N, KS, TILES, STAGES, MMA
        )
        entry = tile_ptr + item // PIECES * 3
        n = item % PIECES * (64 * TILES) + gl.arange(0, 64 * TILES, gl.SliceLayout(1, MMA))
        total = _raised(total, top_ptr + gl.load(entry) * ROWS + n)
        j = gl.arange(0, N, gl.SliceLayout(0, MMA))
        at = (first + j).to(gl.int64)[None, :] * ROWS + n[:, None]
        gl.store(each_ptr + at, total.to(each_ptr.dtype.element_ty), mask=(j < gl.load(entry + 2))[None, :])
        it += K // 128 // KS
        item += gl.num_programs(0)
        first, row = next_first, next_row
    forget(room[3], STAGES)
