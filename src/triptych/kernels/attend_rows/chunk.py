"""Attention of a prefill chunk for Hopper, in Gluon: entries and window rows become bfloat16 once, not once a row.

    workspace   | entries of sequence 0 | entries of sequence 1 | ... | window rows of the step |    rows of 512, bf16

    shared memory   queries 64 x 512 | keys, two tiles of 64 x 512 | weights of a tile 64 x 64        200 KiB

    tile t          copies of keys(t+1) are under way
                    scores = queries . keys(t)      the tensor cores; half of the queries lie in registers
                    weights = softmax               peaks lag a tile behind, so nothing waits for a maximum
                    sums += weights . keys(t)       the tensor cores, half of the dims each warpgroup

hopper.py converts what each row reads, which takes most of its instructions; a chunk's rows read the same keys many
times. The values are the same bits: e4m3 times its power of two is exact in bfloat16. A row's result depends on its
own keys alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from triptych.kernels.attend.ref import Attention, WindowRows
from triptych.kernels.attend_rows.ref import Queries
from triptych.kernels.gpu import multiprocessors
from triptych.kernels.index.ref import PagedEntries
from triptych.kernels.quant.formats import PackedRows

LEAST_ROWS = 128
"""Rows from which on the chip is full without splitting a row's keys."""
_MOST_BYTES = 1 << 28  # of the workspace's entries: those of a million tokens
_ENTRIES_A_ROW = 256  # more entries than so many for each row of the chunk cost more to convert than is saved
_LOG2E = 1.4426950408889634


def fits(queries: Queries, entries: PagedEntries | None) -> bool:
    """Whether converting the entries first pays for so many rows."""
    rows = len(queries.heads)
    if rows < LEAST_ROWS or queries.eps <= 0:
        return False
    if entries is None:
        return True
    assert entries.most is not None
    count = entries.most * len(entries.page_table)
    return count * 1024 <= _MOST_BYTES and count <= _ENTRIES_A_ROW * rows


def attend_chunk(
    queries: Queries, window: WindowRows, entries: PagedEntries | None, ids: Tensor | None, attention: Attention
) -> Tensor:
    """See ref.attend_heads, for heads and dims of the released models and packed rows."""
    rows, device = len(queries.heads), queries.heads.device
    out = torch.empty(rows, queries.count, queries.dim, dtype=torch.bfloat16, device=device)
    assert isinstance(window.rows, PackedRows)
    most, sequences = 0, 0
    if entries is not None:
        assert entries.most is not None
        most, sequences = entries.most, len(entries.page_table)
    base = most * sequences
    keys = torch.empty(base + window.rows.shape[1], queries.dim, dtype=torch.bfloat16, device=device)
    _unpack(window.rows, keys, base)
    seq, visible, chosen, width = window.first, window.count, window.first, 0
    if entries is not None:
        _unpack_entries(entries, keys)
        seq, visible = entries.seq, entries.visible
        if ids is not None:
            chosen, width = ids, ids.shape[1]
    cos, sin = queries.angles
    attend[(queries.count // 64, rows)](
        *(queries.heads, queries.heads.stride(0), cos, sin, queries.eps, attention.scale * _LOG2E, keys, base, most),
        *(window.first, window.count, seq, visible, chosen, chosen.stride(0), width, attention.sink, out),
        *(queries.count, rows, multiprocessors(device) * 64 // queries.count),
        MODE=0 if entries is None else 2 if ids is None else 1,
        num_warps=8,
    )
    return out


def _unpack(pool: PackedRows, keys: Tensor, base: int) -> None:
    """Rows of a pool of one page to keys from row `base` on."""
    count = pool.shape[1]
    unpack[(triton.cdiv(count, 16), 1)](
        *(pool.values, 0, pool.values.stride(1), pool.scales, 0, pool.scales.stride(1), keys, 0, keys[base:], count),
        PAGED=False,
        PER_PAGE=1,
        SOME=16,
        num_warps=4,
    )


def _unpack_entries(entries: PagedEntries, keys: Tensor) -> None:
    """The first `most` entries of each sequence."""
    pool, table = entries.pool, entries.page_table
    assert isinstance(pool, PackedRows) and entries.most is not None
    unpack[(triton.cdiv(entries.most, 16), len(table))](
        *(pool.values, *pool.values.stride()[:2], pool.scales, *pool.scales.stride()[:2]),
        *(table, table.stride(0), keys, entries.most),
        PAGED=True,
        PER_PAGE=pool.shape[1],
        SOME=16,
        num_warps=4,
    )


@triton.jit
def unpack(
    pool_ptr, pool_page, pool_row, scales_ptr, scales_page, scales_row, table_ptr, table_row, out_ptr, count,
    PAGED: tl.constexpr, PER_PAGE: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """Packed rows, 448 e4m3 with a scale for each 64 and 64 bfloat16, as 512 bfloat16."""
    s = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * SOME + tl.arange(0, SOME)
    there = n < count
    values, scales = pool_ptr + n.to(tl.int64) * pool_row, scales_ptr + n.to(tl.int64) * scales_row
    if PAGED:
        page = tl.load(table_ptr + s * table_row + n // PER_PAGE, mask=there, other=0).to(tl.int64)
        row = (n % PER_PAGE).to(tl.int64)
        values = pool_ptr + page * pool_page + row * pool_row
        scales = scales_ptr + page * scales_page + row * scales_row
    values = tl.multiple_of(values, 16)
    out_ptr += (s * count + n)[:, None] * 512
    g = tl.arange(0, 8)
    code = tl.load(scales[:, None] + g[None, :], mask=there[:, None], other=0).to(tl.int32)
    factor = (code << 23).to(tl.float32, bitcast=True)
    d = tl.arange(0, 512)
    x = tl.load(values[:, None] + d[None, :], mask=there[:, None] & (d < 448)[None, :], other=0)
    x = tl.reshape(x.to(tl.float8e4nv, bitcast=True).to(tl.float32), [SOME, 8, 64]) * factor[:, :, None]
    x = tl.reshape(x, [SOME, 512]).to(tl.bfloat16)
    tl.store(out_ptr + d[None, :], x, mask=there[:, None] & (d < 448)[None, :])
    t = tl.arange(0, 64)
    tail = (values + 448).to(tl.pointer_type(tl.bfloat16), bitcast=True)
    x = tl.load(tl.multiple_of(tail, 8)[:, None] + t[None, :], mask=there[:, None], other=0.0)
    tl.store(out_ptr + (448 + t)[None, :], x, mask=there[:, None])


@gluon.jit
def _rows_of(chosen_ptr, j, in_window, end, window_at, entries_at, MODE: gl.constexpr):
    """Rows of the workspace that keys j of a query row are; what is beyond the last key reads as it."""
    j = gl.minimum(j, end - 1)
    place = window_at + j
    if MODE != 0:
        entry = gl.maximum(j - in_window, 0)
        if MODE == 1:
            entry = gl.maximum(gl.load(chosen_ptr + entry).to(gl.int32), 0)
        place = gl.where(j < in_window, place, entries_at + entry)
    return place


@gluon.jit
def _copy(target, keys_ptr, place, C: gl.constexpr):
    """Begin to copy rows `place` [64] of the workspace."""
    d = gl.arange(0, 512, layout=gl.SliceLayout(0, C))
    at = keys_ptr + place.to(gl.int64)[:, None] * 512 + d[None, :]
    async_copy.async_copy_global_to_shared(target, at)
    async_copy.commit_group()


@gluon.jit
def _queries(target, here, cos_ptr, sin_ptr, eps):
    """64 raw heads of 512, normed, their last 64 dims rotated, to shared memory."""
    B: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
    h = gl.arange(0, 64, layout=gl.SliceLayout(1, B))
    d = gl.arange(0, 512, layout=gl.SliceLayout(0, B))
    x = gl.load(here + h[:, None] * 512 + d[None, :]).to(gl.float32)
    x = x * gl.rsqrt(gl.sum(x * x, 1) / 512 + eps)[:, None]
    even, odd = gl.split(gl.reshape(x, [64, 256, 2]))
    pair = gl.arange(0, 256, layout=gl.SliceLayout(0, even.type.layout)) - 224
    cos = gl.load(cos_ptr + pair, mask=pair >= 0, other=1.0)[None, :]
    sin = gl.load(sin_ptr + pair, mask=pair >= 0, other=0.0)[None, :]
    x = gl.reshape(gl.join(even * cos - odd * sin, odd * cos + even * sin), [64, 512])
    target.store(gl.convert_layout(x.to(gl.bfloat16), B))


@gluon.jit
def _put(out_ptr, room, sums, factor, cos_ptr, sin_ptr):
    """Sums [64, 512] of the heads times `factor`, rotated back, through shared memory to whole lines of the result."""
    L: gl.constexpr = sums.type.layout
    x = sums * gl.convert_layout(factor, gl.SliceLayout(1, L))[:, None]
    even, odd = gl.split(gl.reshape(x, [64, 256, 2]))
    pair = gl.arange(0, 256, layout=gl.SliceLayout(0, even.type.layout)) - 224
    cos = gl.load(cos_ptr + pair, mask=pair >= 0, other=1.0)[None, :]
    sin = gl.load(sin_ptr + pair, mask=pair >= 0, other=0.0)[None, :]
    x = gl.reshape(gl.join(even * cos + odd * sin, odd * cos - even * sin), [64, 512])
    room.store(gl.convert_layout(x, L, assert_trivial=True).to(gl.bfloat16))
    gl.thread_barrier()
    B: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
    h = gl.arange(0, 64, layout=gl.SliceLayout(1, B))
    d = gl.arange(0, 512, layout=gl.SliceLayout(0, B))
    gl.store(out_ptr + h[:, None] * 512 + d[None, :], room.load(B))


@gluon.jit
def _max_and_sum(most, total, most1, total1):
    return gl.maximum(most, most1), total + total1


@gluon.jit
def attend(
    heads_ptr, heads_row, cos_ptr, sin_ptr, eps, scale, keys_ptr, base, most,
    first_ptr, count_ptr, seq_ptr, visible_ptr, chosen_ptr, chosen_row, chosen_count, sink_ptr, out_ptr,
    heads, rows, ahead, MODE: gl.constexpr,
):  # fmt: skip
    """64 heads of one row: softmax over its window rows, its entries (MODE 1: the chosen, 2: all) and the sink."""
    r = gl.program_id(1).to(gl.int64)
    h0 = gl.program_id(0) * 64
    in_window = gl.load(count_ptr + r).to(gl.int32)
    window_at = base + gl.load(first_ptr + r).to(gl.int32)
    total = in_window
    entries_at = 0
    if MODE != 0:
        entries_at = gl.load(seq_ptr + r).to(gl.int32) * most
        seen = gl.load(visible_ptr + r).to(gl.int32)
        if MODE == 1:
            seen = gl.minimum(seen, chosen_count)
        total += seen
    chosen_ptr += r * chosen_row
    cos_ptr += r * 32
    sin_ptr += r * 32

    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    C: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, 32, 16])
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, 256, 16])
    q_s = gl.allocate_shared_memory(gl.bfloat16, [64, 512], shared)
    k_s = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 512], shared)
    p_s = gl.allocate_shared_memory(gl.bfloat16, [64, 64], shared)
    i = gl.arange(0, 64, layout=gl.SliceLayout(1, C))
    _copy(k_s.index(0), keys_ptr, _rows_of(chosen_ptr, i, in_window, total, window_at, entries_at, MODE), C)
    place = _rows_of(chosen_ptr, 64 + i, in_window, total, window_at, entries_at, MODE)
    _queries(q_s, heads_ptr + r * heads_row + h0 * 512, cos_ptr, sin_ptr, eps)
    # the row that this multiprocessor will most likely take next, on its way to the L2 cache
    lane = gl.arange(0, 512, layout=gl.BlockedLayout([2], [32], [8], [0]))
    coming = heads_ptr + gl.minimum(r + ahead, rows - 1) * heads_row + h0 * 512 + lane * 64
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [coming], dtype=gl.int32, is_pure=False, pack=1
    )
    fence_async_shared()
    gl.thread_barrier()
    q = q_s.slice(0, 256, dim=1).load(gl.DotOperandLayout(0, S, 2))
    rest = q_s.slice(256, 256, dim=1)

    sums = gl.zeros([64, 512], gl.float32, layout=L)
    none = gl.zeros([64, 64], gl.float32, layout=S)
    peak = gl.full([64], -1.0e30, gl.float32, layout=gl.SliceLayout(1, S))
    weight = gl.zeros([64], gl.float32, layout=gl.SliceLayout(1, S))
    growth = gl.zeros([64], gl.float32, layout=gl.SliceLayout(1, S))
    js = gl.arange(0, 64, layout=gl.SliceLayout(0, S))
    tiles = (total + 63) // 64
    for t in range(tiles):
        async_copy.wait_group(0)
        fence_async_shared()
        gl.thread_barrier()
        k = k_s.index(t % 2)
        s = warpgroup_mma(q, k.slice(0, 256, dim=1).permute((1, 0)), none, use_acc=False, is_async=True)
        s = warpgroup_mma(rest, k.slice(256, 256, dim=1).permute((1, 0)), s, is_async=True)
        # while they multiply: the next tile, and the last one's growth of the peak
        if t + 1 < tiles:
            _copy(k_s.index((t + 1) % 2), keys_ptr, place, C)
        place = _rows_of(chosen_ptr, (t + 2) * 64 + i, in_window, total, window_at, entries_at, MODE)
        peak += growth
        fade = gl.exp2(-growth)
        weight = weight * fade
        scores = warpgroup_mma_wait(0, deps=(s,))
        scores = gl.where((t * 64 + js < total)[None, :], scores * scale, -1.0e30)
        if t == 0:
            peak = gl.max(scores, 1)
        p = gl.exp2(gl.minimum(scores - peak[:, None], 100.0))
        p_s.store(p.to(gl.bfloat16))
        sums = sums * gl.convert_layout(fade, gl.SliceLayout(1, L))[:, None]
        fence_async_shared()
        gl.thread_barrier()
        acc = warpgroup_mma(p_s, k, sums, is_async=True)
        highest, total_p = gl.reduce((p, p), 1, _max_and_sum)
        weight += total_p
        growth = gl.maximum(gl.log2(highest), 0.0)
        sums = warpgroup_mma_wait(0, deps=(acc,))
    gl.thread_barrier()
    hs = gl.arange(0, 64, layout=gl.SliceLayout(1, S))
    sink = gl.load(sink_ptr + h0 + hs) * 1.4426950408889634
    top = gl.maximum(peak, sink)
    shrunk = gl.exp2(peak - top)
    factor = shrunk / (weight * shrunk + gl.exp2(sink - top))
    _put(out_ptr + (r * heads + h0) * 512, q_s, sums, factor, cos_ptr, sin_ptr)
