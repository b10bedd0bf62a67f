"""Scores of MXFP4 index keys for Hopper and the highest of them, in Gluon: one launch for all that a decode row needs.

    a warp      32 keys at a time, straight into its registers, the next ones while it is busy with these, and those
                after them meanwhile into the L2
    expanded    to e4m3 in registers, as the left operand of products with queries 64 x 128 in shared memory
    products    float16, see `folded`; relu, two at a time; then products with the weights sum them over heads

No warp waits for others but the three that share its product, and keys need no shared memory. Programs share a row's
keys evenly; the last of a row to be done chooses from the scores of all, see narrow.py. Pages beyond what the row sees
read as its last one.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from triptych.kernels.gpu import multiprocessors
from triptych.kernels.index.ref import PagedEntries
from triptych.kernels.linear.counters import counters
from triptych.kernels.quant.formats import PackedRows
from triptych.kernels.select_rows.narrow import all_of_them, find_peaks, levels, narrowed, scratch_of, width
from triptych.kernels.select_rows.queries import made, query_layout
from triptych.kernels.select_rows.ref import IndexQueries
from triptych.kernels.select_rows.weigh import bits, columns_of, folded, in_order, picked

WARPS = 8

_TABLES: Any = gl.constexpr(
    """
{
.reg .b32 e, o, m, s, t;
.reg .b32 a, b, c, d;
prmt.b32 e, $9, 0, 0x4240;
prmt.b32 o, $9, 0, 0x4341;
max.u16x2 m, e, o;
prmt.b32 t, m, 0, 0x1032;
max.u16x2 m, m, t;
and.b32 $8, m, 0xffff;
sub.u32 t, 0x800a800a, m;
xor.b32 t, t, 0x80008000;
add.s16x2 e, e, t;
add.s16x2 o, o, t;
mov.b32 t, 0;
max.s16x2 e, e, t;
max.s16x2 o, o, t;
shl.b32 o, o, 8;
or.b32 s, e, o;
shfl.sync.idx.b32 a, s, 0, 0x1c03, -1;
shfl.sync.idx.b32 b, s, 2, 0x1c03, -1;
shfl.sync.idx.b32 c, s, 1, 0x1c03, -1;
shfl.sync.idx.b32 d, s, 3, 0x1c03, -1;
prmt.b32 a, a, 0, $10;
prmt.b32 b, b, 0, $10;
prmt.b32 c, c, 0, $10;
prmt.b32 d, d, 0, $10;
mad.lo.u32 $0, a, 0x08080808, 0x24201C18;
mad.lo.u32 $1, b, 0x08080808, 0x24201C18;
mad.lo.u32 $2, c, 0x08080808, 0x24201C18;
mad.lo.u32 $3, d, 0x08080808, 0x24201C18;
mad.lo.u32 $4, a, 0x08080800, 0x14100800;
mad.lo.u32 $5, b, 0x08080800, 0x14100800;
mad.lo.u32 $6, c, 0x08080800, 0x14100800;
mad.lo.u32 $7, d, 0x08080800, 0x14100800;
}
"""
)
"""A key's four codes of scales ($9), each key's in a thread -> tables of four keys' group, that which $10 selects: e4m3
of magnitudes 2 to 6 in $0 to $3, of 0 to 1.5 in $4 to $7, and the key's largest code in $8."""

_AHEAD: Any = gl.constexpr(
    """
{
.reg .pred p;
.reg .b32 t;
mov.u32 t, %laneid;
setp.eq.u32 p, t, 0;
shl.b32 t, $3, 6;
@p cp.async.bulk.prefetch.L2.global [$1], t;
shl.b32 t, $3, 2;
@p cp.async.bulk.prefetch.L2.global [$2], t;
mov.b32 $0, 0;
}
"""
)
"""One thread of a warp asks for $3 keys of 64 bytes at $1 and as many of 4 at $2."""

_EXPAND: Any = gl.constexpr(
    """
{
.reg .b32 s, t, u, v;
and.b32 s, $2, 0x77777777;
prmt.b32 t, $10, $6, s;
shr.u32 s, s, 16;
prmt.b32 u, $10, $6, s;
shl.b32 s, $2, 4;
prmt.b32 v, s, $2, 0xd9c8;
prmt.b32 s, s, $2, 0xfbea;
lop3.b32 $0, v, 0x80808080, t, 0xea;
lop3.b32 $1, s, 0x80808080, u, 0xea;
}
"""
)
"""Eight e2m1 ($2) to twice four e4m3: a table of bytes has the magnitudes, 0 to 3 in $10 and 4 to 7 in $6."""


def score(queries: IndexQueries, keys: PagedEntries, out: tuple[Tensor, Tensor]) -> None:
    """Ordered scores and their tops, `out`."""
    rows, total = out[0].shape
    none = torch.empty(rows, 0, dtype=torch.int32, device=out[0].device)
    _launch(queries, keys, out, none, _programs(rows, total, none.device))


def choose(
    queries: IndexQueries, keys: PagedEntries, out: tuple[Tensor, Tensor], k: int, programs: int | None = None
) -> Tensor:
    """Ids [R, k] of the k highest, as highest.highest has them; `out` is room for scores and tops."""
    rows, total = out[0].shape
    chosen = torch.empty(rows, k, dtype=torch.int32, device=out[0].device)
    _launch(queries, keys, out, chosen, programs or _programs(rows, total, chosen.device))
    return chosen


def _programs(rows: int, total: int, device: torch.device) -> int:
    """Programs of a row: a multiprocessor has two, each of which makes its row's queries anew.

    More where they would have more than 16,384 keys, which evens out rows of unequal lengths.
    """
    alone = min(2 * multiprocessors(device) // rows, int(triton.cdiv(total, 32 * WARPS)))
    return max(alone, int(triton.cdiv(total, 16384)))


def _launch(
    queries: IndexQueries, keys: PagedEntries, out: tuple[Tensor, Tensor], chosen: Tensor, programs: int
) -> None:
    """Scores and, where `chosen` has columns, the highest."""
    rows, total = out[0].shape
    pool, k = keys.pool, chosen.shape[1]
    assert isinstance(pool, PackedRows)
    words, codes = pool.values.view(torch.int32), pool.scales.view(torch.int32)
    scratch = scratch_of(rows, total, k, chosen.device) if k else chosen
    raw = queries.heads[:, -queries.count * queries.dim :]
    cos, sin = queries.angles
    scores[(programs, rows)](
        *(raw, raw.stride(0), cos, sin, queries.weights, queries.weights.stride(0)),
        *(words, words.stride(0) // 4, codes, codes.stride(0) // 4),
        *(keys.page_table, keys.page_table.stride(0), keys.seq, keys.visible, *out, counters(chosen.device)),
        *(chosen, scratch, scratch.stride(0), total, queries.count, k),
        PER_PAGE=pool.shape[1],
        ROUNDS=queries.rounds,
        ROPE=2 * cos.shape[1],
        LEVELS=levels(total, k) if k else 0,
        WIDE=width(total, k),
        WARPS=WARPS,
        num_warps=WARPS,
        maxnreg=128,
    )


@gluon.constexpr_function
def _words_layout(warps):
    """[warps, 16 keys, 16 words]: a thread has a group, 16 bytes, of each of two keys."""
    deep = [[0, 0, 1], [0, 0, 2], [0, 8, 0]]
    lanes = [[0, 0, 4], [0, 0, 8], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout(deep, lanes, [[b, 0, 0] for b in bits(warps)], [], [warps, 16, 16])


@gluon.constexpr_function
def _expanded_layout(warps):
    """[warps, 2 halves, 8 keys, 4 groups, 4 words, 4 places] of what words become."""
    deep = [[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 2], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 2, 0], [0, 1, 0, 0, 0, 0]]
    lanes = [[0, 0, 0, 1, 0, 0], [0, 0, 0, 2, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 2, 0, 0, 0], [0, 0, 4, 0, 0, 0]]
    return gl.DistributedLinearLayout(
        deep, lanes, [[b, 0, 0, 0, 0, 0] for b in bits(warps)], [], [warps, 2, 8, 4, 4, 4]
    )


@gluon.constexpr_function
def _key_layout(warps):
    """[warps, 32 keys]: a thread has that of its quad's four which is its."""
    lanes = [[0, 16], [0, 8], [0, 1], [0, 2], [0, 4]]
    return gl.DistributedLinearLayout([], lanes, [[b, 0] for b in bits(warps)], [], [warps, 32])


@gluon.jit
def _pages(where, t, PER_PAGE: gl.constexpr, WARPS: gl.constexpr):
    """Pages [WARPS] of each warp's first and other 16 keys of tile t; `where` is as in _score_tiles."""
    _, _, _, _, table, begin, last = where
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, _words_layout(WARPS))))
    entry = (begin + t * (32 * WARPS)) // PER_PAGE + warp * 32 // PER_PAGE
    first = gl.load(table + gl.minimum(entry, last)).to(gl.uint32).to(gl.uint64)
    if PER_PAGE == 16:
        return first, gl.load(table + gl.minimum(entry + 1, last)).to(gl.uint32).to(gl.uint64)
    else:
        return first, first


@gluon.jit
def _keys(where, pages, PER_PAGE: gl.constexpr, WARPS: gl.constexpr):
    """What a tile's keys are made of: words of each warp's first and other 16 keys, and codes."""
    words_ptr, units, codes_ptr, code_units, _, _, _ = where
    some = _words(words_ptr, pages[0], units, 0, PER_PAGE, WARPS)
    others = _words(words_ptr, pages[1], units, 16, PER_PAGE, WARPS)
    return some, others, _codes(codes_ptr, pages, code_units, PER_PAGE, WARPS)


@gluon.jit
def _words(words_ptr, page, units, PART: gl.constexpr, PER_PAGE: gl.constexpr, WARPS: gl.constexpr):
    """Words [WARPS, 16 keys, 16] of each warp's keys from the PART-th on."""
    L: gl.constexpr = _words_layout(WARPS)
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, L)))
    key = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, L)))
    word = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))
    place = gl.expand_dims(gl.expand_dims(key * 16, 0), 2) + gl.expand_dims(gl.expand_dims(word, 0), 1)
    start = page * units.to(gl.uint32).to(gl.uint64) * 4 + (warp * 32 + PART) % PER_PAGE * 16
    return gl.load(words_ptr + (gl.expand_dims(gl.expand_dims(start, 1), 2) + place))


@gluon.jit
def _codes(codes_ptr, pages, units, PER_PAGE: gl.constexpr, WARPS: gl.constexpr):
    """Codes [WARPS, 32 keys] of the scales of each warp's keys, four in a word."""
    L: gl.constexpr = _key_layout(WARPS)
    W: gl.constexpr = gl.SliceLayout(1, L)
    warp = gl.arange(0, WARPS, layout=W)[:, None]
    key = gl.arange(0, 32, layout=gl.SliceLayout(0, L))[None, :]
    page = gl.convert_layout(pages[0], W, assert_trivial=True)[:, None]
    if PER_PAGE == 16:
        page = gl.where(key < 16, page, gl.convert_layout(pages[1], W, assert_trivial=True)[:, None])
    return gl.load(codes_ptr + (page * units.to(gl.uint32).to(gl.uint64) * 4 + (warp * 32 + key) % PER_PAGE))


@gluon.jit
def _ask_ahead(where, page, PER_PAGE: gl.constexpr, WARPS: gl.constexpr):
    """What lies of each warp's keys in a page [WARPS], on its way into the L2."""
    words_ptr, units, codes_ptr, code_units, _, _, _ = where
    row = (gl.arange(0, WARPS, layout=page.type.layout) * 32) % PER_PAGE
    words = words_ptr.to(gl.uint64) + page * units.to(gl.uint32).to(gl.uint64) * 16 + row * 64
    codes = codes_ptr.to(gl.uint64) + page * code_units.to(gl.uint32).to(gl.uint64) * 16 + row * 4
    keys = gl.full_like(row, 32 if PER_PAGE > 32 else PER_PAGE)
    gl.inline_asm_elementwise(_AHEAD, "=r,l,l,r", [words, codes, keys], gl.int32, is_pure=False, pack=1)


@gluon.jit
def _tables(codes, WARPS: gl.constexpr):
    """Tables of the group that a thread expands, of each of its four keys, and the largest code of a thread's own key.

    Twice two tables [WARPS, 2 halves, 8 keys, 4 groups], of the first 16 keys and of the others."""
    quad = gl.arange(0, 32, layout=gl.SliceLayout(0, codes.type.layout))[None, :]
    group = gl.where(quad & 16 > 0, 1, 0) + gl.where(quad & 8 > 0, 2, 0)
    select, _ = gl.broadcast(group + 0x4440, codes)
    h0, h1, h2, h3, l0, l1, l2, l3, most = gl.inline_asm_elementwise(
        _TABLES, "=r,=r,=r,=r,=r,=r,=r,=r,=r,r,r", [codes, select], dtype=(gl.int32,) * 9, is_pure=False, pack=1
    )
    return _halves(h0, h1), _halves(l0, l1), _halves(h2, h3), _halves(l2, l3), most


@gluon.jit
def _halves(a, b):
    """[WARPS, 32], of which a thread's number in its quad counts groups, of two keys -> [WARPS, 2, 8, 4]."""
    x = gl.permute(gl.reshape(gl.join(a, b), [a.shape[0], 2, 2, 8, 2]), (0, 4, 3, 2, 1))
    return gl.reshape(x, [a.shape[0], 2, 8, 4])


@gluon.jit
def _expanded(words, high, low, WARPS: gl.constexpr, MMA: gl.constexpr):
    """Words [WARPS, 16, 16] by tables [WARPS, 2, 8, 4] -> the left operand e4m3 [16 WARPS, 128].

    Each key is over its largest scale times 2^5: exponents are lowered by the distance of a group's scale, by 10 at
    most. A thread has a group of 32 dims, so dims lie in the order of queries.made."""
    E: gl.constexpr = _expanded_layout(WARPS)
    L: gl.constexpr = gl.SliceLayout(4, gl.SliceLayout(5, E))
    any_ = gl.zeros([WARPS, 2, 8, 4, 4, 4], gl.int32, layout=E)
    x = gl.reshape(words, [WARPS, 2, 8, 4, 4])
    x, _ = gl.broadcast(gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(5, E), assert_trivial=True), 5), any_)
    high, _ = gl.broadcast(gl.expand_dims(gl.expand_dims(gl.convert_layout(high, L, assert_trivial=True), 4), 5), any_)
    low, _ = gl.broadcast(gl.expand_dims(gl.expand_dims(gl.convert_layout(low, L, assert_trivial=True), 4), 5), any_)
    a, b = gl.inline_asm_elementwise(
        _EXPAND,
        "=r,=r,r,r,r,r,r,r,r,r,r,r,r,r",
        [x, high, low],
        dtype=(gl.float8e4nv, gl.float8e4nv),
        is_pure=True,
        pack=4,
    )
    # warp, half of keys, key, group, word, place, half of a word
    slots = gl.reshape(gl.permute(gl.join(a, b), (0, 1, 2, 4, 6, 3, 5)), [16 * WARPS, 128])
    return gl.convert_layout(slots, gl.DotOperandLayout(0, MMA, 4), assert_trivial=True)


@gluon.jit
def _ready(row, heads, q_s, weights_s, ROUNDS: gl.constexpr, ROPE: gl.constexpr):
    """Queries of a row and its weights in shared memory."""
    q_ptr, cos_ptr, sin_ptr, weight_ptr = row
    h = gl.arange(0, 64, layout=gl.SliceLayout(1, query_layout()))
    weight = gl.load(weight_ptr + h, mask=h < heads, other=0.0)
    ready, power = made(q_ptr, cos_ptr, sin_ptr, heads, ROUNDS, ROPE, 2)
    q_s.store(ready)
    weights_s.store(weight * ((127 + power) << 23).to(gl.float32, bitcast=True))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _keep_tops(tops_ptr, order):
    """The highest of each 8 of ordered scores [WARPS, 32]."""
    top = gl.max(gl.reshape(order, [order.shape[0], 4, 8]), 2)
    T: gl.constexpr = top.type.layout
    place = gl.arange(0, top.shape[0], layout=gl.SliceLayout(1, T))[:, None] * 4
    place += gl.arange(0, 4, layout=gl.SliceLayout(0, T))[None, :]
    gl.store(tops_ptr + place, top, mask=top > -2147483648)


@gluon.jit
def _score_tiles(
    where, row, out_ptr, tops_ptr, heads, visible, tiles, q_s, weights_s,
    PER_PAGE: gl.constexpr, ROUNDS: gl.constexpr, ROPE: gl.constexpr, LEVELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Ordered scores of `tiles` tiles of a row, and their tops where they are needed.

    `row` is where its queries, angles and weights are. `where`: keys' words, units of 16 bytes between pages, codes and
    units between theirs, the row's page table, its first key that counts and the last entry of its table."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, 64, 32])
    L: gl.constexpr = _key_layout(WARPS)
    eight: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    some, others, codes = _keys(where, _pages(where, 0, PER_PAGE, WARPS), PER_PAGE, WARPS)
    pages = _pages(where, 1, PER_PAGE, WARPS)
    beyond = _pages(where, 2, PER_PAGE, WARPS)
    _ready(row, heads, q_s, weights_s, ROUNDS, ROPE)
    q = q_s._reinterpret(gl.float8e4nv, [64, 128], eight).permute((1, 0))
    w, power = columns_of(weights_s, WARPS)
    key = gl.arange(0, WARPS, layout=gl.SliceLayout(1, L))[:, None] * 32
    key += gl.arange(0, 32, layout=gl.SliceLayout(0, L))[None, :]
    x = gl.zeros([16 * WARPS, 64], gl.float16, layout=MMA)
    for t in range(tiles):
        at = where[5] + t * (32 * WARPS)
        _ask_ahead(where, beyond[0], PER_PAGE, WARPS)
        high, low, its_high, its_low, most = _tables(codes, WARPS)
        a = _expanded(some, high, low, WARPS, MMA)
        b = _expanded(others, its_high, its_low, WARPS, MMA)
        some, others, codes = _keys(where, pages, PER_PAGE, WARPS)  # of the next tile
        pages = beyond
        beyond = _pages(where, t + 3, PER_PAGE, WARPS)
        first = folded(warpgroup_mma(a, q, x, use_acc=False), w, WARPS)
        second = folded(warpgroup_mma(b, q, x, use_acc=False), w, WARPS)
        own = gl.reshape(gl.permute(picked(first, second, WARPS), (0, 3, 2, 1)), [WARPS, 32])
        factor = (gl.maximum(most + power - 5, 1) << 23).to(gl.float32, bitcast=True)
        seen = at + key < visible
        order = gl.where(seen, in_order(gl.convert_layout(own, L, assert_trivial=True), factor), -2147483648)
        gl.store(out_ptr + at + key, order, mask=seen)
        if LEVELS != 1:
            _keep_tops(tops_ptr + at // 8, order)


@gluon.jit(do_not_specialize=["table_row", "k"])  # which differs from step to step
def scores(
    q_ptr, q_row, cos_ptr, sin_ptr, weight_ptr, weight_row, words_ptr, units, codes_ptr, code_units, table_ptr,
    table_row, seq_ptr, visible_ptr, out_ptr, tops_ptr, done_ptr, chosen_ptr, scratch_ptr, scratch_row, total, heads, k,
    PER_PAGE: gl.constexpr, ROUNDS: gl.constexpr, ROPE: gl.constexpr, LEVELS: gl.constexpr, WIDE: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Ordered scores of a row, see triton.py, and with LEVELS > 0 the ids of its k highest.

    Pages begin `units` times 16 bytes after each other, their codes `code_units`."""
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
    tiles = gl.cdiv(gl.minimum(begin + stretch, visible) - begin, 32 * WARPS)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_s = gl.allocate_shared_memory(gl.uint8, [64, 128], gl.NVMMASharedLayout(128, 8))
    weights_s = gl.allocate_shared_memory(gl.float32, [64], flat)
    said_s = gl.allocate_shared_memory(gl.int32, [6, WARPS], flat)
    out_ptr += r * total
    tops_ptr += r * (total // 128 * 16)
    where = words_ptr, units, codes_ptr, code_units, table, begin, (visible - 1) // PER_PAGE
    turn = r * (ROPE // 2)
    row = q_ptr + r * q_row, cos_ptr + turn, sin_ptr + turn, weight_ptr + r * weight_row
    _score_tiles(
        where, row, out_ptr, tops_ptr, heads, visible, tiles, q_s, weights_s, PER_PAGE, ROUNDS, ROPE, LEVELS, WARPS
    )
    if LEVELS > 0:
        gl.thread_barrier()
        list_ptr = scratch_ptr + r * scratch_row
        if LEVELS > 2:
            mine = gl.cdiv(gl.minimum(begin + stretch, visible) - begin, 8)
            find_peaks(tops_ptr + begin // 8, list_ptr + (WIDE // 8 + begin // 64), mine, WARPS)
            gl.thread_barrier()
        parts = gl.cdiv(visible, stretch)
        end = parts == 1
        if parts > 1:
            end = gl.atomic_add(done_ptr + r, 1, sem="acq_rel") == parts - 1
        if end:
            gl.store(done_ptr + r, 0)
            narrowed(out_ptr, tops_ptr, visible, k, chosen_ptr + r * k, list_ptr, said_s, LEVELS, WIDE, WARPS)
