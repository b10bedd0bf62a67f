"""Scores of packed index keys for the rows of a prefill chunk, in Gluon for Hopper: rows of a sequence share its keys.

    shared memory   queries of two pairs of rows, 128 x 128 e4m3 each | keys, STAGES tiles of 128 as they lie in pages
                    | their scales | MXFP4 only: a tile of 128 x 128 e4m3
    a tile          a product of 128 keys, half of them each warpgroup, by a pair's 128 queries, then its weighing

Two rows in a product halve what is read of keys for it: one row's 64 queries would take all that shared memory gives.
Two programs of eight warps fit a multiprocessor: while some weigh, others multiply. A score depends on its row and key
alone.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from triptych.kernels.select_rows.hopper import copy_tile, pages_of, unpacked_to
from triptych.kernels.select_rows.triton import rounded_e2m1

ROWS = 4
"""Rows of a program."""


@triton.jit
def prepare(
    q_ptr,
    q_row,
    cos_ptr,
    sin_ptr,
    out_ptr,
    power_ptr,
    count,
    heads,
    ROUNDS: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROPE: tl.constexpr,
):
    """Queries of ROWS rows as e4m3 that lack a power of two a head: rotated, by Hadamard too, and rounded to e2m1."""
    h = tl.arange(0, HEADS)
    d = tl.arange(0, DIM)
    bits = d[:, None] & d[None, :]
    bits = bits ^ (bits >> 4)
    bits = bits ^ (bits >> 2)
    bits = bits ^ (bits >> 1)
    signs = (1 - 2 * (bits & 1)).to(tl.bfloat16)
    pair = tl.arange(0, DIM // 2) - (DIM - ROPE) // 2
    turns = pair >= 0
    mine = (h < heads)[:, None]
    for n in range(ROWS):
        r = tl.minimum(tl.program_id(0) * ROWS + n, count - 1).to(tl.int64)
        x = tl.load(q_ptr + r * q_row + h[:, None] * DIM + d[None, :], mask=mine, other=0.0).to(tl.float32)
        if ROPE > 0:
            cos = tl.load(cos_ptr + r * (ROPE // 2) + pair, mask=turns, other=1.0)[None, :]
            sin = tl.load(sin_ptr + r * (ROPE // 2) + pair, mask=turns, other=0.0)[None, :]
            even, odd = tl.split(tl.reshape(x, [HEADS, DIM // 2, 2]))
            x = tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), [HEADS, DIM])
        power = tl.full([HEADS], 0, tl.int32)
        if ROUNDS:
            x = tl.dot(x.to(tl.bfloat16), signs) * (DIM**-0.5)
            x, power = rounded_e2m1(x.to(tl.bfloat16).to(tl.float32), HEADS, DIM)
            power -= 6
        else:
            most = tl.max(tl.abs(x), 1).to(tl.int32, bitcast=True)
            power = tl.maximum((most >> 23) - 135 + ((most & 0x7FFFFF) > 0x600000).to(tl.int32), -100)
            x = x * ((127 - power) << 23).to(tl.float32, bitcast=True)[:, None]
        place = out_ptr + (r * heads + h)[:, None] * DIM + d[None, :]
        tl.store(place, x.to(tl.float8e4nv).to(tl.uint8, bitcast=True), mask=mine)
        tl.store(power_ptr + r * heads + h, power, mask=h < heads)


@gluon.jit
def scores(  # noqa: C901  (branches that the compiler resolves)
    q_ptr, power_ptr, weight_ptr, weight_row, pool_ptr, pool_page, pool_row, scales_ptr, scales_page, scales_row,
    table_ptr, table_row, seq_ptr, visible_ptr, out_ptr, tops_ptr, total, heads, stretch, count,
    KIND: gl.constexpr, PER_PAGE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Ordered scores of four of the `count` rows, see triton.py; q [R, heads, 128] e4m3 lacks 2^power [R, heads].

    Rows of one sequence share each tile of keys; those of several take turns.
    """
    r = gl.program_id(1) * 4
    begin = gl.program_id(0) * stretch
    last_row = count - 1
    r1, r2, r3 = gl.minimum(r + 1, last_row), gl.minimum(r + 2, last_row), gl.minimum(r + 3, last_row)
    v0, v1 = gl.load(visible_ptr + r).to(gl.int32), gl.load(visible_ptr + r1).to(gl.int32)
    v2, v3 = gl.load(visible_ptr + r2).to(gl.int32), gl.load(visible_ptr + r3).to(gl.int32)
    longest = gl.maximum(gl.maximum(v0, v1), gl.maximum(v2, v3))
    if begin >= longest:
        return
    seq = gl.load(seq_ptr + r)
    turns = 1  # rows of a chunk are sorted by sequence
    if gl.load(seq_ptr + r3) != seq:
        turns = 4
    BYTES: gl.constexpr = 128 if KIND == 1 else 64
    copied: gl.constexpr = gl.BlockedLayout([1, 16], [512 // BYTES, BYTES // 16], [8, 1], [1, 0])
    line: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    eight: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(16, 1, 4, [1, 0])
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    unpacked: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [8, 1], [1, 0])
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, 128, 32])
    q_s = gl.allocate_shared_memory(gl.uint8, [2, 128, 128], eight)
    weights_s = gl.allocate_shared_memory(gl.float32, [2, 128], flat)
    scales_s = gl.allocate_shared_memory(gl.int32, [STAGES, 128], flat)
    if KIND == 1:
        keys_s = gl.allocate_shared_memory(gl.uint8, [STAGES, 128, 128], eight)
    else:
        keys_s = gl.allocate_shared_memory(gl.uint8, [STAGES, 128, 64], plain)
        wide_s = gl.allocate_shared_memory(gl.uint8, [128, 128], eight)
        factors_s = gl.allocate_shared_memory(gl.float32, [128], flat)

    by_query: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [8, 1], [1, 0])
    i = gl.arange(0, 128, layout=gl.SliceLayout(1, by_query))
    d = gl.arange(0, 128, layout=gl.SliceLayout(0, by_query))
    iw = gl.arange(0, 128, layout=line)
    for p in gl.static_range(2):
        row = gl.minimum(r + 2 * p + i // 64, last_row).to(gl.int64)
        place = (row * heads + i % 64) * 128
        q_s.index(p).store(gl.load(q_ptr + place[:, None] + d[None, :], mask=(i % 64 < heads)[:, None], other=0))
        row = gl.minimum(r + 2 * p + iw // 64, last_row)
        there = iw % 64 < heads
        power = gl.load(power_ptr + row * heads + iw % 64, mask=there, other=0)
        weight = gl.load(weight_ptr + row * weight_row + iw % 64, mask=there, other=0.0)
        weights_s.index(p).store(weight * ((127 + power) << 23).to(gl.float32, bitcast=True))
    fence_async_shared()
    out_ptr += r.to(gl.int64) * total
    tops_ptr += r.to(gl.int64) * (total // 16)
    rows = gl.arange(0, 128, layout=gl.SliceLayout(1, copied))
    rows1 = gl.arange(0, 128, layout=line)
    q0 = q_s.index(0)._reinterpret(gl.float8e4nv, [128, 128], eight).permute((1, 0))
    q1 = q_s.index(1)._reinterpret(gl.float8e4nv, [128, 128], eight).permute((1, 0))
    for turn in range(turns):
        visible = longest
        mine = gl.minimum(r + turn, last_row)
        if turns > 1:
            visible = gl.load(visible_ptr + mine).to(gl.int32)
        last = gl.maximum(visible - 1, 0)
        line_ptr = table_ptr + gl.load(seq_ptr + mine).to(gl.int64) * table_row
        tiles = gl.maximum(gl.minimum(begin + stretch, visible) - begin + 127, 0) // 128
        # which of the rows this turn is for
        m0 = (turns == 1) | (turn == 0)
        m1 = (r + 1 < count) & ((turns == 1) | (turn == 1))
        m2 = (r + 2 < count) & ((turns == 1) | (turn == 2))
        m3 = (r + 3 < count) & ((turns == 1) | (turn == 3))
        for stage in gl.static_range(STAGES - 1):
            g = gl.minimum(begin + stage * 128 + rows, last)
            g1 = gl.minimum(begin + stage * 128 + rows1, last)
            copy_tile(
                *(keys_s.index(stage), scales_s.index(stage), pages_of(line_ptr, g, PER_PAGE), g, pool_ptr, pool_page),
                *(pool_row, pages_of(line_ptr, g1, PER_PAGE), g1, scales_ptr, scales_page, scales_row),
                *(PER_PAGE, BYTES, copied),
            )
        g = gl.minimum(begin + (STAGES - 1) * 128 + rows, last)
        g1 = gl.minimum(begin + (STAGES - 1) * 128 + rows1, last)
        page = pages_of(line_ptr, g, PER_PAGE)
        page1 = pages_of(line_ptr, g1, PER_PAGE)
        s = gl.zeros([128, 128], gl.float32, layout=MMA)
        for t in range(tiles):
            at = begin + t * 128
            async_copy.wait_group(STAGES - 2)
            gl.thread_barrier()
            if KIND == 1:
                fence_async_shared()
                keys = keys_s.index(t % STAGES)._reinterpret(gl.float8e4nv, [128, 128], eight)
                factors = scales_s.index(t % STAGES)._reinterpret(gl.float32, [128], flat)
            else:
                words = scales_s.index(t % STAGES).load(gl.SliceLayout(1, unpacked))
                target = wide_s._reinterpret(
                    gl.int32, [128, 32], gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
                )
                most = unpacked_to(target, keys_s.index(t % STAGES), words, unpacked)
                factors_s.store((gl.maximum(most - 6, 1) << 23).to(gl.float32, bitcast=True))
                fence_async_shared()
                gl.thread_barrier()
                keys = wide_s._reinterpret(gl.float8e4nv, [128, 128], eight)
                factors = factors_s
            s = warpgroup_mma(keys, q0, s, use_acc=False, is_async=True)
            if t + STAGES - 1 < tiles:
                slot = (t + STAGES - 1) % STAGES
                copy_tile(
                    *(keys_s.index(slot), scales_s.index(slot), page, g, pool_ptr, pool_page, pool_row, page1, g1),
                    *(scales_ptr, scales_page, scales_row, PER_PAGE, BYTES, copied),
                )
            else:
                async_copy.commit_group()
            g = gl.minimum(at + STAGES * 128 + rows, last)
            g1 = gl.minimum(at + STAGES * 128 + rows1, last)
            page = pages_of(line_ptr, g, PER_PAGE)
            page1 = pages_of(line_ptr, g1, PER_PAGE)
            s = warpgroup_mma_wait(0, deps=(s,))
            _keep(out_ptr, tops_ptr, s, weights_s.index(0), factors, at, total, v0, v1, m0, m1, MMA)
            s = warpgroup_mma(keys, q1, s, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=(s,))
            _keep(
                *(out_ptr + 2 * total, tops_ptr + 2 * (total // 16), s, weights_s.index(1), factors),
                *(at, total, v2, v3, m2, m3, MMA),
            )
        async_copy.wait_group(0)
        gl.thread_barrier()


@gluon.jit
def _keep(out_ptr, tops_ptr, s, weights, factors, at, total, v0, v1, m0, m1, MMA: gl.constexpr):
    """Weigh products s [128 keys, 2 rows x 64 heads]; write scores as ordered integers, and the highest of each 16.

    Keys begin at `at`; v0 and v1 are how many the rows see, m0 and m1 whether they are written.
    """
    s = gl.maximum(s, 0.0) * weights.load(gl.SliceLayout(0, MMA))[None, :]
    s = gl.sum(gl.reshape(s, [128, 2, 64]), 2)
    L: gl.constexpr = s.type.layout
    s = s * gl.convert_layout(factors.load(gl.SliceLayout(1, MMA)), gl.SliceLayout(1, L))[:, None]
    bits = gl.where(s == 0.0, 0.0, s).to(gl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = at + gl.arange(0, 128, layout=gl.SliceLayout(1, L))[:, None]
    n = gl.arange(0, 2, layout=gl.SliceLayout(0, L))[None, :]
    order = gl.where(key < gl.where(n == 0, v0, v1), order, -2147483648)
    gl.store(out_ptr + (n * total + key), order, mask=gl.where(n == 0, m0, m1) & (key >= 0))
    top = gl.max(gl.reshape(order, [8, 16, 2]), 1)
    T: gl.constexpr = top.type.layout
    group = at // 16 + gl.arange(0, 8, layout=gl.SliceLayout(1, T))[:, None]
    n = gl.arange(0, 2, layout=gl.SliceLayout(0, T))[None, :]
    gl.store(tops_ptr + (n * (total // 16) + group), top, mask=gl.where(n == 0, m0, m1) & (group >= 0))
