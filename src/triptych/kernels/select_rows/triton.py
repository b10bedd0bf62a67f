"""Selection of decode rows for NVIDIA GPUs, straight from packed or bfloat16 keys, in two launches.

    scores   programs of a row's stretch of keys: rotate and round its queries, multiply, weigh; write each score as an
             integer of the same order, and the highest of each 16 of them
    highest  a program per row: the k-th highest of those maxima is a lower bound of the k-th highest score, and the
             scores above it are little more than k. Among these the k-th is found bit by bit, exactly; of equals the
             lower ids are taken until k are there, which is the reference's rule

FP8 keys and queries meet in the FP8 tensor cores. Queries are e2m1 with a scale for each 32 dims, of which e4m3 has
room for differences of up to 2^14; likewise MXFP4 keys. Where a row has so many equal scores that the candidates do
not fit, its scores are searched instead: slower, and the same ids.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triptych.kernels.gpu import multiprocessors
from triptych.kernels.index.ref import PagedEntries
from triptych.kernels.quant.formats import PackedRows
from triptych.kernels.select_rows.ref import IndexQueries

_GROUP = 16  # scores that share a maximum
_TILE = 128  # keys of one product
_LISTED = 16384  # scores or maxima that the second launch holds in registers
INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Triton's interpreter multiplies in float32 only."""


def select_rows(queries: IndexQueries, keys: PagedEntries, topk: int) -> Tensor:
    """See ref.select_rows. `keys.most` must bound what any row sees."""
    assert keys.most is not None
    scores, tops = ordered_scores(queries, keys)
    return highest(scores, tops, keys.visible, topk)


def ordered_scores(queries: IndexQueries, keys: PagedEntries, stretch: int | None = None) -> tuple[Tensor, Tensor]:
    """Scores [B, T] as int32 that sort like the floats, and the highest of each 16; T = most, in whole tiles.

    What a row does not see is unspecified.
    """
    assert keys.most is not None
    rows, heads, dim = len(queries.heads), queries.count, queries.dim
    device = queries.heads.device
    total = triton.cdiv(max(keys.most, 1), _TILE) * _TILE
    scores = torch.empty(rows, total, dtype=torch.int32, device=device)
    tops = torch.empty(rows, total // _GROUP, dtype=torch.int32, device=device)
    if stretch is None:
        programs = max(1, 4 * multiprocessors(device) // rows)
        stretch = min(8192, triton.cdiv(triton.cdiv(total, programs), _TILE) * _TILE)
    raw = queries.heads[:, -heads * dim :]
    cos, sin = queries.angles
    pool = keys.pool
    kind = pool.format.kind if isinstance(pool, PackedRows) else "dense"
    if isinstance(pool, PackedRows):
        place = (pool.values, *pool.values.stride()[:2], pool.scales, *pool.scales.stride()[:2])
    else:
        place = (pool, *pool.stride()[:2], pool, 0, 0)
    _scores[(triton.cdiv(total, stretch), rows)](
        *(raw, raw.stride(0), cos, sin, queries.weights, queries.weights.stride(0)),
        *(*place, keys.page_table, keys.page_table.stride(0), keys.visible, scores, tops, total, heads, stretch),
        KIND=0 if kind == "dense" else 1 if kind == "fp8" else 2,
        ROUNDS=queries.rounds,
        WIDE=INTERPRETED or pool.dtype == torch.float32,
        PER_PAGE=pool.shape[1],
        HEADS=max(16, triton.next_power_of_2(heads)),
        DIM=dim,
        ROPE=2 * cos.shape[1],
        TILE=_TILE,
        num_warps=4,
        num_stages=4 if kind == "fp8" else 3,
    )
    return scores, tops


def highest(scores: Tensor, tops: Tensor, visible: Tensor, k: int) -> Tensor:
    """Ids [B, k] int32, ascending, -1 behind, of the k highest of the first visible[r] ordered scores of each row."""
    rows, total = scores.shape
    out = torch.empty(rows, k, dtype=torch.int32, device=scores.device)
    room = max(1024, 4 * triton.next_power_of_2(k))
    groups = max(1024, 2 * triton.next_power_of_2(k))
    scratch = torch.empty(rows, 2 * room + groups, dtype=torch.int32, device=scores.device)
    listed = min(_LISTED, max(1024, triton.next_power_of_2(total)))
    while triton.cdiv(total, _GROUP) > listed:
        listed *= 2
    _highest[(rows,)](
        *(scores, tops, visible, out, scratch, total, k),
        GROUP=_GROUP,
        LISTED=listed,
        GROUPS=groups,
        ROOM=room,
        num_warps=4 if listed <= 2048 else 16,
    )
    return out


@triton.jit
def _round_even(x):
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _rounded_e2m1(x, HEADS: tl.constexpr, DIM: tl.constexpr):
    """x [HEADS, DIM] on the e2m1 grid, groups of 32: values divided by 2^(p_max - 6) and p_max [HEADS].

    2^p is a group's scale, p_max the largest of a row; so values are at most 6 * 2^6.
    """
    g = tl.reshape(x, [HEADS, DIM // 32, 32])
    bits = tl.max(tl.abs(g), 2).to(tl.int32, bitcast=True)
    power = (bits >> 23) - 129 + ((bits & 0x7FFFFF) > 0x400000).to(tl.int32)
    power = tl.maximum(power, -100)
    inverse = ((127 - power) << 23).to(tl.float32, bitcast=True)
    y = g * inverse[:, :, None]
    size = tl.abs(y)
    step = tl.where(size < 2.0, 0.5, tl.where(size < 4.0, 1.0, 2.0))
    y = _round_even(y / step) * step
    most = tl.max(power, 1)
    shift = tl.maximum(power - most[:, None] + 6, -100)
    y = y * ((127 + shift) << 23).to(tl.float32, bitcast=True)[:, :, None]
    return tl.reshape(y, [HEADS, DIM]), most


@triton.jit
def _queries(
    q_ptr,
    cos_ptr,
    sin_ptr,
    h,
    heads,
    ROUNDS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROPE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Queries of a row [HEADS, DIM] in float32 and the power of two [HEADS] that they lack."""
    d = tl.arange(0, DIM)
    mine = (h < heads)[:, None] & (d < DIM)[None, :]
    here = q_ptr + h[:, None] * DIM
    x = tl.load(here + d[None, :], mask=mine, other=0.0).to(tl.float32)
    at = d - (DIM - ROPE)
    turns = at >= 0
    partner = tl.load(here + tl.where(turns, (DIM - ROPE) + (at ^ 1), d)[None, :], mask=mine, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + at // 2, mask=turns, other=1.0)[None, :]
    sin = tl.load(sin_ptr + at // 2, mask=turns, other=0.0)[None, :]
    x = x * cos + tl.where((at % 2 == 0)[None, :], -partner, partner) * sin
    power = tl.full([HEADS], 0, tl.int32)
    if ROUNDS:
        i = d[:, None] & d[None, :]
        i = i ^ (i >> 4)
        i = i ^ (i >> 2)
        i = i ^ (i >> 1)
        kind: tl.constexpr = tl.float32 if WIDE else tl.bfloat16
        signs = (1 - 2 * (i & 1)).to(kind)
        x = tl.dot(x.to(tl.bfloat16).to(kind), signs, input_precision="ieee")
        x = (x * (DIM**-0.5)).to(tl.bfloat16).to(tl.float32)
        x, power = _rounded_e2m1(x, HEADS, DIM)
        power -= 6
    return x, power


@triton.jit
def _scores(
    q_ptr,
    q_row,
    cos_ptr,
    sin_ptr,
    weight_ptr,
    weight_row,
    pool_ptr,
    pool_page,
    pool_row,
    scales_ptr,
    scales_page,
    scales_row,
    table_ptr,
    table_row,
    visible_ptr,
    out_ptr,
    tops_ptr,
    total,
    heads,
    stretch,
    KIND: tl.constexpr,
    ROUNDS: tl.constexpr,
    WIDE: tl.constexpr,
    PER_PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROPE: tl.constexpr,
    TILE: tl.constexpr,
):
    r = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(0) * stretch
    visible = tl.load(visible_ptr + r).to(tl.int32)
    if begin >= visible:
        return
    h = tl.arange(0, HEADS)
    turn = r * (ROPE // 2)
    x, power = _queries(q_ptr + r * q_row, cos_ptr + turn, sin_ptr + turn, h, heads, ROUNDS, HEADS, DIM, ROPE, WIDE)
    weight = tl.load(weight_ptr + r * weight_row + h, mask=h < heads, other=0.0).to(tl.float32)
    weight = weight * ((127 + power) << 23).to(tl.float32, bitcast=True)
    eighth: tl.constexpr = (KIND != 0) and ROUNDS and not WIDE
    kind: tl.constexpr = tl.float32 if WIDE else tl.float8e4nv if eighth else tl.bfloat16
    q = x.to(kind)
    d = tl.arange(0, DIM)
    for at in range(begin, tl.minimum(begin + stretch, visible), TILE):
        g = at + tl.arange(0, TILE)
        seen = g < visible
        page = tl.load(table_ptr + r * table_row + g // PER_PAGE, mask=seen, other=0).to(tl.int64)
        row = g % PER_PAGE
        place = pool_ptr + page * pool_page + row * pool_row
        scales = scales_ptr + page * scales_page + row * scales_row
        factor = tl.full([TILE], 1.0, tl.float32)
        if KIND == 1:
            place = tl.multiple_of(place, 16)
            k = tl.load(place[:, None] + d[None, :], mask=seen[:, None], other=0)
            k = k.to(tl.float8e4nv, bitcast=True).to(kind)
            scales = tl.multiple_of(scales, 4)
            factor = tl.load(scales.to(tl.pointer_type(tl.float32), bitcast=True), mask=seen, other=0.0)
        elif KIND == 2:
            half = tl.arange(0, DIM // 2)
            pairs = tl.load(tl.multiple_of(place, 16)[:, None] + half[None, :], mask=seen[:, None], other=0)
            word = tl.load(tl.multiple_of(scales, 4).to(tl.pointer_type(tl.int32), bitcast=True), mask=seen, other=0)
            n = tl.arange(0, DIM // 32) * 8
            codes = (word[:, None] >> n[None, :]) & 255
            most = tl.max(codes, 1)
            factor = (tl.maximum(most - 6, 1) << 23).to(tl.float32, bitcast=True)
            relative = ((tl.maximum(codes - most[:, None], -100) + 133) << 23).to(tl.float32, bitcast=True)
            both = tl.reshape(tl.join(pairs & 15, pairs >> 4), [TILE, DIM]).to(tl.int32)
            # the bits of a magnitude, at the top of float32's mantissa and the foot of its exponent, lack 2^126
            size = (((both & 7) << 22) | ((both & 8) << 28)).to(tl.float32, bitcast=True) * 8.507059173023462e37
            k = tl.reshape(size, [TILE, DIM // 32, 32]) * relative[:, :, None]
            k = tl.reshape(k, [TILE, DIM]).to(kind)
        else:
            k = tl.load(place[:, None] + d[None, :], mask=seen[:, None], other=0.0).to(kind)
        s = tl.dot(k, tl.trans(q), input_precision="tf32x3") if WIDE else tl.dot(k, tl.trans(q))
        s = tl.sum(tl.maximum(s, 0.0) * weight[None, :], 1) * factor
        bits = tl.where(s == 0.0, 0.0, s).to(tl.int32, bitcast=True)
        order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        order = tl.where(seen, order, -2147483648)
        tl.store(out_ptr + r * total + g, order)
        top = tl.max(tl.reshape(order, [TILE // 16, 16]), 1)
        tl.store(tops_ptr + r * (total // 16) + at // 16 + tl.arange(0, TILE // 16), top)


@triton.jit
def _kth(x, extra_ptr, extra, n, k, least, low: tl.constexpr, ROOM: tl.constexpr):
    """`least` with its bits from 31 (or from 15 if `low`) down set where k of x, and of the rest, are not below it.

    The rest are the tiles 1 .. extra of scores [n] at extra_ptr, for rows whose candidates do not fit.
    """
    i = tl.arange(0, ROOM)
    for step in range(low, 32):
        trial = least + (tl.full([], 1, tl.int32) << (31 - step))
        count = tl.sum((x >= trial).to(tl.int32), 0)
        for tile in range(1, extra):
            g = tile * ROOM + i
            more = tl.load(extra_ptr + g, mask=g < n, other=-2147483648)
            count += tl.sum(((more >= trial) & (g < n)).to(tl.int32), 0)
        least = tl.where(count >= k, trial, least)
    return least


@triton.jit
def _highest(
    scores_ptr,
    tops_ptr,
    visible_ptr,
    out_ptr,
    scratch_ptr,
    total,
    k,
    GROUP: tl.constexpr,
    LISTED: tl.constexpr,
    GROUPS: tl.constexpr,
    ROOM: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    n = tl.load(visible_ptr + r).to(tl.int32)
    scores_ptr += r * total
    out_ptr += r * k
    scratch_ptr += r * (2 * ROOM + GROUPS)
    lowest = tl.full([], -2147483648, tl.int32)
    if n <= k:
        for at in range(0, k, ROOM):
            i = at + tl.arange(0, ROOM)
            tl.store(out_ptr + i, tl.where(i < n, i, -1), mask=i < k)
        return

    # a lower bound of the k-th highest in 16 bits, from all scores or from the highest of each group
    grouped = n > LISTED
    m = tl.where(grouped, tl.cdiv(n, GROUP), n)
    source = scores_ptr
    if grouped:
        source = tops_ptr + r * (total // GROUP)
    i = tl.arange(0, LISTED)
    x = tl.load(source + i, mask=i < m, other=-2147483648)
    bound = lowest
    one = tl.full([], 1, tl.int32)
    for bit in range(16):
        trial = bound + (one << (31 - bit))
        bound = tl.where(tl.sum((x >= trial).to(tl.int32), 0) >= k, trial, bound)
    above = ((x >= bound) & (i < m)).to(tl.int32)
    place = tl.cumsum(above, 0) - above
    found = tl.sum(above, 0)
    fits = found <= ROOM
    if grouped:
        fits = found <= GROUPS
        list_ptr = scratch_ptr + 2 * ROOM
        tl.store(list_ptr + place, i, mask=(above > 0) & (place < GROUPS))
        tl.debug_barrier()
        j = tl.arange(0, GROUPS)
        group = tl.load(list_ptr + j, mask=j < found, other=0)
        g = tl.reshape(group[:, None] * GROUP + tl.arange(0, GROUP)[None, :], [GROUPS * GROUP])
        there = tl.reshape(tl.broadcast_to((j < found)[:, None], [GROUPS, GROUP]), [GROUPS * GROUP]) & (g < n)
        y = tl.load(scores_ptr + g, mask=there, other=-2147483648)
        among = (there & (y >= bound)).to(tl.int32)
        at = tl.cumsum(among, 0) - among
        tl.store(scratch_ptr + at, y, mask=(among > 0) & (at < ROOM))
        tl.store(scratch_ptr + ROOM + at, g, mask=(among > 0) & (at < ROOM))
        found = tl.sum(among, 0)
        fits = fits & (found <= ROOM)
    else:
        tl.store(scratch_ptr + place, x, mask=(above > 0) & (place < ROOM))
        tl.store(scratch_ptr + ROOM + place, i, mask=(above > 0) & (place < ROOM))
    tl.debug_barrier()

    # the k-th highest among the candidates, or among all scores where they do not fit
    c = tl.arange(0, ROOM)
    tiles = 1
    if fits:
        z = tl.load(scratch_ptr + c, mask=c < found, other=-2147483648)
    else:
        tiles = tl.cdiv(n, ROOM)
        found = n
        z = tl.load(scores_ptr + c, mask=c < n, other=-2147483648)
    least = _kth(z, scores_ptr, tiles, n, k, lowest, 0, ROOM)
    higher = tl.sum((z > least).to(tl.int32), 0)
    for tile in range(1, tiles):
        t = tile * ROOM + c
        higher += tl.sum((tl.load(scores_ptr + t, mask=t < n, other=-2147483648) > least).to(tl.int32), 0)
    equal = k - higher
    start = tl.full([], 0, tl.int32)
    for tile in range(0, tiles):
        t = tile * ROOM + c
        inside = t < found
        ids = t
        if fits:
            ids = tl.load(scratch_ptr + ROOM + c, mask=inside, other=0)
        else:
            z = tl.load(scores_ptr + t, mask=inside, other=-2147483648)
        ties = ((z == least) & inside).to(tl.int32)
        rank = tl.cumsum(ties, 0) - ties
        taken = (inside & ((z > least) | ((ties > 0) & (rank < equal)))).to(tl.int32)
        put = start + tl.cumsum(taken, 0) - taken
        tl.store(out_ptr + put, ids, mask=(taken > 0) & (put < k))
        start += tl.sum(taken, 0)
        equal -= tl.minimum(tl.sum(ties, 0), equal)
