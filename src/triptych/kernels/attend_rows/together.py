"""Attention of few decode rows in one launch for Hopper, in Gluon: programs of a row wait for each other's sums.

    keys of a row     | window rows, 128 places | entries: the chosen ones, or all visible ones |
    a program's         KEYS of them, one tile, for N of the heads
    scores, weights   keys . queries                       [KEYS, N]    keys are the tall side of both products, so that
    sums              keys turned . weights                [512, N]     few heads cost little
    result            a slice of the dims of N heads, of all splits' sums, in each of the first SLICES programs

A word of the workspace that nobody has written is EMPTY, which sums never are: who waits for a sum looks at nothing
else, and leaves EMPTY behind. So a launch finds the workspace as the one before did, and a graph may replay it.
All programs run side by side: there are no more than multiprocessors.
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
from triptych.kernels.attend_rows.hopper_keys import _keep_scaled, _words
from triptych.kernels.attend_rows.ref import Queries, RingRows
from triptych.kernels.gpu import multiprocessors
from triptych.kernels.index.ref import PagedEntries
from triptych.kernels.quant.formats import PackedRows

_LOG2E = 1.4426950408889634
_EMPTY = gl.constexpr(-1)
"""A NaN that no instruction makes."""
_SLICES = 64
"""Of the result that a row's programs have, at most."""
_HEADS = 32
"""Of a program at most."""
_AT_ONCE = 16
"""Pieces of four numbers that a thread waits for at once, at most."""
_PROGRAMS = 132
"""At most, for which the workspace has room."""
_SUMS = _PROGRAMS * _HEADS * 512


@cache
def workspace(device: torch.device) -> Tensor:
    """Sums, and behind them peaks and weights, on their way, int32 and EMPTY, for launches that never overlap.

    Made by the first call, which must not be one that is captured.
    """
    words = _SUMS + _PROGRAMS * _SLICES * _HEADS
    return torch.full((words,), _EMPTY.value, dtype=torch.int32, device=device)


@gluon.constexpr_function
def _product_layout(tall, width, warps):
    """Of a product [tall, width]."""
    along = min(warps, tall // 16)
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[along, warps // along], instr_shape=[16, width * along // warps, 16]
    )


@gluon.constexpr_function
def _gathered_layout(lanes, quads, pairs, warps):
    """[splits, 2 * pairs of dims, quads of heads]: a thread has both of a pair, which no other has."""
    wide = min(quads, 32 // lanes, 4)
    beside = 32 // lanes // wide
    tall = min(warps, pairs // beside)
    assert beside * tall == pairs and quads >= wide * (warps // tall)
    return gl.BlockedLayout([1, 2, 1], [lanes, beside, wide], [1, tall, warps // tall], [2, 1, 0])


@gluon.constexpr_function
def _each(layout, splits, quads):
    """Of how many splits and quads of heads a thread has a pair of dims."""
    covers = layout.threads_per_warp[2] * layout.warps_per_cta[2]
    return splits // layout.threads_per_warp[0] * (quads // covers)


@gluon.constexpr_function
def _pairs_layout(layout):
    """Of one of each pair of dims [D / 2, quads] of what lies [D, quads] in `layout`."""
    return gl.SliceLayout(0, gl.BlockedLayout([1, 1, 1], layout.threads_per_warp, layout.warps_per_cta, [2, 1, 0]))


@gluon.constexpr_function
def _waiting(n):
    """Reads n times four words, $0 .., until none is EMPTY; operands: n places behind $5n, none where negative."""
    words = [f"{{${i}, ${n + i}, ${2 * n + i}, ${3 * n + i}}}" for i in range(n)]
    named = [f".reg .pred w<{n}>; .reg .pred k; .reg .b32 c; .reg .b64 a<{n}>;"]
    named += [f"mov.b32 ${i}, 0;" for i in range(4 * n)] + ["mov.b32 c, 0;"]
    named += [f"setp.ge.s32 w{i}, ${4 * n + i}, 0; mad.wide.s32 a{i}, ${4 * n + i}, 16, ${5 * n};" for i in range(n)]
    reads = [f"@w{i} ld.relaxed.gpu.global.v4.b32 {words[i]}, [a{i}];" for i in range(n)]
    tests = ["setp.eq.s32 k, $0, -1;"] + [f"setp.eq.or.s32 k, ${i}, -1, k;" for i in range(1, 4 * n)]
    ends = ["add.s32 c, c, 1;", "setp.lt.and.s32 k, c, 1048576, k;", "@k bra AGAIN;"]
    return "{ " + " ".join([*named, "AGAIN:", *reads, *tests, *ends]) + " }"


@gluon.constexpr_function
def _leaving(n):
    named = [f".reg .pred w<{n}>; .reg .b32 e; .reg .b64 a<{n}>;", "mov.b32 e, -1;"]
    named += [f"setp.ge.s32 w{i}, ${n + i}, 0; mad.wide.s32 a{i}, ${n + i}, 16, ${2 * n};" for i in range(n)]
    writes = [f"@w{i} st.global.v4.b32 [a{i}], {{e, e, e, e}};" for i in range(n)]
    return "{ " + " ".join([*named, *writes, *[f"mov.b32 ${i}, 0;" for i in range(n)]]) + " }"


@gluon.constexpr_function
def _operands(n):
    return ",".join(["=&r"] * (4 * n) + ["r"] * n + ["l"] * n)


@gluon.constexpr_function
def _leave_operands(n):
    return ",".join(["=&r"] * n + ["r"] * n + ["l"] * n)


@gluon.jit
def _gathered(base, place, COUNT: gl.constexpr):
    """Four float32 from each 16-byte place of the workspace as soon as all are there; 0 where a place is negative."""
    a, b, c, d = gl.inline_asm_elementwise(
        _waiting(COUNT),
        _operands(COUNT),
        [place, base.to(gl.int64)],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=False,
        pack=COUNT,
    )
    return (
        a.to(gl.float32, bitcast=True),
        b.to(gl.float32, bitcast=True),
        c.to(gl.float32, bitcast=True),
        d.to(gl.float32, bitcast=True),
    )


@gluon.jit
def _leave(base, place, COUNT: gl.constexpr):
    """EMPTY in the four words at each place."""
    gl.inline_asm_elementwise(
        _leaving(COUNT), _leave_operands(COUNT), [place, base.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=COUNT
    )


# stampdef
@gluon.jit
def _told(x):
    """Bits of float32 x, never EMPTY."""
    bits = x.to(gl.int32, bitcast=True)
    return gl.where(bits == _EMPTY, 0x7FFFFFFF, bits)


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
def _lined(x):
    """Columns [.., N] in the order in which a thread's four of sixteen lie side by side: 0, 1, 8, 9, 2, 3, 10, 11, .."""
    x = gl.reshape(x, [x.shape[0], x.shape[1] // 16, 2, 4, 2])
    return gl.reshape(gl.permute(x, (0, 1, 3, 2, 4)), [x.shape[0], x.shape[1] * x.shape[2] * x.shape[3] * x.shape[4]])


@gluon.constexpr_function
def _lined_layout(width, warps):
    """[128, width] as products have it, after `_lined`: sixteen bytes of a row a thread."""
    regs = [[0, 1], [0, 2], *([[0, 16]] if width == 32 else []), [8, 0], *([[64, 0]] if warps == 4 else [])]
    rows = [[16, 0], [32, 0], *([[64, 0]] if warps == 8 else [])]
    return gl.DistributedLinearLayout(regs, [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], rows, [], [128, width])


@gluon.jit
def _put(at, x, rows, N: gl.constexpr, WARPS: gl.constexpr):
    """`rows` rows of x [128, N]."""
    x = gl.convert_layout(_lined(_told(x)), _lined_layout(N, WARPS), assert_trivial=True)
    d = gl.arange(0, 128, layout=gl.SliceLayout(1, x.type.layout))[:, None]
    h = gl.arange(0, N, layout=gl.SliceLayout(0, x.type.layout))[None, :]
    gl.store(at + d * N + h, x, mask=d < rows)


@gluon.jit
def _merged(so_far, x, share):
    """Highest share, all shares and sums [dims, quads] of one of each four heads, with those of more splits."""
    highest0, total, sums = so_far
    highest = gl.maximum(highest0, gl.max(share, 0))
    fade, factor = gl.exp2(highest0 - highest), gl.exp2(share - highest[None, :])
    faded = gl.convert_layout(fade, gl.SliceLayout(0, sums.type.layout), assert_trivial=True)[None, :]
    return highest, total * fade + gl.sum(factor, 0), sums * faded + gl.sum(x * factor[:, None, :], 0)


@gluon.jit
def _put_result(at, so_far, cos, sin, E: gl.constexpr):
    """Pairs of dims of one of each four heads, rotated back."""
    _, total, x = so_far
    x = x * gl.convert_layout(1.0 / total, gl.SliceLayout(0, x.type.layout), assert_trivial=True)[None, :]
    even, odd = gl.split(gl.permute(gl.reshape(x, [x.shape[0] // 2, 2, x.shape[1]]), (0, 2, 1)))
    even, odd = gl.convert_layout(even, E, assert_trivial=True), gl.convert_layout(odd, E, assert_trivial=True)
    pair = gl.join(even * cos + odd * sin, odd * cos - even * sin).to(gl.bfloat16)
    both = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, pair.type.layout)))[None, None, :]
    gl.store(gl.convert_layout(at, gl.SliceLayout(2, pair.type.layout), assert_trivial=True)[:, :, None] + both, pair)


@gluon.jit
def _places(
    line, slice_, s, in_window, seen, REACH: gl.constexpr, KEYS: gl.constexpr, N: gl.constexpr, SLICES: gl.constexpr,
    STATS: gl.constexpr, G: gl.constexpr,
):  # fmt: skip
    """Where in the workspace splits s have sums and shares for a slice, in pieces of four heads; -1 where there are none."""
    DIMS: gl.constexpr = 512 // SLICES
    begin = s * KEYS
    there = gl.where(begin < REACH, begin < in_window, begin - REACH < seen)
    d = slice_ * DIMS + gl.arange(0, DIMS, layout=gl.SliceLayout(0, gl.SliceLayout(2, G)))[None, :]
    q = gl.arange(0, N // 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, G)))
    row = ((line + s)[:, None] * 512 + d) * (N // 4)
    sums = gl.where(there[:, None, None], row[:, :, None] + q[None, None, :], -1)
    Q: gl.constexpr = gl.SliceLayout(1, G)
    s = gl.convert_layout(s, gl.SliceLayout(1, Q), assert_trivial=True)
    there = gl.convert_layout(there, gl.SliceLayout(1, Q), assert_trivial=True)
    q = gl.convert_layout(q, gl.SliceLayout(0, Q), assert_trivial=True)
    shares = STATS + ((line + s) * SLICES + slice_)[:, None] * (N // 4) + q[None, :]
    return sums, gl.where(there[:, None], shares, -1)


@gluon.jit
def _result(
    work_ptr, sink_ptr, cos_ptr, sin_ptr, out_ptr, line, slice_, in_window, seen, stamp_ptr,
    REACH: gl.constexpr, KEYS: gl.constexpr, N: gl.constexpr, SLICES: gl.constexpr, STATS: gl.constexpr,
    SPLITS: gl.constexpr, BLOCKS: gl.constexpr, LANES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """A slice of the dims of N heads: what all splits have, BLOCKS times SPLITS of them."""
    PAIRS: gl.constexpr = 256 // SLICES
    G: gl.constexpr = _gathered_layout(LANES, N // 4, PAIRS, WARPS)
    EACH: gl.constexpr = _each(G, SPLITS, N // 4)
    E: gl.constexpr = _pairs_layout(G)
    pair = slice_ * PAIRS + gl.arange(0, PAIRS, layout=gl.SliceLayout(1, E))[:, None]
    cos = gl.load(cos_ptr + pair - 224, mask=pair >= 224, other=1.0)
    sin = gl.load(sin_ptr + pair - 224, mask=pair >= 224, other=0.0)
    q = gl.arange(0, N // 4, layout=gl.SliceLayout(0, E))[None, :]
    at = out_ptr + (q // 4 * 16 + q % 4 * 2) * 512 + 2 * pair
    q = gl.arange(0, N // 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, G)))
    sink_ptr += q // 4 * 16 + q % 4 * 2
    none = gl.zeros([2 * PAIRS, N // 4], gl.float32, layout=gl.SliceLayout(0, G))
    one = gl.full([N // 4], 1.0, gl.float32, layout=q.type.layout)
    of0 = (gl.load(sink_ptr) * 1.4426950408889634, one, none)
    of1 = (gl.load(sink_ptr + 1) * 1.4426950408889634, one, none)
    of8 = (gl.load(sink_ptr + 8) * 1.4426950408889634, one, none)
    of9 = (gl.load(sink_ptr + 9) * 1.4426950408889634, one, none)
    s = gl.arange(0, SPLITS, layout=gl.SliceLayout(1, gl.SliceLayout(2, G)))
    for n in gl.static_range(BLOCKS):
        sums, shares = _places(line, slice_, n * SPLITS + s, in_window, seen, REACH, KEYS, N, SLICES, STATS, G)
        # whoever has its shares there has its sums there soon: less is asked for in vain
        l0, l1, l8, l9 = _gathered(work_ptr, shares, EACH)
        x0, x1, x8, x9 = _gathered(work_ptr, sums, 2 * EACH)
        of0 = _merged(of0, x0, gl.where(shares >= 0, l0, -1.0e30))
        of1 = _merged(of1, x1, gl.where(shares >= 0, l1, -1.0e30))
        of8 = _merged(of8, x8, gl.where(shares >= 0, l8, -1.0e30))
        of9 = _merged(of9, x9, gl.where(shares >= 0, l9, -1.0e30))
    # @7
    _put_result(at, of0, cos, sin, E)
    _put_result(at + 512, of1, cos, sin, E)
    _put_result(at + 4096, of8, cos, sin, E)
    _put_result(at + 4608, of9, cos, sin, E)
    # @8
    gl.thread_barrier()  # all warps have read the shares
    for n in gl.static_range(BLOCKS):
        sums, shares = _places(line, slice_, n * SPLITS + s, in_window, seen, REACH, KEYS, N, SLICES, STATS, G)
        _leave(work_ptr, sums, 2 * EACH)
        _leave(work_ptr, shares, EACH)
    # @6


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
    words, bits, valid, scale, q_s, sums_ptr, shares_ptr, stamp_ptr,
    KEYS: gl.constexpr, N: gl.constexpr, SLICES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Sums, peaks and weights of a tile of keys, of which `valid` [KEYS] are there, to the workspace."""
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    pairs: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    S: gl.constexpr = _product_layout(KEYS, N, WARPS)
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
    # @4
    none = gl.zeros([KEYS, N], gl.float32, layout=S)
    scores = gl.where(valid[:, None], _scores(q_s, k0_s, k1_s, k2_s, k3_s, none) * scale, -1.0e30)
    # @11
    peak = gl.max(scores, 0)
    p = gl.where(valid[:, None], gl.exp2(scores - peak[None, :]), 0.0)
    p_s.permute((1, 0)).store(p.to(gl.bfloat16))
    fence_async_shared()
    gl.thread_barrier()
    # @10
    A: gl.constexpr = _product_layout(128, N, WARPS)
    zeros = gl.zeros([128, N], gl.float32, layout=A)
    ones = gl.full([128, KEYS], 1.0, gl.bfloat16, layout=gl.DotOperandLayout(0, A, 2))
    weight = warpgroup_mma(ones, p_s.permute((1, 0)), zeros, use_acc=False, is_async=True)
    a0, a1 = _sums(k0_s, p_s, zeros), _sums(k1_s, p_s, zeros)
    a2, a3 = _sums(k2_s, p_s, zeros), _sums(k3_s, p_s, zeros)
    peak = gl.convert_layout(peak, gl.SliceLayout(0, A))[None, :]
    # @12
    weight, a0, a1, a2, a3 = warpgroup_mma_wait(0, deps=(weight, a0, a1, a2, a3))
    # @13
    _put(shares_ptr, peak + gl.log2(weight), SLICES, N, WARPS)
    inverse = 1.0 / weight
    _put(sums_ptr, a0 * inverse, 128, N, WARPS)
    _put(sums_ptr + 128 * N, a1 * inverse, 128, N, WARPS)
    _put(sums_ptr + 256 * N, a2 * inverse, 128, N, WARPS)
    _put(sums_ptr + 384 * N, a3 * inverse, 128, N, WARPS)
    # @5


@gluon.jit(do_not_specialize=["table_row", "limit"])
def attend(
    heads_ptr, heads_row, cos_ptr, sin_ptr, eps, scale,
    ring_ptr, ring_page, ring_row, ring_scales_ptr, ring_scales_page, ring_scales_row,
    pool_ptr, pool_page, pool_row, pool_scales_ptr, pool_scales_page, pool_scales_row,
    slots_ptr, positions_ptr, lowest_ptr, table_ptr, table_row, visible_ptr, chosen_ptr, chosen_row, chosen_count,
    sink_ptr, work_ptr, out_ptr, heads, limit, stamp_ptr,
    MODE: gl.constexpr, PER_PAGE: gl.constexpr, RING: gl.constexpr, REACH: gl.constexpr, KEYS: gl.constexpr,
    N: gl.constexpr, SLICES: gl.constexpr, STATS: gl.constexpr, SPLITS: gl.constexpr, BLOCKS: gl.constexpr,
    LANES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """N heads of row program_id(2): sums of split program_id(1), and of all splits' sums a slice of the result.

    `limit` is the last place of a row's list. What is behind a split's last key reads as its first one.
    """
    # @0
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
    # @1
    q_s = gl.allocate_shared_memory(gl.bfloat16, [N, 512], gl.NVMMASharedLayout(128, 16, rank=2))
    if MODE == 1:  # while pages are on their way
        q_s.store(_normed(raw, cos, sin, eps))
    # @2
    row = ((first + gl.where(j < in_window, j, 0)) % RING).to(gl.int64)
    values = ring_ptr.to(gl.int64) + slot * ring_page + row * ring_row
    scales = ring_scales_ptr.to(gl.int64) + slot * ring_scales_page + row * ring_scales_row
    if MODE != 0:
        page = gl.where(j - REACH < seen, page, page0).to(gl.int64)
        row = (gl.where(j - REACH < seen, entry, entry0) % PER_PAGE).to(gl.int64)
        in_ring = (j < REACH) | (begin - REACH >= seen)
        values = gl.where(in_ring, values, pool_ptr.to(gl.int64) + page * pool_page + row * pool_row)
        there = pool_scales_ptr.to(gl.int64) + page * pool_scales_page + row * pool_scales_row
        scales = gl.where(in_ring, scales, there)
    values = gl.multiple_of(values.to(gl.pointer_type(gl.int32), bitcast=True), 16)
    bits = gl.load(gl.multiple_of(scales.to(gl.pointer_type(gl.int64), bitcast=True), 8))
    low, middle, high = _words(values, 0, 32, L), _words(values, 128, 32, L), _words(values, 256, 32, L)
    words = (low, middle, high, _words(values, 384, 16, L), _words(values, 448, 32, L))
    if MODE != 1:
        gl.thread_barrier()  # else keys would be asked for when the queries have come
        q_s.store(_normed(raw, cos, sin, eps))
    gl.thread_barrier()  # with the branch behind it: else the last keys would be asked for when the first have come
    line = ((r * gl.num_programs(0) + gl.program_id(0)) * gl.num_programs(1)).to(gl.int32)
    # @3
    if gl.where(begin < REACH, begin < in_window, begin - REACH < seen):
        key = begin + gl.arange(0, KEYS, layout=gl.SliceLayout(1, _product_layout(KEYS, N, WARPS)))
        valid = gl.where(key < REACH, key < in_window, key - REACH < seen)
        mine = line + split
        sums_ptr, shares_ptr = work_ptr + mine * (512 * N), work_ptr + (4 * STATS + mine * (SLICES * N))
        _tell_tile(words, bits, valid, scale, q_s, sums_ptr, shares_ptr, stamp_ptr, KEYS, N, SLICES, WARPS)
    if split < SLICES:
        out_ptr += (r * heads + h0) * 512
        _result(
            work_ptr, sink_ptr + h0, cos_ptr, sin_ptr, out_ptr, line, split, in_window, seen, stamp_ptr,
            REACH, KEYS, N, SLICES, STATS, SPLITS, BLOCKS, LANES, WARPS,
        )  # fmt: skip


class Tiling(NamedTuple):
    """Heads and keys of a program, its warps, and how many of a row's programs have a slice of the result."""

    heads: int
    keys: int
    slices: int
    warps: int


_TILINGS = ((16, 64), (16, 128), (32, 64), (32, 128))
"""Heads and keys of a program, the first first."""


def tiling_for(rows: int, heads: int, most: int, processors: int) -> Tiling | None:
    """How so many rows of up to `most` keys are served; None where their programs cannot all run side by side."""
    for each, keys in _TILINGS:
        beside = processors // (rows * heads // each)  # programs of a row's heads
        if triton.cdiv(most, keys) <= beside:
            return Tiling(each, keys, min(_SLICES, 1 << (beside.bit_length() - 1)), 8)
    return None


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


def _gathering(t: Tiling, splits: int) -> tuple[int, int, int]:
    """Splits whose sums are gathered at once, how many times, and how many lanes of a warp share them."""
    quads, pairs = t.heads // 4, 256 // t.slices
    at_once = min(int(triton.next_power_of_2(splits)), _AT_ONCE * 16 * t.warps // (quads * pairs))
    for lanes in (1, 2, 4, 8, 16, 32):
        wide = min(quads, 32 // lanes, 4)
        tall = min(t.warps, pairs * lanes * wide // 32)
        if tall and 32 // lanes // wide * tall == pairs and quads >= wide * (t.warps // tall):
            return max(lanes, at_once), triton.cdiv(splits, max(lanes, at_once)), lanes
    raise ValueError(f"{t} has too few dims for its warps")


def launch(
    queries: Queries,
    window: RingRows,
    entries: PagedEntries | None,
    ids: Tensor | None,
    attention: Attention,
    out: Tensor,
    t: Tiling,
    stamps: Any = None,
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
    splits = triton.cdiv(most, t.keys)
    at_once, times, lanes = _gathering(t, splits)
    attend[(heads // t.heads, max(splits, t.slices), rows)](
        *(queries.heads, queries.heads.stride(0), cos, sin, queries.eps, attention.scale * _LOG2E),
        *(*_place(window.ring), *_place(pool)),
        *(window.slots, window.positions, window.lowest, *listed, attention.sink, workspace(out.device), out),
        *(heads, limit, stamps if stamps is not None else window.slots),
        MODE=0 if entries is None else 2 if ids is None else 1,
        PER_PAGE=per_page,
        RING=window.size,
        REACH=WINDOW,
        KEYS=t.keys,
        N=t.heads,
        SLICES=t.slices,
        STATS=_SUMS // 4,
        SPLITS=at_once,
        BLOCKS=times,
        LANES=lanes,
        WARPS=t.warps,
        num_warps=t.warps,
    )


def _place(pool: PackedRows) -> tuple[Any, ...]:
    """Values, strides of page and row, scales, theirs."""
    return (pool.values, *pool.values.stride()[:2], pool.scales, *pool.scales.stride()[:2])
