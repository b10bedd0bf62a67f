"""Attention of few decode rows in one launch for Hopper, in Gluon: programs of a row wait for what the others have.

    keys of a row     | window rows, 128 places | entries: the chosen ones, or all visible ones |
    a program's         one tile of them for some heads: KEYS and N
    scores              keys . queries              [KEYS, N]    keys are the tall side of both products, so that few
    sums                keys turned . weights       [512, N]     heads cost little
    result              a slice of the dims of N heads, of all tiles, in each of a row's first SLICES programs

What a row's programs have for each other goes through a workspace, see gathered.py; where they are many, or have many
heads, it is averages as float16 instead of sums, see averages.py. All programs run side by side: there is at most one
for each multiprocessor.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from triptych.config import WINDOW
from triptych.kernels.attend.ref import Attention
from triptych.kernels.attend_rows import averages
from triptych.kernels.attend_rows.gathered import EMPTY, WARPS, lanes_for, put_result, tell_shares, tell_sums
from triptych.kernels.attend_rows.hopper_keys import _keep_scaled, _words
from triptych.kernels.attend_rows.ref import Queries, RingRows
from triptych.kernels.gpu import multiprocessors
from triptych.kernels.index.ref import PagedEntries
from triptych.kernels.quant.formats import PackedRows

_LOG2E = 1.4426950408889634
_SLICES = 32
"""Of the result that a row's programs have of sums, at most."""
_HEADS = 32
"""Of a program that tells sums, at most; averages, of twice as many, take the same room."""
_COPIES = 64 * 64
"""Heads times slices of averages at most: as many shares does a program tell."""
_PROGRAMS = 132
"""At most, for which the workspace has room."""


@cache
def workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    """Sums and shares on their way, int32, see gathered.py, for launches that never overlap.

    Made by the first call, which must not be one that is captured.
    """
    sizes = (_PROGRAMS * 512 * _HEADS, _PROGRAMS * _COPIES)
    sums, shares = (torch.full((size,), EMPTY.value, dtype=torch.int32, device=device) for size in sizes)
    return sums, shares


@gluon.constexpr_function
def _product_layout(tall, width):
    """Of a product [tall, width]."""
    along = min(WARPS.value, tall // 16)
    beside = WARPS.value // along
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[along, beside], instr_shape=[16, width // beside, 16]
    )


@gluon.jit
def _turns(x, cos_ptr, sin_ptr):
    """cos and sin for the pairs of dims of x [N, 512], whose last 64 are rotated."""
    even, _ = gl.split(gl.reshape(x, [x.shape[0], 256, 2]))
    pair = gl.arange(0, 256, layout=gl.SliceLayout(0, even.type.layout)) - 224
    cos = gl.load(cos_ptr + pair, mask=pair >= 0, other=1.0)[None, :]
    return cos, gl.load(sin_ptr + pair, mask=pair >= 0, other=0.0)[None, :]


@gluon.jit
def _normed(raw, cos, sin, eps):
    """Raw queries [N, 512] normed and rotated, as bfloat16."""
    x = raw.to(gl.float32)
    x = x * gl.rsqrt(gl.sum(x * x, 1) / 512 + eps)[:, None]
    even, odd = gl.split(gl.reshape(x, [x.shape[0], 256, 2]))
    x = gl.reshape(gl.join(even * cos - odd * sin, odd * cos + even * sin), x.shape)
    return gl.convert_layout(x.to(gl.bfloat16), raw.type.layout, assert_trivial=True)


@gluon.jit
def _entry_and_page(place, table_ptr, chosen_ptr, MODE: gl.constexpr, PER_PAGE: gl.constexpr):
    """The entries at places of a row's list, and their pages."""
    if MODE == 1:
        place = gl.maximum(gl.load(chosen_ptr + place), 0)
    if MODE != 0:
        return place, gl.load(table_ptr + place // PER_PAGE)
    else:
        return place, place


@gluon.jit
def _extent(
    r, positions_ptr, lowest_ptr, visible_ptr, chosen_count, MODE: gl.constexpr, REACH: gl.constexpr
):  # fmt: skip
    """First window position of row r, its number of window rows, and of the entries that it reads."""
    position = gl.load(positions_ptr + r).to(gl.int32)
    first = gl.maximum(gl.maximum(gl.load(lowest_ptr + r).to(gl.int32), position - (REACH - 1)), 0)
    seen = 0
    if MODE != 0:
        seen = gl.load(visible_ptr + r).to(gl.int32)
    if MODE == 1:
        seen = gl.minimum(seen, chosen_count)
    return first, gl.maximum(position - first + 1, 0), seen


@gluon.jit
def _place(
    j, begin, first, in_window, seen, slot, listed, ring, pool,
    MODE: gl.constexpr, PER_PAGE: gl.constexpr, RING: gl.constexpr, REACH: gl.constexpr,
):  # fmt: skip
    """Where the values and the scales of places j [KEYS] of a row lie; of those behind the last key the first one's."""
    row = ((first + gl.where(j < in_window, j, 0)) % RING).to(gl.int64)
    values = ring[0].to(gl.int64) + slot * ring[1] + row * ring[2]
    scales = ring[3].to(gl.int64) + slot * ring[4] + row * ring[5]
    if MODE != 0:
        entry, page, entry0, page0 = listed
        page = gl.where(j - REACH < seen, page, page0).to(gl.int64)
        row = (gl.where(j - REACH < seen, entry, entry0) % PER_PAGE).to(gl.int64)
        in_ring = (j < REACH) | (begin - REACH >= seen)
        values = gl.where(in_ring, values, pool[0].to(gl.int64) + page * pool[1] + row * pool[2])
        scales = gl.where(in_ring, scales, pool[3].to(gl.int64) + page * pool[4] + row * pool[5])
    values = gl.multiple_of(values.to(gl.pointer_type(gl.int32), bitcast=True), 16)
    return values, gl.multiple_of(scales.to(gl.pointer_type(gl.int64), bitcast=True), 8)


@gluon.jit
def _scores(q_s, k0_s, k1_s, k2_s, k3_s, none):
    """Keys . queries [KEYS, N]."""
    s = warpgroup_mma(k0_s, q_s.slice(0, 128, 1).permute((1, 0)), none, use_acc=False, is_async=True)
    s = warpgroup_mma(k1_s, q_s.slice(128, 128, 1).permute((1, 0)), s, is_async=True)
    s = warpgroup_mma(k2_s, q_s.slice(256, 128, 1).permute((1, 0)), s, is_async=True)
    s = warpgroup_mma(k3_s, q_s.slice(384, 128, 1).permute((1, 0)), s, is_async=True)
    return warpgroup_mma_wait(0, deps=(s,))


@gluon.jit
def _sums(k_s, p_s, zeros):
    """Keys turned . weights [128, N], on their way."""
    return warpgroup_mma(k_s.permute((1, 0)), p_s.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _tell_tile(
    words, bits, valid, scale, q_s, sums_ptr, shares_ptr, mine,
    KEYS: gl.constexpr, N: gl.constexpr, SLICES: gl.constexpr, MAIN: gl.constexpr,
):  # fmt: skip
    """Sums and shares of a tile of keys, of which `valid` [KEYS] are there, to the workspace of program `mine`.

    Averages instead of sums if MAIN is not 0.
    """
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    pairs: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    S: gl.constexpr = _product_layout(KEYS, N)
    # keys in parts with memory of their own: stores to parts of one would wait for each other
    k0_s = gl.allocate_shared_memory(gl.bfloat16, [KEYS, 128], shared)
    k1_s = gl.allocate_shared_memory(gl.bfloat16, [KEYS, 128], shared)
    k2_s = gl.allocate_shared_memory(gl.bfloat16, [KEYS, 128], shared)
    k3_s = gl.allocate_shared_memory(gl.bfloat16, [KEYS, 128], shared)
    p_s = gl.allocate_shared_memory(gl.bfloat16, [N, KEYS], shared)
    _keep_scaled(k0_s._reinterpret(gl.int32, [KEYS, 64], pairs), words[0], bits, 0, 32)
    _keep_scaled(k1_s._reinterpret(gl.int32, [KEYS, 64], pairs), words[1], bits, 128, 32)
    _keep_scaled(k2_s._reinterpret(gl.int32, [KEYS, 64], pairs), words[2], bits, 256, 32)
    w3_s = k3_s._reinterpret(gl.int32, [KEYS, 64], pairs)
    _keep_scaled(w3_s.slice(0, 32, 1), words[3], bits, 384, 16)
    w3_s.slice(32, 32, 1).store(words[4])
    fence_async_shared()
    gl.thread_barrier()
    none = gl.zeros([KEYS, N], gl.float32, layout=S)
    scores = gl.where(valid[:, None], _scores(q_s, k0_s, k1_s, k2_s, k3_s, none) * scale, -1.0e30)
    peak = gl.max(scores, 0)
    p = gl.where(valid[:, None], gl.exp2(scores - peak[None, :]), 0.0)
    p_s.permute((1, 0)).store(p.to(gl.bfloat16))
    fence_async_shared()
    gl.thread_barrier()
    A: gl.constexpr = _product_layout(128, N)
    zeros = gl.zeros([128, N], gl.float32, layout=A)
    a0, a1 = _sums(k0_s, p_s, zeros), _sums(k1_s, p_s, zeros)
    a2, a3 = _sums(k2_s, p_s, zeros), _sums(k3_s, p_s, zeros)
    if MAIN > 0:
        sums_ptr += mine * (256 * N)
        shares_ptr += mine * (SLICES * N)
        weight = gl.sum(p, 0)
        averages.tell_shares(shares_ptr, peak, weight, SLICES, N)
        weight = gl.convert_layout(weight, gl.SliceLayout(0, A))
        a0, a1, a2, a3 = warpgroup_mma_wait(0, deps=(a0, a1, a2, a3))
        averages.tell_averages(sums_ptr, a0, weight, N)
        averages.tell_averages(sums_ptr + 64 * N, a1, weight, N)
        averages.tell_averages(sums_ptr + 128 * N, a2, weight, N)
        averages.tell_averages(sums_ptr + 192 * N, a3, weight, N)
    else:
        sums_ptr += mine * (512 * N)
        shares_ptr += mine * (SLICES * 2 * N)
        tell_shares(shares_ptr, peak, p, SLICES, N)
        a0, a1, a2, a3 = warpgroup_mma_wait(0, deps=(a0, a1, a2, a3))
        tell_sums(sums_ptr, a0, N)
        tell_sums(sums_ptr + 128 * N, a1, N)
        tell_sums(sums_ptr + 256 * N, a2, N)
        tell_sums(sums_ptr + 384 * N, a3, N)


@gluon.jit
def _put_slice(
    sums_ptr, shares_ptr, sink_ptr, cos_ptr, sin_ptr, out_ptr, line, slice_, in_window, seen,
    REACH: gl.constexpr, KEYS: gl.constexpr, N: gl.constexpr, SLICES: gl.constexpr, SPLITS: gl.constexpr,
    LANES: gl.constexpr, MAIN: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """A slice of the result, of sums or, if MAIN is not 0, of averages."""
    if MAIN > 0:
        averages.put_result(
            sums_ptr, shares_ptr, sink_ptr, cos_ptr, sin_ptr, out_ptr, line, slice_, in_window, seen,
            REACH, KEYS, N, SLICES, SPLITS, MAIN, TAIL,
        )  # fmt: skip
    else:
        put_result(
            sums_ptr, shares_ptr, sink_ptr, cos_ptr, sin_ptr, out_ptr, line, slice_, in_window, seen,
            REACH, KEYS, N, SLICES, SPLITS, LANES,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["table_row", "limit"])
def attend(
    heads_ptr, heads_row, cos_ptr, sin_ptr, eps, scale,
    ring_ptr, ring_page, ring_row, ring_scales_ptr, ring_scales_page, ring_scales_row,
    pool_ptr, pool_page, pool_row, pool_scales_ptr, pool_scales_page, pool_scales_row,
    slots_ptr, positions_ptr, lowest_ptr, table_ptr, table_row, visible_ptr, chosen_ptr, chosen_row, chosen_count,
    sink_ptr, sums_ptr, shares_ptr, out_ptr, heads, limit,
    MODE: gl.constexpr, PER_PAGE: gl.constexpr, RING: gl.constexpr, REACH: gl.constexpr, KEYS: gl.constexpr,
    N: gl.constexpr, SLICES: gl.constexpr, SPLITS: gl.constexpr, LANES: gl.constexpr, MAIN: gl.constexpr,
    TAIL: gl.constexpr,
):  # fmt: skip
    """N heads of row program_id(2): what split program_id(1) has, and of what all splits have a slice of the result.

    `limit` is the last place of a row's list. What is behind a split's last key reads as its first one.
    """
    r, split, h0 = gl.program_id(2).to(gl.int64), gl.program_id(1), gl.program_id(0) * N
    L: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [WARPS, 1], [1, 0])
    B: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [WARPS, 1], [1, 0])
    begin = split * KEYS
    j = begin + gl.arange(0, KEYS, layout=gl.SliceLayout(1, L))
    table_ptr += r * table_row
    chosen_ptr += r * chosen_row
    place = gl.minimum(gl.maximum(j - REACH, 0), limit)
    place0 = gl.minimum(gl.maximum(begin - REACH, 0), limit)
    entry, page = _entry_and_page(place, table_ptr, chosen_ptr, MODE, PER_PAGE)
    entry0, page0 = _entry_and_page(place0, table_ptr, chosen_ptr, MODE, PER_PAGE)
    slot = gl.load(slots_ptr + r).to(gl.int64)
    first, in_window, seen = _extent(r, positions_ptr, lowest_ptr, visible_ptr, chosen_count, MODE, REACH)
    h = gl.arange(0, N, layout=gl.SliceLayout(1, B))
    d = gl.arange(0, 512, layout=gl.SliceLayout(0, B))
    raw = gl.load(heads_ptr + r * heads_row + (h0 + h)[:, None] * 512 + d[None, :])
    cos_ptr += r * 32
    sin_ptr += r * 32
    cos, sin = _turns(raw, cos_ptr, sin_ptr)
    q_s = gl.allocate_shared_memory(gl.bfloat16, [N, 512], gl.NVMMASharedLayout(128, 16, rank=2))
    if MODE == 1:  # while pages are on their way
        q_s.store(_normed(raw, cos, sin, eps))
    listed = (entry, page, entry0, page0)
    ring = (ring_ptr, ring_page, ring_row, ring_scales_ptr, ring_scales_page, ring_scales_row)
    pool = (pool_ptr, pool_page, pool_row, pool_scales_ptr, pool_scales_page, pool_scales_row)
    values, scales = _place(j, begin, first, in_window, seen, slot, listed, ring, pool, MODE, PER_PAGE, RING, REACH)
    bits = gl.load(scales)
    low, middle, high = _words(values, 0, 32, L), _words(values, 128, 32, L), _words(values, 256, 32, L)
    words = (low, middle, high, _words(values, 384, 16, L), _words(values, 448, 32, L))
    if MODE != 1:
        gl.thread_barrier()  # else keys would be asked for when the queries have come
        q_s.store(_normed(raw, cos, sin, eps))
    gl.thread_barrier()  # with the branch behind it: else the last keys would be asked for when the first have come
    line = ((r * gl.num_programs(0) + gl.program_id(0)) * gl.num_programs(1)).to(gl.int32)
    if gl.where(begin < REACH, begin < in_window, begin - REACH < seen):
        key = begin + gl.arange(0, KEYS, layout=gl.SliceLayout(1, _product_layout(KEYS, N)))
        valid = gl.where(key < REACH, key < in_window, key - REACH < seen)
        _tell_tile(words, bits, valid, scale, q_s, sums_ptr, shares_ptr, line + split, KEYS, N, SLICES, MAIN)
    if split < SLICES:
        out_ptr += (r * heads + h0) * 512
        _put_slice(
            sums_ptr, shares_ptr, sink_ptr + h0, cos_ptr, sin_ptr, out_ptr, line, split, in_window, seen,
            REACH, KEYS, N, SLICES, SPLITS, LANES, MAIN, TAIL,
        )  # fmt: skip


class Tiling(NamedTuple):
    """Heads and keys of a program, how many of a row's programs have a slice of the result, and whether of averages."""

    heads: int
    keys: int
    slices: int
    averages: bool = False


_TILINGS = ((16, 64), (16, 128), (32, 64), (32, 128))
"""Heads and keys of a program, the first first."""
_AVERAGED = ((32, 64), (32, 128), (64, 128))
"""The same of programs that tell averages, which are fewer bytes."""
_SERVED = ((640, 8), (1152, 1))
"""Keys that a row may have, and of how many rows one launch then takes less time than two: with few heads."""
_SERVED_BY_AVERAGES = ((1152, 4), (8448, 2))
"""The same of rows of 64 heads each, or halves of rows of 128, with more than 640 keys."""


def tiling_for(rows: int, heads: int, most: int, processors: int) -> Tiling | None:
    """How so many rows of up to `most` keys are served; None where two launches take less time.

    Programs are no more than `processors`. As many have a slice of the result as a row has, sixteen at least.
    """
    if heads <= 64 and _within(_SERVED, most, rows):
        for each, keys in _TILINGS:
            beside = processors // (rows * heads // each)  # programs of a row's heads
            splits = triton.cdiv(most, keys)
            if splits <= beside:
                wanted = max(16, int(triton.next_power_of_2(splits)))
                return Tiling(each, keys, min(wanted, _SLICES, 1 << (beside.bit_length() - 1)))
    elif most > _SERVED[0][0] and _within(_SERVED_BY_AVERAGES, most, rows * heads // 64):
        for each, keys in _AVERAGED:
            beside = processors // (rows * heads // each)
            splits = triton.cdiv(most, keys)
            slices = min(2 * each, _COPIES // each, 1 << (max(beside, 1).bit_length() - 1))
            if splits <= beside and averages.have_room(each, slices, splits):
                return Tiling(each, keys, slices, True)
    return None


def _within(served: tuple[tuple[int, int], ...], most: int, rows: int) -> bool:
    """Whether so many rows of up to `most` keys are served."""
    return any(most <= keys and rows <= many for keys, many in served)


def tiling_of(out: Tensor, entries: PagedEntries | None, ids: Tensor | None) -> Tiling | None:
    """How the rows of `out` [B, H, 512] are served, if they are."""
    most = WINDOW
    if entries is not None:
        count = entries.most if ids is None else ids.shape[1]
        if not count or not entries.page_table.shape[1]:
            return None
        most += count
    rows, heads, _ = out.shape
    return tiling_for(rows, heads, most, min(multiprocessors(out.device), _PROGRAMS))


def launch(
    queries: Queries,
    window: RingRows,
    entries: PagedEntries | None,
    ids: Tensor | None,
    attention: Attention,
    out: Tensor,
    t: Tiling,
) -> None:
    """Attention of decode rows, see ref.attend_rows, into `out` [B, H, 512]."""
    assert isinstance(window.ring, PackedRows)
    rows, heads, _ = out.shape
    pool, per_page, most, limit = window.ring, 1, WINDOW, 0
    listed: tuple[Any, ...] = (window.positions, 0, window.positions, window.positions, 0, 0)
    if entries is not None:
        assert isinstance(entries.pool, PackedRows) and entries.most is not None
        pool, per_page, table = entries.pool, entries.pool.shape[1], entries.page_table
        most += entries.most if ids is None else ids.shape[1]
        limit = (table.shape[1] * per_page if ids is None else ids.shape[1]) - 1
        chosen = (window.positions, 0, 0) if ids is None else (ids, ids.stride(0), ids.shape[1])
        listed = (table, table.stride(0), entries.visible, *chosen)
    cos, sin = queries.angles
    programs = max(triton.cdiv(most, t.keys), t.slices)
    attend[(heads // t.heads, programs, rows)](
        *(queries.heads, queries.heads.stride(0), cos, sin, queries.eps, attention.scale * _LOG2E),
        *(*_strides(window.ring), *_strides(pool)),
        *(window.slots, window.positions, window.lowest, *listed, attention.sink, *workspace(out.device), out),
        *(heads, limit),
        MODE=0 if entries is None else 2 if ids is None else 1,
        PER_PAGE=per_page,
        RING=window.size,
        **shape_of(t, most),
        num_warps=WARPS.value,
    )


def shape_of(t: Tiling, most: int) -> dict[str, int]:
    """What the kernel is compiled for, beside what the caches look like."""
    shape = {"KEYS": t.keys, "N": t.heads, "SLICES": t.slices, "REACH": WINDOW}
    if t.averages:
        main, tail = averages.rounds_for(triton.cdiv(most, t.keys))
        splits = triton.next_power_of_2(max(WARPS.value * (main + tail), 1024 // t.heads))
        return shape | {"SPLITS": splits, "LANES": 0, "MAIN": main, "TAIL": tail}
    lanes = lanes_for(t.heads, t.slices)
    splits = max(lanes, triton.next_power_of_2(triton.cdiv(most, t.keys)))
    return shape | {"SPLITS": splits, "LANES": lanes, "MAIN": 0, "TAIL": 0}


def _strides(pool: PackedRows) -> tuple[Any, ...]:
    """Values, strides of page and row, scales, theirs."""
    return (pool.values, *pool.values.stride()[:2], pool.scales, *pool.scales.stride()[:2])
