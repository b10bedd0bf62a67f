"""Scores of packed index keys for Hopper, in Gluon: keys stream through shared memory to the FP8 tensor cores.

    shared memory   queries 64 x 128 e4m3 | keys, STAGES tiles of 128 as they lie in pages | their scales
    one warp        asks for pages of the next tiles, a bulk copy each
    four warps      multiply a tile by the queries (MXFP4 keys as the left operand, expanded in registers), weigh, write

A program takes a row's stretch of keys. Pages beyond what the row sees read as its last one.
"""

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from triptych.kernels.index.ref import PagedEntries
from triptych.kernels.quant.formats import PackedRows
from triptych.kernels.select_rows.weigh import (
    expanded,
    factors_of,
    in_order,
    line_layout,
    summed,
    weighed,
    weight_of,
    weights_of,
)

_STAGES = {"fp8": 4, "mxfp4": 6}


def score(
    prepared: tuple[Tensor, Tensor], weights: Tensor, keys: PagedEntries, out: tuple[Tensor, Tensor], stretch: int
) -> None:
    """Ordered scores and their tops, `out`, of queries [R, heads, 128] e4m3 and their powers of two [R, heads]."""
    q, power = prepared
    rows, total = out[0].shape
    pool = keys.pool
    assert isinstance(pool, PackedRows)
    pages, per_page, width = pool.values.shape
    copied = TensorDescriptor.from_tensor(pool.values, [1, per_page, width], gl.NVMMASharedLayout(width, 8, rank=3))
    words = TensorDescriptor(
        *(pool.scales, [pages, 4 * per_page], [pool.scales.stride(0), 1], [1, 4 * per_page]),
        gl.NVMMASharedLayout(0, 8),
    )
    scores[(triton.cdiv(total, stretch), rows)](
        *(q, power, weights, weights.stride(0), copied, words),
        *(keys.page_table, keys.page_table.stride(0), keys.seq, keys.visible, *out, total, q.shape[1], stretch),
        KIND=1 if pool.format.kind == "fp8" else 2,
        PER_PAGE=per_page,
        STAGES=_STAGES[pool.format.kind],
        num_warps=4,
        maxnreg=80,
    )


@gluon.jit
def _fetch(
    keys, scales, table, first, last, tiles, keys_s, scales_s, full, empty,
    PAGES: gl.constexpr, BYTES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Pages of `tiles` tiles, from the table's entry `first` on, on their way into shared memory, by one warp."""
    SOME: gl.constexpr = 32 // PAGES  # tiles whose pages a load of the table finds
    i = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    coming = gl.load(table + gl.minimum(first + i, last)).to(gl.int32)
    for some in range(0, tiles, SOME):
        pages = coming
        coming = gl.load(table + gl.minimum(first + (some + SOME) * PAGES + i, last)).to(gl.int32)
        for t in range(some, gl.minimum(some + SOME, tiles)):
            slot = t % STAGES
            mbarrier.wait(empty.index(slot), ((t // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(slot), BYTES)
            for n in gl.static_range(PAGES):
                page = gl.sum(gl.where(i == (t - some) * PAGES + n, pages, 0), 0)
                tma.async_copy_global_to_shared(keys, [page, 0, 0], full.index(slot), keys_s.index(slot).slice(n, 1, 0))
                tma.async_copy_global_to_shared(
                    scales, [page, 0], full.index(slot), scales_s.index(slot).slice(n, 1, 0)
                )


@gluon.jit
def _weigh(
    q_ptr, power_ptr, weight_ptr, out_ptr, tops_ptr, heads, begin, visible, tiles, q_s, weights_s, keys_s, scales_s,
    full, empty, KIND: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Scores of `tiles` tiles of 128 keys of a row, by four warps."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 32])
    L: gl.constexpr = line_layout(4)
    eight: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    by_query: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    h = gl.arange(0, 64, layout=gl.SliceLayout(1, by_query))
    d = gl.arange(0, 128, layout=gl.SliceLayout(0, by_query))
    q_s.store(gl.load(q_ptr + h[:, None] * 128 + d[None, :], mask=(h < heads)[:, None], other=0))
    h = gl.arange(0, 64, layout=gl.BlockedLayout([1], [32], [4], [0]))
    weights_s.store(weight_of(power_ptr, weight_ptr, h, heads))
    fence_async_shared()
    gl.thread_barrier()
    q = q_s._reinterpret(gl.float8e4nv, [64, 128], eight).permute((1, 0))
    w = weights_of(weights_s, 4)
    key = gl.arange(0, 128, layout=L)
    x = gl.zeros([64, 64], gl.float32, layout=MMA)
    y = gl.zeros([64, 64], gl.float32, layout=MMA)
    for t in range(tiles):
        slot = t % STAGES
        at = begin + t * 128
        mbarrier.wait(full.index(slot), (t // STAGES) & 1)
        factor = factors_of(scales_s.index(slot), L, 128, KIND)
        # two products of 64 keys: while one is under way the other's keys are expanded, or it is weighed
        x = warpgroup_mma(_keys(keys_s, scales_s, slot, 0, KIND, MMA), q, x, use_acc=False, is_async=True)
        y = warpgroup_mma(_keys(keys_s, scales_s, slot, 1, KIND, MMA), q, y, use_acc=False, is_async=True)
        x = warpgroup_mma_wait(1, deps=(x,))
        first = weighed(x, w, 4)
        y = warpgroup_mma_wait(0, deps=(y,))
        mbarrier.arrive(empty.index(slot), count=1)
        second = weighed(y, w, 4)
        sums = first[0], second[0], first[1], second[1]
        seen = at + key < visible
        order = gl.where(seen, in_order(summed(sums, 4, 1), factor), -2147483648)
        gl.store(out_ptr + at + key, order, mask=seen)
        _keep_tops(tops_ptr, order, at)


@gluon.jit
def _keys(keys_s, scales_s, slot, half: gl.constexpr, KIND: gl.constexpr, MMA: gl.constexpr):
    """Half of a tile of keys as a left operand."""
    if KIND == 1:
        eight: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
        return keys_s.index(slot)._reinterpret(gl.float8e4nv, [2, 64, 128], eight).index(half)
    else:
        four: gl.constexpr = gl.NVMMASharedLayout(64, 8, rank=2)
        codes = scales_s.index(slot)._reinterpret(gl.uint8, [2, 64, 4], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
        return expanded(
            keys_s.index(slot)._reinterpret(gl.uint8, [2, 64, 64], four).index(half), codes.index(half), 4, MMA
        )


@gluon.jit
def _keep_tops(tops_ptr, order, at):
    """The highest of each 16 of ordered scores [128]."""
    top = gl.max(gl.reshape(order, [8, 16]), 1)
    group = gl.arange(0, 8, layout=top.type.layout)
    gl.store(tops_ptr + (at // 16 + group), top, mask=top > -2147483648)


@gluon.jit(do_not_specialize=["table_row"])  # which differs from step to step
def scores(
    q_ptr, power_ptr, weight_ptr, weight_row, keys, scales, table_ptr, table_row, seq_ptr, visible_ptr, out_ptr,
    tops_ptr, total, heads, stretch,
    KIND: gl.constexpr, PER_PAGE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Ordered scores of a row, see triton.py; q [R, heads, 128] e4m3 lacks 2^power [R, heads].

    `keys` and `scales` describe pages, to copy one.
    """
    PAGES: gl.constexpr = 128 // PER_PAGE
    WIDTH: gl.constexpr = 128 if KIND == 1 else 64
    r = gl.program_id(1).to(gl.int64)
    begin = gl.program_id(0) * stretch
    visible = gl.load(visible_ptr + r).to(gl.int32)
    table = table_ptr + gl.load(seq_ptr + r).to(gl.int64) * table_row  # on its way beside the other
    if begin >= visible:
        return
    tiles = gl.cdiv(gl.minimum(begin + stretch, visible) - begin, 128)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_s = gl.allocate_shared_memory(gl.uint8, [64, 128], gl.NVMMASharedLayout(128, 8))
    weights_s = gl.allocate_shared_memory(gl.float32, [64], flat)
    pages: gl.constexpr = gl.NVMMASharedLayout(WIDTH, 8, rank=3)
    keys_s = gl.allocate_shared_memory(gl.uint8, [STAGES, PAGES, PER_PAGE, WIDTH], pages)
    scales_s = gl.allocate_shared_memory(gl.uint8, [STAGES, PAGES, PER_PAGE * 4], gl.NVMMASharedLayout(0, 8))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(STAGES):
        mbarrier.init(full.index(n), count=1)
        mbarrier.init(empty.index(n), count=1)
    fence_async_shared()
    q_ptr += r * heads * 128
    power_ptr += r * heads
    weight_ptr += r * weight_row
    out_ptr += r * total
    tops_ptr += r * (total // 16)
    first, last = begin // PER_PAGE, (visible - 1) // PER_PAGE
    gl.warp_specialize(
        [
            (_weigh, (
                q_ptr, power_ptr, weight_ptr, out_ptr, tops_ptr, heads, begin, visible, tiles, q_s, weights_s, keys_s,
                scales_s, full, empty, KIND, STAGES,
            )),
            (_fetch, (
                keys, scales, table, first, last, tiles, keys_s, scales_s, full, empty,
                PAGES, 128 * (WIDTH + 4), STAGES,
            )),
        ],
        [1],
        [32],
    )  # fmt: skip
