"""Scores of packed index keys for Hopper and the highest of them, in Gluon: one launch for all that a decode row needs.

    shared memory   queries 64 x 128 e4m3 | keys, STAGES tiles as they lie in pages | their scales
    one warp        asks for pages of the next tiles, a bulk copy each
    WARPS warps     make the row's queries while the first keys are on their way; multiply a tile of 32 keys a warp by
                    them (MXFP4 keys as the left operand, expanded in registers), weigh, write

Programs share a row's keys evenly; the last of a row to be done chooses from the scores of all, see narrow.py.
Pages beyond what the row sees read as its last one.
"""

from __future__ import annotations

import torch
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

from triptych.kernels.gpu import multiprocessors
from triptych.kernels.index.ref import PagedEntries
from triptych.kernels.linear.counters import counters
from triptych.kernels.quant.formats import PackedRows
from triptych.kernels.select_rows.narrow import all_of_them, find_peaks, levels, narrowed, scratch_of, width
from triptych.kernels.select_rows.queries import made, query_layout
from triptych.kernels.select_rows.ref import IndexQueries
from triptych.kernels.select_rows.weigh import (
    expanded,
    factors_of,
    in_order,
    line_layout,
    lined_up,
    summed,
    weighed,
    weights_of,
)

WARPS = 8
_STAGES = {"fp8": 3, "mxfp4": 4}


def score(queries: IndexQueries, keys: PagedEntries, out: tuple[Tensor, Tensor]) -> None:
    """Ordered scores and their tops, `out`."""
    rows, total = out[0].shape
    none = torch.empty(rows, 0, dtype=torch.int32, device=out[0].device)
    _launch(queries, keys, out, none, _programs(rows, total, none.device))


def choose(
    queries: IndexQueries, keys: PagedEntries, out: tuple[Tensor, Tensor], k: int, programs: int | None = None
) -> Tensor:
    """Ids [R, k] of the k highest, as highest.highest has them; `out` is room for scores and tops.

    The last of a row's `programs` to be done chooses, so all is one launch; narrow.fits says whether it can."""
    rows, total = out[0].shape
    chosen = torch.empty(rows, k, dtype=torch.int32, device=out[0].device)
    _launch(queries, keys, out, chosen, programs or _programs(rows, total, chosen.device))
    return chosen


def _programs(rows: int, total: int, device: torch.device) -> int:
    """Programs of a row: a multiprocessor has one, since each makes its row's queries anew.

    More where they would have more than 16,384 keys, which evens out rows of unequal lengths.
    """
    return max(
        min(multiprocessors(device) // rows, int(triton.cdiv(total, 32 * WARPS))), int(triton.cdiv(total, 16384))
    )


def _launch(
    queries: IndexQueries, keys: PagedEntries, out: tuple[Tensor, Tensor], chosen: Tensor, programs: int
) -> None:
    """Scores and, where `chosen` has columns, the highest."""
    rows, total = out[0].shape
    pool, k = keys.pool, chosen.shape[1]
    assert isinstance(pool, PackedRows)
    pages, per_page, bytes_ = pool.values.shape
    copied = TensorDescriptor.from_tensor(pool.values, [1, per_page, bytes_], gl.NVMMASharedLayout(bytes_, 8, rank=3))
    words = TensorDescriptor(
        *(pool.scales, [pages, 4 * per_page], [pool.scales.stride(0), 1], [1, 4 * per_page]),
        gl.NVMMASharedLayout(0, 8),
    )
    scratch = scratch_of(rows, total, k, chosen.device) if k else chosen
    raw = queries.heads[:, -queries.count * queries.dim :]
    cos, sin = queries.angles
    wide = width(total, k)
    scores[(programs, rows)](
        *(raw, raw.stride(0), cos, sin, queries.weights, queries.weights.stride(0), copied, words),
        *(keys.page_table, keys.page_table.stride(0), keys.seq, keys.visible, *out, counters(chosen.device)),
        *(chosen, scratch, scratch.stride(0), total, queries.count, k),
        KIND=1 if pool.format.kind == "fp8" else 2,
        PER_PAGE=per_page,
        STAGES=_STAGES[pool.format.kind],
        ROUNDS=queries.rounds,
        ROPE=2 * cos.shape[1],
        LEVELS=levels(total, k) if k else 0,
        WIDE=wide,
        WARPS=WARPS,
        num_warps=WARPS,
        maxnreg=80 if wide <= 4096 else 112,
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
def _ready(
    q_ptr, cos_ptr, sin_ptr, weight_ptr, heads, q_s, weights_s,
    ROUNDS: gl.constexpr, ROPE: gl.constexpr, KIND: gl.constexpr,
):  # fmt: skip
    """Queries of a row and its weights in shared memory."""
    h = gl.arange(0, 64, layout=gl.SliceLayout(1, query_layout()))
    weight = gl.load(weight_ptr + h, mask=h < heads, other=0.0)
    ready, power = made(q_ptr, cos_ptr, sin_ptr, heads, ROUNDS, ROPE, KIND)
    q_s.store(ready)
    weights_s.store(lined_up(weight, power))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _weigh(
    q_ptr, cos_ptr, sin_ptr, weight_ptr, out_ptr, tops_ptr, heads, begin, stretch, visible, tiles, q_s, weights_s,
    keys_s, scales_s, full, empty, done_ptr, parts, chosen_ptr, list_ptr, said_s, k,
    KIND: gl.constexpr, STAGES: gl.constexpr, ROUNDS: gl.constexpr, ROPE: gl.constexpr, LEVELS: gl.constexpr,
    WIDE: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Scores of `tiles` tiles of a row; with LEVELS, and as the last of `parts` programs, the k highest of all its."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, 64, 32])
    L: gl.constexpr = line_layout(WARPS)
    eight: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    _ready(q_ptr, cos_ptr, sin_ptr, weight_ptr, heads, q_s, weights_s, ROUNDS, ROPE, KIND)
    q = q_s._reinterpret(gl.float8e4nv, [64, 128], eight).permute((1, 0))
    w = weights_of(weights_s, WARPS)
    key = gl.arange(0, 32 * WARPS, layout=L)
    x = gl.zeros([16 * WARPS, 64], gl.float32, layout=MMA)
    y = gl.zeros([16 * WARPS, 64], gl.float32, layout=MMA)
    for t in range(tiles):
        slot = t % STAGES
        at = begin + t * (32 * WARPS)
        mbarrier.wait(full.index(slot), (t // STAGES) & 1)
        factor = factors_of(scales_s.index(slot), L, 32 * WARPS, KIND)
        if KIND == 1:
            # two products: while one is under way, the other is weighed
            x = warpgroup_mma(_keys(keys_s, scales_s, slot, 0, KIND, WARPS, MMA), q, x, use_acc=False, is_async=True)
            y = warpgroup_mma(_keys(keys_s, scales_s, slot, 1, KIND, WARPS, MMA), q, y, use_acc=False, is_async=True)
            x = warpgroup_mma_wait(1, deps=(x,))
            first = weighed(x, w, WARPS)
            y = warpgroup_mma_wait(0, deps=(y,))
            mbarrier.arrive(empty.index(slot), count=1)
            second = weighed(y, w, WARPS)
        else:
            # one after the other, with expanded keys in registers: both products at once would not fit beside them
            x = warpgroup_mma(_keys(keys_s, scales_s, slot, 0, KIND, WARPS, MMA), q, x, use_acc=False, is_async=True)
            others = _keys(keys_s, scales_s, slot, 1, KIND, WARPS, MMA)
            mbarrier.arrive(empty.index(slot), count=1)
            x = warpgroup_mma_wait(0, deps=(x,))
            first = weighed(x, w, WARPS)
            y = warpgroup_mma(others, q, y, use_acc=False, is_async=True)
            y = warpgroup_mma_wait(0, deps=(y,))
            second = weighed(y, w, WARPS)
        sums = first[0], second[0], first[1], second[1]
        seen = at + key < visible
        order = gl.where(seen, in_order(summed(sums, WARPS, 1), factor), -2147483648)
        gl.store(out_ptr + at + key, order, mask=seen)
        if LEVELS != 1:
            _keep_tops(tops_ptr, order, at)
    if LEVELS > 0:
        gl.thread_barrier()
        if LEVELS > 2:
            mine = gl.cdiv(gl.minimum(begin + stretch, visible) - begin, 8)
            find_peaks(tops_ptr + begin // 8, list_ptr + (WIDE // 8 + begin // 64), mine, WARPS)
            gl.thread_barrier()
        last = parts == 1
        if parts > 1:
            last = gl.atomic_add(done_ptr, 1, sem="acq_rel") == parts - 1
        if last:
            gl.store(done_ptr, 0)
            narrowed(out_ptr, tops_ptr, visible, k, chosen_ptr, list_ptr, said_s, LEVELS, WIDE, WARPS)


@gluon.jit
def _keys(keys_s, scales_s, slot, half: gl.constexpr, KIND: gl.constexpr, WARPS: gl.constexpr, MMA: gl.constexpr):
    """Half of a tile of keys as a left operand."""
    if KIND == 1:
        eight: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
        return keys_s.index(slot)._reinterpret(gl.float8e4nv, [2, 16 * WARPS, 128], eight).index(half)
    else:
        four: gl.constexpr = gl.NVMMASharedLayout(64, 8, rank=2)
        codes = scales_s.index(slot)._reinterpret(
            gl.uint8, [2, 16 * WARPS, 4], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        )
        return expanded(
            keys_s.index(slot)._reinterpret(gl.uint8, [2, 16 * WARPS, 64], four).index(half),
            codes.index(half),
            WARPS,
            MMA,
        )


@gluon.jit
def _keep_tops(tops_ptr, order, at):
    """The highest of each 8 of ordered scores [128]."""
    top = gl.max(gl.reshape(order, [order.shape[0] // 8, 8]), 1)
    group = gl.arange(0, top.shape[0], layout=top.type.layout)
    gl.store(tops_ptr + (at // 8 + group), top, mask=top > -2147483648)


@gluon.jit(do_not_specialize=["table_row", "k"])  # which differs from step to step
def scores(
    q_ptr, q_row, cos_ptr, sin_ptr, weight_ptr, weight_row, keys, scales, table_ptr, table_row, seq_ptr, visible_ptr,
    out_ptr, tops_ptr, done_ptr, chosen_ptr, scratch_ptr, scratch_row, total, heads, k,
    KIND: gl.constexpr, PER_PAGE: gl.constexpr, STAGES: gl.constexpr, ROUNDS: gl.constexpr, ROPE: gl.constexpr,
    LEVELS: gl.constexpr, WIDE: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Ordered scores of a row, see triton.py, and with LEVELS > 0 the ids of its k highest.

    `keys` and `scales` describe pages, to copy one.
    """
    PAGES: gl.constexpr = 32 * WARPS // PER_PAGE
    WIDTH: gl.constexpr = 128 if KIND == 1 else 64
    r = gl.program_id(1).to(gl.int64)
    visible = gl.load(visible_ptr + r).to(gl.int32)
    stretch = gl.cdiv(gl.cdiv(visible, gl.num_programs(0)), 32 * WARPS) * (32 * WARPS)
    begin = gl.program_id(0) * stretch
    table = table_ptr + gl.load(seq_ptr + r).to(gl.int64) * table_row  # on its way beside the other
    if LEVELS > 0:  # noqa: SIM102  (resolved by the compiler)
        if visible <= k:
            if gl.program_id(0) == 0:
                all_of_them(visible, k, chosen_ptr + r * k, WARPS)
            return
    if begin >= visible:
        return
    parts = gl.cdiv(visible, stretch)
    tiles = gl.cdiv(gl.minimum(begin + stretch, visible) - begin, 32 * WARPS)
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
    said_s = gl.allocate_shared_memory(gl.int32, [6, WARPS], flat)
    q_ptr += r * q_row
    cos_ptr += r * (ROPE // 2)
    sin_ptr += r * (ROPE // 2)
    weight_ptr += r * weight_row
    out_ptr += r * total
    tops_ptr += r * (total // 128 * 16)
    first, last = begin // PER_PAGE, (visible - 1) // PER_PAGE
    gl.warp_specialize(
        [
            (_weigh, (
                q_ptr, cos_ptr, sin_ptr, weight_ptr, out_ptr, tops_ptr, heads, begin, stretch, visible, tiles, q_s,
                weights_s, keys_s, scales_s, full, empty, done_ptr + r, parts, chosen_ptr + r * k,
                scratch_ptr + r * scratch_row, said_s, k, KIND, STAGES, ROUNDS, ROPE, LEVELS, WIDE, WARPS,
            )),
            (_fetch, (
                keys, scales, table, first, last, tiles, keys_s, scales_s, full, empty,
                PAGES, 32 * WARPS * (WIDTH + 4), STAGES,
            )),
        ],
        [1],
        [32],
    )  # fmt: skip
