"""Scores of packed index keys for the rows of a prefill chunk, in Gluon for Hopper: rows of a sequence share its keys.

    workspace       keys of a sequence side by side in e4m3, once a chunk: a block of 256 keys is four tiles of 64, and
                    four neighbouring keys lie at one place of each, so that a thread ends with all four
    shared memory   queries of two pairs of rows, 128 x 128 e4m3 each | keys, two tiles | weights
    a tile          a product of 64 keys by a pair's 128 queries, then its weighing; the next product is under way while
                    sums of this one are brought together

Two rows in a product halve what is read of keys for it: one row's 64 queries would take all that shared memory gives.
Four programs of four warps fit a multiprocessor: while some weigh, others multiply. A product is bound by instructions
(256 cycles of the tensor cores, 186 instructions a warp, of which 128 are relu, weight and sum), so whatever a tile
needs beyond it was done before: pages looked up, MXFP4 expanded. A score depends on its row and key alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
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

from triptych.kernels.barriers import forget
from triptych.kernels.gpu import multiprocessors
from triptych.kernels.index.ref import PagedEntries
from triptych.kernels.quant.formats import PackedRows
from triptych.kernels.select_rows.queries import rounded_queries
from triptych.kernels.select_rows.ref import IndexQueries
from triptych.kernels.select_rows.weigh import (
    columns_of,
    folded_rows,
    in_order,
    pair_layout,
    summed,
    weighed_rows,
    weight_at,
    weight_of,
    weights_of,
)

ROWS = 4  # of a program
_KEYS = 64  # of a tile
_BLOCK = 4 * _KEYS  # keys of four tiles; the kernels below have both as numbers


class Gathered(NamedTuple):
    """Keys of sequences side by side: values uint8 [B, T, 128], e4m3; factors float32 [B, T]."""

    values: Tensor
    factors: Tensor


def gathered(keys: PagedEntries) -> Gathered:
    """The first `most` keys of each sequence."""
    pool, table = keys.pool, keys.page_table
    assert isinstance(pool, PackedRows) and keys.most is not None
    total = triton.cdiv(keys.most, _BLOCK) * _BLOCK
    out = Gathered(
        torch.empty(len(table), total, 128, dtype=torch.uint8, device=table.device),
        torch.empty(len(table), total, device=table.device),
    )
    gather[(triton.cdiv(keys.most, 64), len(table))](
        *(pool.values, *pool.values.stride()[:2], pool.scales, *pool.scales.stride()[:2], table, table.stride(0)),
        *(out.values, out.factors, keys.most, total),
        KIND=1 if pool.format.kind == "fp8" else 2,
        PER_PAGE=pool.shape[1],
        SOME=64,
        num_warps=4,
    )
    return out


def score(queries: IndexQueries, keys: PagedEntries, ready: Gathered, out: tuple[Tensor, Tensor]) -> None:
    """Ordered scores and their tops, `out`."""
    rows, total = out[0].shape
    assert isinstance(keys.pool, PackedRows)
    q, power = rounded_queries(queries, 1 if keys.pool.format.kind == "fp8" else 2)
    values = TensorDescriptor.from_tensor(ready.values.flatten(0, 1), [_KEYS, 128], gl.NVMMASharedLayout(128, 8))
    # many rows share a stretch, so that their queries are worth loading
    share = triton.cdiv(total, max(1, 3 * multiprocessors(q.device) // rows))
    stretch = min(8192, triton.cdiv(share, _BLOCK) * _BLOCK)
    scores[(triton.cdiv(total, stretch), triton.cdiv(rows, ROWS))](
        *(q, power, queries.weights, queries.weights.stride(0), values, ready.factors, ready.factors.shape[1]),
        *(keys.seq, keys.visible, *out, total, queries.count, stretch, rows),
        KIND=1 if keys.pool.format.kind == "fp8" else 2,
        STAGES=2,
        ROWS=ROWS,
        num_warps=4,
        maxnreg=128,
    )


@triton.jit
def gather(
    pool_ptr, pool_page, pool_row, scales_ptr, scales_page, scales_row, table_ptr, table_row, keys_ptr, factors_ptr,
    most, total,
    KIND: tl.constexpr, PER_PAGE: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """Keys of each sequence side by side, [sequences, total, 128] e4m3, and a factor of each, a _BLOCK in four tiles.

    MXFP4 keys are over their largest scale times 2^5, as mxfp4.py has them, with dims in the same order.
    """
    s = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * SOME + tl.arange(0, SOME)
    there = n < most
    page = tl.load(table_ptr + s * table_row + n // PER_PAGE, mask=there, other=0).to(tl.int64)
    row = (n % PER_PAGE).to(tl.int64)
    values = tl.multiple_of(pool_ptr + page * pool_page + row * pool_row, 16)
    scales = tl.multiple_of(scales_ptr + page * scales_page + row * scales_row, 4)
    word = tl.load(scales.to(tl.pointer_type(tl.int32), bitcast=True), mask=there, other=0)
    d = tl.arange(0, 128)
    if KIND == 1:
        x = tl.load(values[:, None] + d[None, :], mask=there[:, None], other=0)
        factor = word.to(tl.float32, bitcast=True)
    else:
        half = tl.arange(0, 64)
        x = tl.load(values[:, None] + half[None, :], mask=there[:, None], other=0).to(tl.int32)
        code = (word[:, None] >> (tl.arange(0, 4) * 8)[None, :]) & 255
        largest = tl.max(code, 1)
        raised = tl.maximum(10 - (largest[:, None] - code), 0) - 5
        raised = ((127 + raised) << 23).to(tl.float32, bitcast=True)
        x = tl.reshape(tl.join(x & 15, x >> 4), [SOME, 4, 32])
        # the bits of a magnitude, at the top of float32's mantissa and the foot of its exponent, lack 2^126
        x = (((x & 7) << 22) | ((x & 8) << 28)).to(tl.float32, bitcast=True) * 8.507059173023462e37
        x = (x * raised[:, :, None]).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        x = tl.permute(tl.reshape(x, [SOME, 4, 4, 2, 4]), (0, 2, 3, 1, 4))
        x = tl.reshape(x, [SOME, 128])
        factor = (tl.maximum(largest - 5, 1) << 23).to(tl.float32, bitcast=True)
    place = s * total + n // 256 * 256 + n % 4 * 64 + n // 4 % 64
    tl.store(keys_ptr + place[:, None] * 128 + d[None, :], x, mask=there[:, None])
    tl.store(factors_ptr + place, factor, mask=there)


@gluon.jit
def scores(  # noqa: C901  (loops that the compiler unrolls)
    q_ptr, power_ptr, weight_ptr, weight_row, keys, factors_ptr, room, seq_ptr, visible_ptr, out_ptr, tops_ptr, total,
    heads, stretch, count,
    KIND: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Ordered scores of ROWS of the `count` rows, see triton.py; q [R, heads, 128] e4m3 lacks 2^power [R, heads].

    `keys` and `factors` [.., room] are what `gather` made. Rows of one sequence share each tile of keys; those of
    several take turns.
    """
    KEYS: gl.constexpr = 64
    r = gl.program_id(1) * ROWS
    begin = gl.program_id(0) * stretch
    L: gl.constexpr = pair_layout(4)
    line: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    rows = gl.arange(0, ROWS, layout=line)
    sees = gl.load(visible_ptr + gl.minimum(r + rows, count - 1)).to(gl.int32)
    longest = gl.max(sees, 0)
    if begin >= longest:
        return
    seqs = gl.load(seq_ptr + gl.minimum(r + rows, count - 1)).to(gl.int32)
    turns = gl.where(gl.max(seqs, 0) == gl.min(seqs, 0), 1, ROWS)  # rows of a chunk are sorted by sequence
    eight: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    q_s = gl.allocate_shared_memory(gl.uint8, [ROWS // 2, 128, 128], eight)
    weights_s = gl.allocate_shared_memory(gl.float32, [ROWS, 64], flat)
    sees_s = gl.allocate_shared_memory(gl.int32, [ROWS // 2, 2], flat)
    keys_s = gl.allocate_shared_memory(gl.uint8, [STAGES, KEYS, 128], eight)
    bar = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(STAGES):
        mbarrier.init(bar.index(n), count=1)

    by_query: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    i = gl.arange(0, 128, layout=gl.SliceLayout(1, by_query))
    d = gl.arange(0, 128, layout=gl.SliceLayout(0, by_query))
    h = gl.arange(0, 64, layout=line)
    for p in gl.static_range(ROWS // 2):
        its = gl.minimum(r + 2 * p + i // 64, count - 1).to(gl.int64)
        place = (its * heads + i % 64) * 128
        q_s.index(p).store(gl.load(q_ptr + place[:, None] + d[None, :], mask=(i % 64 < heads)[:, None], other=0))
    for n in gl.static_range(ROWS):
        row = gl.minimum(r + n, count - 1)
        if KIND == 1:
            weights_s.index(n).store(weight_of(power_ptr + row * heads, weight_ptr + row * weight_row, h, heads))
        else:
            weights_s.index(n).store(weight_at(power_ptr + row * heads, weight_ptr + row * weight_row, h, heads))
    fence_async_shared()
    gl.thread_barrier()
    out_ptr += r.to(gl.int64) * total + begin
    tops_ptr += r.to(gl.int64) * (total // 8) + begin // 8
    lies = gl.arange(0, KEYS, layout=gl.SliceLayout(1, L))
    x = gl.zeros([KEYS, 128], gl.float32 if KIND == 1 else gl.float16, layout=MMA)
    columns, lacking = (), ()
    if KIND == 2:
        for p in gl.static_range(ROWS // 2):
            w0, power0 = columns_of(weights_s.index(2 * p), 4)
            w1, power1 = columns_of(weights_s.index(2 * p + 1), 4)
            second = gl.arange(0, 2, layout=gl.SliceLayout(0, L))[None, :]
            columns += (w0, w1)  # type: ignore[assignment]
            lacking += (((127 + gl.where(second == 0, power0, power1)) << 23).to(gl.float32, bitcast=True),)  # type: ignore[assignment]
    for turn in range(turns):
        mine = gl.minimum(r + turn, count - 1)
        first = gl.load(seq_ptr + mine).to(gl.int32) * room + begin
        visible = longest
        if turns > 1:
            visible = gl.load(visible_ptr + mine).to(gl.int32)
        heard = (r + rows < count) & ((turns == 1) | (rows == turn))
        sees_s._reinterpret(gl.int32, [ROWS], flat).store(gl.where(heard, sees - begin, 0))
        gl.thread_barrier()
        blocks = gl.cdiv(gl.maximum(gl.minimum(begin + stretch, visible) - begin, 0), 4 * KEYS)
        if blocks > 0:
            for slot in gl.static_range(STAGES):
                fetch(keys, keys_s.index(slot), bar.index(slot), first + slot * KEYS, KEYS)
        for block in range(blocks):
            at = block * (4 * KEYS)
            factor = gl.load(factors_ptr + (first + at) + lies)
            mbarrier.wait(bar.index(0), 0)
            if KIND == 1:
                x = _product(keys_s, q_s, 0, 0, x)
            kept = ()
            for tile in gl.static_range(4):
                scale = factor
                for p in gl.static_range(ROWS // 2):
                    if KIND == 1:
                        w0 = weights_of(weights_s.index(2 * p), 4)
                        w1 = weights_of(weights_s.index(2 * p + 1), 4)
                        x = warpgroup_mma_wait(0, deps=(x,))
                        sums = weighed_rows(x, w0, w1, 4)
                        # the next product is on its way before the rest is done with this one
                        if p + 1 < ROWS // 2:
                            x = _product(keys_s, q_s, tile % STAGES, p + 1, x)
                        elif tile < 3:
                            factor = gl.load(factors_ptr + (first + at + (tile + 1) * KEYS) + lies)
                            mbarrier.wait(bar.index((tile + 1) % STAGES), (tile + 1) // STAGES % 2)
                            x = _product(keys_s, q_s, (tile + 1) % STAGES, 0, x)
                        kept += (in_order(summed(sums, 4, 2), scale[:, None]),)  # type: ignore[assignment]
                    else:
                        y = _product_now(keys_s, q_s, tile % STAGES, p, x)
                        if (p + 1 == ROWS // 2) & (tile < 3):
                            factor = gl.load(factors_ptr + (first + at + (tile + 1) * KEYS) + lies)
                        y = folded_rows(y, columns[2 * p], columns[2 * p + 1], 4)
                        kept += (in_order(y, scale[:, None] * lacking[p]),)  # type: ignore[assignment]
                        if (p + 1 == ROWS // 2) & (tile < 3):
                            mbarrier.wait(bar.index((tile + 1) % STAGES), (tile + 1) // STAGES % 2)
                gl.thread_barrier()
                if (tile + STAGES < 4) | (block + 1 < blocks):
                    ahead = first + at + (tile + STAGES) * KEYS
                    fetch(keys, keys_s.index(tile % STAGES), bar.index(tile % STAGES), ahead, KEYS)
            for p in gl.static_range(ROWS // 2):
                _keep(
                    out_ptr + (2 * p * total + at), tops_ptr + (2 * p * (total // 8) + at // 8),
                    kept[p], kept[ROWS // 2 + p], kept[ROWS + p], kept[ROWS + ROWS // 2 + p],
                    sees_s.index(p), at, total,
                )  # fmt: skip
    forget(bar, STAGES)


@gluon.constexpr_function
def _side_by_side():
    """[64, 2, 4] scores of four tiles' keys and two rows: a thread has four neighbours of a row."""
    lanes = [[0, 1, 0], [8, 0, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout([[0, 0, 1], [0, 0, 2]], lanes, [[16, 0, 0], [32, 0, 0]], [], [64, 2, 4])


@gluon.jit
def _keep(out_ptr, tops_ptr, a, b, c, d, sees, at, total):
    """Write ordered scores [64, 2] of four tiles, of the block that begins at `at`, and the highest of each 8 keys.

    `sees` [2] in shared memory is how many keys the rows see."""
    L: gl.constexpr = _side_by_side()
    order = gl.reshape(gl.join(gl.join(a, c), gl.join(b, d)), [64, 2, 4])
    order = gl.convert_layout(order, L, assert_trivial=True)
    lies = gl.arange(0, 64, layout=gl.SliceLayout(1, gl.SliceLayout(2, L)))[:, None]
    row = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :]
    tile = gl.expand_dims(gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(0, L)))[None, :], 0)
    left = sees.load(gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :] - (at + 4 * lies)
    order = gl.where(tile < gl.expand_dims(left, 2), order, -2147483648)
    place = gl.expand_dims(row * total + 4 * lies, 2) + tile
    some, _ = gl.broadcast(gl.expand_dims(left > 0, 2), order)
    gl.store(out_ptr + place, order, mask=some)
    top = gl.max(gl.reshape(gl.max(order, 2), [32, 2, 2]), 1)
    T: gl.constexpr = top.type.layout
    group = gl.arange(0, 32, layout=gl.SliceLayout(1, T))[:, None]
    its = gl.arange(0, 2, layout=gl.SliceLayout(0, T))[None, :]
    gl.store(tops_ptr + (its * (total // 8) + group), top, mask=top > -2147483648)


@gluon.jit
def _product(keys_s, q_s, slot: gl.constexpr, p: gl.constexpr, x):
    """Begin to multiply a tile of keys by the queries of pair p, in the registers of x."""
    eight: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    keys = keys_s.index(slot)._reinterpret(gl.float8e4nv, [keys_s.shape[1], 128], eight)
    q = q_s.index(p)._reinterpret(gl.float8e4nv, [128, 128], eight).permute((1, 0))
    return warpgroup_mma(keys, q, x, use_acc=False, is_async=True)


@gluon.jit
def _product_now(keys_s, q_s, slot: gl.constexpr, p: gl.constexpr, x):
    """A tile of keys times the queries of pair p."""
    eight: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    keys = keys_s.index(slot)._reinterpret(gl.float8e4nv, [keys_s.shape[1], 128], eight)
    q = q_s.index(p)._reinterpret(gl.float8e4nv, [128, 128], eight).permute((1, 0))
    return warpgroup_mma(keys, q, x, use_acc=False)


@gluon.jit
def fetch(keys, target, bar, first, KEYS: gl.constexpr):
    """KEYS keys from `first` on, on their way into shared memory."""
    mbarrier.expect(bar, KEYS * 128)
    tma.async_copy_global_to_shared(keys, [first, 0], bar, target)
