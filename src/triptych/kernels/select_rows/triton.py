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

import importlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from triptych.kernels.gpu import is_hopper, multiprocessors
from triptych.kernels.index.ref import PagedEntries
from triptych.kernels.quant.formats import PackedRows, Rows
from triptych.kernels.select_rows.ref import IndexQueries

_GROUP = 16  # scores that share a maximum, and members that a group of the selection has at most
_TILE = 128  # keys of one product
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
        programs = max(1, 3 * multiprocessors(device) // rows)
        stretch = min(2048, triton.cdiv(triton.cdiv(total, programs), _TILE) * _TILE)
    raw = queries.heads[:, -heads * dim :]
    cos, sin = queries.angles
    pool = keys.pool
    if _on_hopper(queries, pool):
        _hopper_scores(raw, queries, keys, scores, tops, stretch)
        return scores, tops
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


def _on_hopper(queries: IndexQueries, pool: Rows) -> bool:
    """Whether hopper.py can serve: packed keys of the released models' size, and queries that e4m3 holds."""
    fits = isinstance(pool, PackedRows) and queries.rounds and queries.dim == 128 and queries.count <= 64
    return fits and not INTERPRETED and is_hopper(queries.heads.device)


def _hopper_scores(
    raw: Tensor, queries: IndexQueries, keys: PagedEntries, scores: Tensor, tops: Tensor, stretch: int
) -> None:
    """ordered_scores in two launches: the queries of all rows, then scores."""
    rows, heads, dim = len(raw), queries.count, queries.dim
    cos, sin = queries.angles
    q = torch.empty(rows, heads, dim, dtype=torch.uint8, device=raw.device)
    power = torch.empty(rows, heads, dtype=torch.int32, device=raw.device)
    _prepare[(rows, triton.cdiv(heads, 16))](
        *(raw, raw.stride(0), cos, sin, q, power, heads),
        ROUNDS=True,
        HEADS=16,
        DIM=dim,
        ROPE=2 * cos.shape[1],
        num_warps=4,
    )
    stream_scores(q, power, queries.weights, keys, scores, tops, stretch)


def stream_scores(
    q: Tensor, power: Tensor, weights: Tensor, keys: PagedEntries, scores: Tensor, tops: Tensor, stretch: int
) -> None:
    """Ordered scores of e4m3 queries [B, Hi, 128] that lack 2^power [B, Hi], by hopper.py."""
    pool = keys.pool
    assert isinstance(pool, PackedRows)
    total = scores.shape[1]
    launch = importlib.import_module("triptych.kernels.select_rows.hopper").scores
    launch[(triton.cdiv(total, stretch), len(q))](
        *(q, power, weights, weights.stride(0), pool.values, *pool.values.stride()[:2]),
        *(pool.scales, *pool.scales.stride()[:2], keys.page_table, keys.page_table.stride(0), keys.visible),
        *(scores, tops, total, q.shape[1], stretch),
        KIND=1 if pool.format.kind == "fp8" else 2,
        PER_PAGE=pool.shape[1],
        STAGES=4,
        num_warps=4,
    )


def highest(scores: Tensor, tops: Tensor, visible: Tensor, k: int) -> Tensor:
    """Ids [B, k] int32, ascending, -1 behind, of the k highest of the first visible[r] ordered scores of each row."""
    rows, total = scores.shape
    out = torch.empty(rows, k, dtype=torch.int32, device=scores.device)
    wide = triton.next_power_of_2(k)
    listed = 4 * wide  # groups searched at once; all steps in which groups grow leave at least k of them
    while total > 64 * listed:
        listed *= 2
    room = 4 * wide
    scratch = torch.empty(rows, 2 * room + 4 * wide, dtype=torch.int32, device=scores.device)
    _highest[(rows,)](
        *(scores, tops, visible, out, scratch, total, k),
        GROUPED=total > listed,
        LISTED=listed,
        GROUPS=2 * wide,
        ROOM=room,
        num_warps=16 if total > listed else 8,
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
def _prepare(
    q_ptr,
    q_row,
    cos_ptr,
    sin_ptr,
    out_ptr,
    power_ptr,
    heads,
    ROUNDS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROPE: tl.constexpr,
):
    """Queries of a row as e4m3 that lack a power of two a head."""
    r = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    turn = r * (ROPE // 2)
    x, power = _queries(
        q_ptr + r * q_row, cos_ptr + turn, sin_ptr + turn, h, heads, ROUNDS, HEADS, DIM, ROPE, False
    )
    d = tl.arange(0, DIM)
    out = out_ptr + (r * heads + h)[:, None] * DIM + d[None, :]
    tl.store(out, x.to(tl.float8e4nv).to(tl.uint8, bitcast=True), mask=(h < heads)[:, None])
    tl.store(power_ptr + r * heads + h, power, mask=h < heads)


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
def _add3(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _pair(x, low, high):
    """How many of x are not below `low`, and 2^16 times how many are not below `high`."""
    return (x >= low).to(tl.int32) + ((x >= high).to(tl.int32) << 16)


@triton.jit
def _kth(x, k, STEPS: tl.constexpr):
    """The k-th highest of x [< 2^15]: its two top bits, then three at a time; the bits after STEPS are 0."""
    least = tl.full([], -2147483648, tl.int32)
    for n in range(STEPS):
        step = tl.full([], 1, tl.int32) << (30 - 3 * n)
        counts = tl.reduce(
            (
                _pair(x, least + step, least + 2 * step),
                _pair(x, least + 3 * step, least + 4 * step),
                _pair(x, least + 5 * step, least + 6 * step),
                (x >= least + 7 * step).to(tl.int32),
            ),
            0,
            _add3,
        )
        digit = ((counts[0] & 0xFFFF) >= k).to(tl.int32) + ((counts[0] >> 16) >= k).to(tl.int32)
        digit += ((counts[1] & 0xFFFF) >= k).to(tl.int32)
        if n > 0:
            digit += ((counts[1] >> 16) >= k).to(tl.int32) + ((counts[2] & 0xFFFF) >= k).to(tl.int32)
            digit += ((counts[2] >> 16) >= k).to(tl.int32) + (counts[3] >= k).to(tl.int32)
        least += digit * step
    return least


@triton.jit
def _kth_of_all(scores_ptr, n, k, ROOM: tl.constexpr):
    """The k-th highest of scores [n] in memory, bit by bit: for rows whose candidates do not fit."""
    i = tl.arange(0, ROOM)
    least = tl.full([], -2147483648, tl.int32)
    for bit in range(32):
        trial = least + (tl.full([], 1, tl.int32) << (31 - bit))
        count = tl.full([], 0, tl.int32)
        for at in range(0, n, ROOM):
            x = tl.load(scores_ptr + at + i, mask=at + i < n, other=-2147483648)
            count += tl.sum(((x >= trial) & (at + i < n)).to(tl.int32), 0)
        least = tl.where(count >= k, trial, least)
    return least


@triton.jit
def _expand(source_ptr, list_ptr, found, n, bound, put_ptr, value_ptr, MEMBERS: tl.constexpr, GROUPS: tl.constexpr, ROOM: tl.constexpr, members):  # fmt: skip
    """Members of the `found` groups listed at list_ptr, of `members` (<= MEMBERS) each, that are not below `bound`.

    Their numbers go to put_ptr in order, their values to value_ptr; returns how many there are, of which ROOM fit.
    """
    i = tl.arange(0, GROUPS * MEMBERS)
    group = i // MEMBERS
    member = i % MEMBERS
    there = (group < found) & (member < members)
    at = tl.load(list_ptr + group, mask=there, other=0) * members + member
    there = there & (at < n)
    x = tl.load(source_ptr + at, mask=there, other=-2147483648)
    among = (there & (x >= bound)).to(tl.int32)
    place = tl.cumsum(among, 0) - among
    fits = (among > 0) & (place < ROOM)
    tl.store(put_ptr + place, at, mask=fits)
    tl.store(value_ptr + place, x, mask=fits)
    return tl.sum(among, 0)


@triton.jit
def _group_tops(scores_ptr, tops_ptr, i, n, size):
    """The highest of each group i of `size` scores (1, 4, 16 or 64) of the first n."""
    low = tl.full([], -2147483648, tl.int32)
    source = scores_ptr
    many = n
    if size >= 16:
        source = tops_ptr
        many = tl.cdiv(n, 16)
    if (size == 1) | (size == 16):
        x = tl.load(source + i, mask=i < many, other=low)
    else:
        x = tl.load(source + 4 * i, mask=4 * i < many, other=low)
        for j in tl.static_range(1, 4):
            x = tl.maximum(x, tl.load(source + 4 * i + j, mask=4 * i + j < many, other=low))
    return x


@triton.jit
def _highest(
    scores_ptr,
    tops_ptr,
    visible_ptr,
    out_ptr,
    scratch_ptr,
    total,
    k,
    GROUPED: tl.constexpr,
    LISTED: tl.constexpr,
    GROUPS: tl.constexpr,
    ROOM: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    n = tl.load(visible_ptr + r).to(tl.int32)
    scores_ptr += r * total
    tops_ptr += r * (total // 16)
    out_ptr += r * k
    lowest = tl.full([], -2147483648, tl.int32)
    if n <= k:
        for first in range(0, k, ROOM):
            j = first + tl.arange(0, ROOM)
            tl.store(out_ptr + j, tl.where(j < n, j, -1), mask=j < k)
        return

    i = tl.arange(0, LISTED)
    if n <= LISTED:
        x = tl.load(scores_ptr + i, mask=i < n, other=lowest)
        least = _kth(x, k, 11)
        _write(x, i, i < n, least, k, out_ptr)
    elif GROUPED:
        # a lower bound of the k-th highest in 17 bits, from the highest of each group
        scratch_ptr += r * (2 * ROOM + 2 * GROUPS)
        list_ptr = scratch_ptr + 2 * ROOM
        size = tl.where(n <= 4 * LISTED, 4, tl.where(n <= 16 * LISTED, 16, 64))
        x = _group_tops(scores_ptr, tops_ptr, i, n, size)
        bound = _kth(x, k, 6)
        above = ((x >= bound) & (i < tl.cdiv(n, size))).to(tl.int32)
        place = tl.cumsum(above, 0) - above
        found = tl.sum(above, 0)
        fits = found <= GROUPS
        tl.store(list_ptr + place, i, mask=(above > 0) & (place < GROUPS))
        tl.debug_barrier()
        if size == 64:
            found = _expand(
                tops_ptr, list_ptr, tl.minimum(found, GROUPS), tl.cdiv(n, 16), bound,
                list_ptr + GROUPS, scratch_ptr, 4, GROUPS, GROUPS, 4,
            )  # fmt: skip
            fits = fits & (found <= GROUPS)
            list_ptr += GROUPS
            tl.debug_barrier()
        found = _expand(
            scores_ptr, list_ptr, tl.minimum(found, GROUPS), n, bound,
            scratch_ptr + ROOM, scratch_ptr, 16, GROUPS, ROOM, tl.minimum(size, 16),
        )  # fmt: skip
        tl.debug_barrier()
        if fits & (found <= ROOM):
            c = tl.arange(0, ROOM)
            z = tl.load(scratch_ptr + c, mask=c < found, other=lowest)
            ids = tl.load(scratch_ptr + ROOM + c, mask=c < found, other=0)
            least = _kth(z, k, 11)
            _write(z, ids, c < found, least, k, out_ptr)
        else:
            least = _kth_of_all(scores_ptr, n, k, ROOM)
            _write_all(scores_ptr, n, least, k, out_ptr, ROOM)


@triton.jit
def _write(x, ids, there, least, k, out_ptr):
    """The ids of those above `least`, and of as many equal to it as are missing, the first ones, in order."""
    higher = (there & (x > least)).to(tl.int32)
    ties = (there & (x == least)).to(tl.int32)
    wanted = k - tl.sum(higher, 0)
    both = tl.cumsum(higher | (ties << 16), 0)
    rank = (both >> 16) - ties
    place = (both & 0xFFFF) - higher + tl.minimum(rank, wanted)
    taken = (higher > 0) | ((ties > 0) & (rank < wanted))
    tl.store(out_ptr + place, ids, mask=taken & (place < k))


@triton.jit
def _write_all(scores_ptr, n, least, k, out_ptr, ROOM: tl.constexpr):
    """_write for scores [n] in memory."""
    i = tl.arange(0, ROOM)
    wanted = k
    for at in range(0, n, ROOM):
        x = tl.load(scores_ptr + at + i, mask=at + i < n, other=-2147483648)
        wanted -= tl.sum(((x > least) & (at + i < n)).to(tl.int32), 0)
    start = tl.full([], 0, tl.int32)
    for at in range(0, n, ROOM):
        there = at + i < n
        x = tl.load(scores_ptr + at + i, mask=there, other=-2147483648)
        ties = (there & (x == least)).to(tl.int32)
        rank = tl.cumsum(ties, 0) - ties
        taken = (there & ((x > least) | ((ties > 0) & (rank < wanted)))).to(tl.int32)
        place = start + tl.cumsum(taken, 0) - taken
        tl.store(out_ptr + place, at + i, mask=(taken > 0) & (place < k))
        start += tl.sum(taken, 0)
        wanted -= tl.minimum(tl.sum(ties, 0), wanted)
