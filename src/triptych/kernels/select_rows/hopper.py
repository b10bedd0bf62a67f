"""Scores of FP8 index keys for Hopper and the highest of them, in Gluon: one launch for all that a decode row needs.

    shared memory   queries 64 x 128 e4m3 | keys, STAGES tiles as they lie in pages | their scales
    one warp        asks for pages of the next tiles, a bulk copy each
    WARPS warps     make the row's queries while the first keys are on their way; multiply a tile of 32 keys a warp by
                    them, weigh, write

Programs share a row's keys evenly. Where they are so few that all run at once, they choose the highest together, see
together.py; else the last of a row to be done chooses from the scores of all, see narrow.py. Pages beyond what the row
sees read as its last one.
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

from triptych.kernels.barriers import forget, read_by_all
from triptych.kernels.gpu import multiprocessors
from triptych.kernels.index.ref import PagedEntries
from triptych.kernels.linear.counters import counters
from triptych.kernels.quant.formats import PackedRows
from triptych.kernels.select_rows.narrow import all_of_them, find_peaks, levels, narrowed, scratch_of, width
from triptych.kernels.select_rows.queries import asked_for, made_of, query_layout
from triptych.kernels.select_rows.ref import IndexQueries
from triptych.kernels.select_rows.together import (
    COUNTS,
    ENOUGH,
    PEAKS,
    bound_of_all,
    can_together,
    chosen_together,
    keep_peaks,
)
from triptych.kernels.select_rows.weigh import (
    in_order,
    line_layout,
    lined_up,
    summed,
    weighed,
    weights_of,
)

WARPS = 8
_STAGES = 3


def score(queries: IndexQueries, keys: PagedEntries, out: tuple[Tensor, Tensor]) -> None:
    """Ordered scores and their tops, `out`."""
    rows, total = out[0].shape
    none = torch.empty(rows, 0, dtype=torch.int32, device=out[0].device)
    _launch(queries, keys, out, none, _programs(rows, total, none.device))


def choose(
    queries: IndexQueries, keys: PagedEntries, out: tuple[Tensor, Tensor], k: int, programs: int | None = None
) -> Tensor:
    """Ids [R, k] of the k highest, as highest.highest has them; `out` is room for scores and tops.

    The row's `programs` choose, or the last to be done, so all is one launch; narrow.fits says whether it can."""
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
    together = total > ENOUGH.value and rows * programs <= multiprocessors(chosen.device)
    together = together and 0 < k + k // 4 <= 256 * programs  # or its peaks are too few
    if together:
        room = max(scratch.shape[1], PEAKS.value + max(4096, wide))  # candidates, half of that, and their ids
        scratch = torch.empty(rows, room, dtype=torch.int32, device=chosen.device)
    scores[(programs, rows)](
        *(raw, raw.stride(0), cos, sin, queries.weights, queries.weights.stride(0), copied, words),
        *(keys.page_table, keys.page_table.stride(0), keys.seq, keys.visible, *out, counters(chosen.device)),
        *(chosen, scratch, scratch.stride(0), total, queries.count, k),
        PER_PAGE=per_page,
        STAGES=_STAGES,
        ROUNDS=queries.rounds,
        ROPE=2 * cos.shape[1],
        LEVELS=levels(total, k) if k else 0,
        WIDE=wide,
        TOGETHER=together,
        WARPS=WARPS,
        num_warps=WARPS,
        maxnreg=168 if together else 80 if wide <= 4096 else 112,
    )


@gluon.jit
def _share(visible, k, TILE: gl.constexpr, LEVELS: gl.constexpr):
    """A program's share of a row's keys: where it begins, how many keys a program has, and how many tiles are its."""
    stretch = gl.cdiv(gl.cdiv(visible, gl.num_programs(0)), TILE) * TILE
    begin = gl.program_id(0) * stretch
    tiles = gl.cdiv(gl.minimum(begin + stretch, visible) - begin, TILE)
    if LEVELS > 0:
        tiles = gl.where(visible > k, tiles, 0)
    return begin, stretch, gl.maximum(tiles, 0)


@gluon.jit
def _fetch(
    keys, scales, table_ptr, table_row, seq_ptr, visible_ptr, k, keys_s, scales_s, full, empty, bound_s, told, done_ptr,
    list_ptr, PER_PAGE: gl.constexpr, BYTES: gl.constexpr, STAGES: gl.constexpr, TILE: gl.constexpr,
    LEVELS: gl.constexpr, TOGETHER: gl.constexpr,
):  # fmt: skip
    """Pages of a program's tiles on their way into shared memory, by one warp, which then finds the bound of all
    programs' peaks, where they choose TOGETHER."""
    PAGES: gl.constexpr = TILE // PER_PAGE
    SOME: gl.constexpr = 32 // PAGES  # tiles whose pages a load of the table finds
    i = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    visible = gl.load(visible_ptr).to(gl.int32)
    table = table_ptr + gl.load(seq_ptr).to(gl.int64) * table_row  # on its way beside the other
    begin, stretch, tiles = _share(visible, k, TILE, LEVELS)
    first, last = begin // PER_PAGE, gl.maximum(visible - 1, 0) // PER_PAGE
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
    if TOGETHER:
        parts = gl.cdiv(visible, stretch)
        if (tiles > 0) & can_together(visible, parts, k):
            bound = bound_of_all(list_ptr, done_ptr, parts, k)
            bound_s.store(gl.full_like(i, 0) + bound)
            gl.thread_barrier()
            mbarrier.arrive(told, count=1)


@gluon.jit
def _weigh(
    q_ptr, cos_ptr, sin_ptr, weight_ptr, out_ptr, tops_ptr, heads, visible_ptr, q_s, weights_s,
    keys_s, scales_s, full, empty, bound_s, told, done_ptr, counts_ptr, chosen_ptr, list_ptr, said_s, k,
    STAGES: gl.constexpr, ROUNDS: gl.constexpr, ROPE: gl.constexpr, LEVELS: gl.constexpr, WIDE: gl.constexpr,
    TOGETHER: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Scores of a program's share of a row; with LEVELS the k highest of all the row's, by the last program to be done
    or by all TOGETHER."""
    raw, turns = asked_for(q_ptr, cos_ptr, sin_ptr, heads, ROPE)
    h = gl.arange(0, 64, layout=gl.SliceLayout(1, query_layout()))
    weight = gl.load(weight_ptr + h, mask=h < heads, other=0.0)
    visible = gl.load(visible_ptr).to(gl.int32)
    begin, stretch, tiles = _share(visible, k, 32 * WARPS, LEVELS)
    if tiles > 0:
        ready, power = made_of(raw, turns, ROUNDS, ROPE, 1)
        q_s.store(ready)
        weights_s.store(lined_up(weight, power))
        fence_async_shared()
        gl.thread_barrier()
        _score_tiles(
            out_ptr, tops_ptr, begin, stretch, visible, tiles, q_s, weights_s, keys_s, scales_s, full, empty, done_ptr,
            list_ptr, k, STAGES, LEVELS, TOGETHER, WARPS,
        )  # fmt: skip
        if LEVELS > 0:
            _choose(
                out_ptr, tops_ptr, begin, stretch, visible, bound_s, told, done_ptr, counts_ptr, chosen_ptr, list_ptr,
                said_s, k, LEVELS, WIDE, TOGETHER, WARPS,
            )  # fmt: skip
    elif LEVELS > 0:  # noqa: SIM102  (resolved by the compiler)
        if (visible <= k) & (gl.program_id(0) == 0):
            all_of_them(visible, k, chosen_ptr, WARPS)


@gluon.jit
def _choose(
    scores_ptr, tops_ptr, begin, stretch, visible, bound_s, told, done_ptr, counts_ptr, chosen_ptr, list_ptr, said_s, k,
    LEVELS: gl.constexpr, WIDE: gl.constexpr, TOGETHER: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The k highest of a row's scores, of which the program has made those from `begin` on."""
    parts, end = gl.cdiv(visible, stretch), gl.minimum(begin + stretch, visible)
    alone = True
    last = False
    gl.thread_barrier()
    if TOGETHER:
        alone = not can_together(visible, parts, k)
        if can_together(visible, parts, k):
            mbarrier.wait(told, 0)
            bound = gl.max(bound_s.load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)
            last = chosen_together(
                scores_ptr, bound, begin, end, k, begin // stretch, parts, chosen_ptr, list_ptr, done_ptr, counts_ptr,
                said_s, WIDE // 2 if WIDE > 4096 else 2048, WARPS,
            )  # fmt: skip
    if alone:
        if LEVELS > 2 and not TOGETHER:
            find_peaks(tops_ptr + begin // 8, list_ptr + (WIDE // 8 + begin // 64), gl.cdiv(end - begin, 8), WARPS)
            gl.thread_barrier()
        last = parts == 1
        if parts > 1:
            last = gl.atomic_add(done_ptr, 1, sem="acq_rel") == parts - 1
        if last:
            gl.store(done_ptr, 0)
    if last:
        if LEVELS > 2 and TOGETHER:
            find_peaks(tops_ptr, list_ptr + WIDE // 8, gl.cdiv(visible, 8), WARPS)
            gl.thread_barrier()
        narrowed(scores_ptr, tops_ptr, visible, k, chosen_ptr, list_ptr, said_s, LEVELS, WIDE, WARPS)


@gluon.jit
def _score_tiles(
    out_ptr, tops_ptr, begin, stretch, visible, tiles, q_s, weights_s, keys_s, scales_s, full, empty, done_ptr,
    list_ptr, k,
    STAGES: gl.constexpr, LEVELS: gl.constexpr, TOGETHER: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Ordered scores of tiles, their tops, and peaks as soon as most tiles have been seen: what they bound is found
    meanwhile."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, 64, 32])
    L: gl.constexpr = line_layout(WARPS)
    eight: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    q = q_s._reinterpret(gl.float8e4nv, [64, 128], eight).permute((1, 0))
    w = weights_of(weights_s, WARPS)
    key = gl.arange(0, 32 * WARPS, layout=L)
    x = gl.zeros([16 * WARPS, 64], gl.float32, layout=MMA)
    y = gl.zeros([16 * WARPS, 64], gl.float32, layout=MMA)
    best = gl.full_like(key, -2147483648)
    for t in range(tiles):
        slot = t % STAGES
        at = begin + t * (32 * WARPS)
        mbarrier.wait(full.index(slot), (t // STAGES) & 1)
        scales = scales_s.index(slot)._reinterpret(gl.float32, [32 * WARPS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        factor = scales.load(L)
        # two products: while one is under way, the other is weighed
        tile = keys_s.index(slot)._reinterpret(gl.float8e4nv, [2, 16 * WARPS, 128], eight)
        x = warpgroup_mma(tile.index(0), q, x, use_acc=False, is_async=True)
        y = warpgroup_mma(tile.index(1), q, y, use_acc=False, is_async=True)
        x = warpgroup_mma_wait(1, deps=(x,))
        first = weighed(x, w, WARPS)
        y = warpgroup_mma_wait(0, deps=(y,))
        read_by_all()
        mbarrier.arrive(empty.index(slot), count=1)
        second = weighed(y, w, WARPS)
        sums = first[0], second[0], first[1], second[1]
        seen = at + key < visible
        order = gl.where(seen, in_order(summed(sums, WARPS, 1), factor), -2147483648)
        gl.store(out_ptr + at + key, order, mask=seen)
        if LEVELS != 1:
            _keep_tops(tops_ptr, order, at)
        if TOGETHER:
            best = gl.maximum(best, order)
            if t == tiles - 1 - gl.minimum(tiles // 4, 4):
                parts = gl.cdiv(visible, stretch)
                if can_together(visible, parts, k):
                    keep_peaks(list_ptr, best, begin // stretch, parts)
                    gl.thread_barrier()
                    gl.atomic_add(done_ptr, 1, sem="release")


@gluon.jit
def _keep_tops(tops_ptr, order, at):
    """The highest of each 8 of ordered scores [128]."""
    top = gl.max(gl.reshape(order, [order.shape[0] // 8, 8]), 1)
    group = gl.arange(0, top.shape[0], layout=top.type.layout)
    gl.store(tops_ptr + (at // 8 + group), top, mask=top > -2147483648)


@gluon.jit(do_not_specialize=["table_row", "k"])  # which differ from step to step
def scores(
    q_ptr, q_row, cos_ptr, sin_ptr, weight_ptr, weight_row, keys, scales, table_ptr, table_row, seq_ptr, visible_ptr,
    out_ptr, tops_ptr, done_ptr, chosen_ptr, scratch_ptr, scratch_row, total, heads, k,
    PER_PAGE: gl.constexpr, STAGES: gl.constexpr, ROUNDS: gl.constexpr, ROPE: gl.constexpr, LEVELS: gl.constexpr,
    WIDE: gl.constexpr, TOGETHER: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Ordered scores of a row, see triton.py, and with LEVELS > 0 the ids of its k highest.

    `keys` and `scales` describe pages, to copy one. Both partitions begin at once, so that what each needs first is on
    its way from the beginning.
    """
    PAGES: gl.constexpr = 32 * WARPS // PER_PAGE
    r = gl.program_id(1).to(gl.int64)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_s = gl.allocate_shared_memory(gl.uint8, [64, 128], gl.NVMMASharedLayout(128, 8))
    weights_s = gl.allocate_shared_memory(gl.float32, [64], flat)
    pages: gl.constexpr = gl.NVMMASharedLayout(128, 8, rank=3)
    keys_s = gl.allocate_shared_memory(gl.uint8, [STAGES, PAGES, PER_PAGE, 128], pages)
    scales_s = gl.allocate_shared_memory(gl.uint8, [STAGES, PAGES, PER_PAGE * 4], gl.NVMMASharedLayout(0, 8))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    told = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(told, count=1)
    for n in gl.static_range(STAGES):
        mbarrier.init(full.index(n), count=1)
        mbarrier.init(empty.index(n), count=1)
    fence_async_shared()
    said_s = gl.allocate_shared_memory(gl.int32, [6, WARPS], flat)
    bound_s = gl.allocate_shared_memory(gl.int32, [32], flat)
    q_ptr += r * q_row
    cos_ptr += r * (ROPE // 2)
    sin_ptr += r * (ROPE // 2)
    weight_ptr += r * weight_row
    out_ptr += r * total
    tops_ptr += r * (total // 128 * 16)
    gl.warp_specialize(
        [
            (_weigh, (
                q_ptr, cos_ptr, sin_ptr, weight_ptr, out_ptr, tops_ptr, heads, visible_ptr + r, q_s, weights_s, keys_s,
                scales_s, full, empty, bound_s, told, done_ptr + r, done_ptr + COUNTS + r * gl.num_programs(0),
                chosen_ptr + r * k, scratch_ptr + r * scratch_row, said_s, k, STAGES, ROUNDS, ROPE, LEVELS, WIDE,
                TOGETHER, WARPS,
            )),
            (_fetch, (
                keys, scales, table_ptr, table_row, seq_ptr + r, visible_ptr + r, k, keys_s, scales_s, full, empty,
                bound_s, told, done_ptr + r, scratch_ptr + r * scratch_row, PER_PAGE, 32 * WARPS * (128 + 4), STAGES,
                32 * WARPS, LEVELS, TOGETHER,
            )),
        ],
        [1],
        [144 if TOGETHER else 32],
    )  # fmt: skip
    forget(full, STAGES)
    forget(empty, STAGES)
    mbarrier.invalidate(told)
