"""The router of few rows in one launch: scores, choice, the experts' lists, and the rows rounded for their products.

Programs of the first part hold some experts, rows and part of the columns. The last of those that share rows chooses
for them; the last of all writes the lists. Sums are in a fixed order. Counters are back at zero afterwards.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triptych.kernels.moe.affinity import affinity


@triton.jit(do_not_specialize=["rows", "tiles", "most"])
def route_rows(
    x_ptr,
    gate_ptr,
    bias_ptr,
    table_ptr,
    token_ptr,
    part_ptr,
    ids_ptr,
    weights_ptr,
    tile_ptr,
    order_ptr,
    xq_ptr,
    xs_ptr,
    count_ptr,
    rows,
    dim,
    experts,
    k,
    tiles,
    scaling,
    most,
    HASHED: tl.constexpr,
    EXPERTS: tl.constexpr,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
    SOME: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    SIXTEENS: tl.constexpr,
):
    """x [rows, dim]; part [SPLIT, rows, experts] float32 is scratch; out: ids int32 and weights [rows, k], tile
    [tiles, 3] int32 and order [rows * k] as in few.py, xq f16 on the e4m3 grid,
    paired as in fragments.py, and xs [rows, dim / 128]."""
    block = tl.program_id(1)
    r = block * BLOCK + tl.arange(0, BLOCK)
    parts = tl.cdiv(experts, SOME) * SPLIT
    if tl.program_id(0) >= parts:
        _round_rows(x_ptr, xq_ptr, xs_ptr, block * BLOCK, rows, (tl.program_id(0) - parts) * 4, dim, BLOCK)
    else:
        piece = tl.program_id(0) % SPLIT
        e = tl.program_id(0) // SPLIT * SOME + tl.arange(0, SOME)
        total = _logits(x_ptr, gate_ptr, r, e, rows, experts, dim, piece, SPLIT, BLOCK, SOME)
        place = part_ptr + (piece * rows + r[:, None]) * experts + e[None, :]
        tl.store(place, total, mask=(r < rows)[:, None] & (e < experts)[None, :])
        tl.debug_barrier()
        mine = count_ptr + 1 + block
        if tl.atomic_add(mine, 1, sem="acq_rel") == parts - 1:
            tl.store(mine, 0)
            for first in range(block * BLOCK, tl.minimum(block * BLOCK + BLOCK, rows), 4):
                four = first + tl.arange(0, 4)
                ids = _choose(
                    *(part_ptr, bias_ptr, table_ptr, token_ptr, ids_ptr, weights_ptr),
                    *(four, rows, experts, k, scaling, HASHED, EXPERTS, K, SPLIT, 4),
                )
                if SIXTEENS == 0:
                    _list_one(ids, four, tile_ptr, order_ptr, k, K)
            tl.debug_barrier()
            if SIXTEENS > 0 and tl.atomic_add(count_ptr, 1, sem="acq_rel") == tl.num_programs(1) - 1:
                tl.store(count_ptr, 0)
                _list(ids_ptr, tile_ptr, order_ptr, rows, experts, k, tiles, most, EXPERTS, K, PAIRS, SIXTEENS)


@triton.jit
def _logits(
    x_ptr, gate_ptr, r, e, rows, experts, dim, piece, SPLIT: tl.constexpr, BLOCK: tl.constexpr, SOME: tl.constexpr
):
    """Part `piece` of the logits of experts e for rows r."""
    width = dim // SPLIT
    d = tl.arange(0, 64)
    total = tl.zeros([BLOCK, SOME], tl.float32)
    for at in range(piece * width, piece * width + width, 64):
        x = tl.load(x_ptr + r[:, None] * dim + at + d[None, :], mask=(r < rows)[:, None], other=0.0).to(tl.float32)
        w = tl.load(gate_ptr + e[None, :] * dim + at + d[:, None], mask=(e < experts)[None, :], other=0.0)
        total = tl.dot(x, w, total, input_precision="tf32x3")
    return total


@triton.jit
def _round_rows(x_ptr, xq_ptr, xs_ptr, start, rows, group, dim, BLOCK: tl.constexpr):
    """Groups [group, group + 4) of 128 columns of BLOCK rows, four rows at a time."""
    g = group + tl.arange(0, 4)
    d = g[:, None] * 128 + tl.arange(0, 128)[None, :]
    for first in range(start, tl.minimum(start + BLOCK, rows), 4):
        r = first + tl.arange(0, 4)
        keep = (r < rows)[:, None, None] & (d < dim)[None, :, :]
        x = tl.load(x_ptr + r[:, None, None] * dim + d[None, :, :], mask=keep, other=0.0).to(tl.float32)
        bits = tl.maximum(tl.max(tl.abs(x), 2), 1e-4).to(tl.int32, bitcast=True)
        exponent = ((bits + 0x1FFFFF) >> 23) - 8  # the smallest power of two that 448 times reaches the largest
        inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        values = (x * inverse[:, :, None]).to(tl.float8e4nv).to(tl.float16)
        at = d // 8 * 8 + d % 4 * 2 + d // 4 % 2
        tl.store(xq_ptr + r[:, None, None] * dim + at[None, :, :], values, mask=keep)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
        keep_scale = (r < rows)[:, None] & (g * 128 < dim)[None, :]
        tl.store(xs_ptr + r[:, None] * (dim // 128) + g[None, :], scale, mask=keep_scale)


@triton.jit
def _choose(
    part_ptr,
    bias_ptr,
    table_ptr,
    token_ptr,
    ids_ptr,
    weights_ptr,
    r,
    rows,
    experts,
    k,
    scaling,
    HASHED: tl.constexpr,
    EXPERTS: tl.constexpr,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    e = tl.arange(0, EXPERTS)
    slot = tl.arange(0, K)
    here = (r < rows)[:, None]
    known = here & (e < experts)[None, :]
    logits = tl.zeros([BLOCK, EXPERTS], tl.float32)
    for piece in tl.static_range(SPLIT):
        at = part_ptr + (piece * rows + r[:, None]) * experts + e[None, :]
        logits += tl.load(at, mask=known, other=0.0, cache_modifier=".cg")
    score = affinity(logits)
    ids = tl.zeros([BLOCK, K], tl.int32)
    chosen = tl.zeros([BLOCK, K], tl.float32)
    left = score
    if HASHED:
        token = tl.load(token_ptr + r, mask=r < rows, other=0)
    else:
        left = score + tl.load(bias_ptr + e, mask=e < experts, other=0.0)[None, :]
    left = tl.where(known, left, float("-inf"))
    for i in range(k):
        if HASHED:
            best = tl.load(table_ptr + token * k + i, mask=r < rows, other=0).to(tl.int32)
        else:
            best = tl.minimum(tl.argmax(left, 1), experts - 1)  # where all are NaN any index may come back
        mine = e[None, :] == best[:, None]
        ids = tl.where(slot[None, :] == i, best[:, None], ids)
        value = tl.sum(tl.where(mine, score, 0.0), 1)
        chosen = tl.where(slot[None, :] == i, value[:, None], chosen)
        left = tl.where(mine, float("-inf"), left)
    weights = chosen * (scaling / (tl.sum(chosen, 1) + 1e-20))[:, None]
    keep = here & (slot < k)[None, :]
    tl.store(ids_ptr + r[:, None] * k + slot[None, :], ids, mask=keep)
    tl.store(weights_ptr + r[:, None] * k + slot[None, :], weights, mask=keep)
    return ids


@triton.jit
def _list_one(ids, r, tile_ptr, order_ptr, k, K: tl.constexpr):
    """The lists of a single row, whose experts are all different."""
    slot = tl.arange(0, K)
    mine = (r == 0)[:, None] & (slot < k)[None, :]
    at = slot[None, :] + 0 * r[:, None]
    tl.store(tile_ptr + at * 3, ids, mask=mine)
    tl.store(tile_ptr + at * 3 + 1, at, mask=mine)
    tl.store(tile_ptr + at * 3 + 2, 1, mask=mine)
    tl.store(order_ptr + at, at, mask=mine)


@triton.jit
def _list(
    ids_ptr,
    tile_ptr,
    order_ptr,
    rows,
    experts,
    k,
    tiles,
    most,
    EXPERTS: tl.constexpr,
    K: tl.constexpr,
    PAIRS: tl.constexpr,
    SIXTEENS: tl.constexpr,
):
    """Counting sort of the pairs by expert, 16 rows at a time, and tiles of up to PAIRS pairs of one expert.

    No expert has more than `most` tiles.
    """
    e = tl.arange(0, EXPERTS)
    slot = tl.arange(0, K)
    counts = tl.zeros([EXPERTS], tl.int32)
    for part in range(SIXTEENS):
        ids = _ids_of(ids_ptr, part, rows, k, slot)
        for i in range(k):
            counts += tl.sum((_column(ids, slot, i)[:, None] == e[None, :]).to(tl.int32), 0)
    starts = tl.cumsum(counts, 0) - counts
    pieces = (counts + PAIRS - 1) // PAIRS
    at = tl.cumsum(pieces, 0) - pieces
    for part in range(most):
        entry = tile_ptr + (at + part) * 3
        some = part < pieces
        tl.store(entry, e, mask=some)
        tl.store(entry + 1, starts + part * PAIRS, mask=some)
        tl.store(entry + 2, tl.minimum(counts - part * PAIRS, PAIRS), mask=some)
    used = tl.sum(pieces, 0)
    for first in range(0, tiles, EXPERTS):
        tl.store(tile_ptr + (first + e) * 3, -1, mask=(first + e >= used) & (first + e < tiles))
    for part in range(SIXTEENS):
        ids = _ids_of(ids_ptr, part, rows, k, slot)
        r = part * 16 + tl.arange(0, 16)
        pair = tl.zeros([16, EXPERTS], tl.int32) - 1
        for i in range(k):
            pair = tl.where(_column(ids, slot, i)[:, None] == e[None, :], (r * k + i)[:, None], pair)
        has = (pair >= 0).to(tl.int32)
        rank = tl.cumsum(has, 0) - has
        tl.store(order_ptr + starts[None, :] + rank, pair, mask=pair >= 0)
        starts += tl.sum(has, 0)


@triton.jit
def _ids_of(ids_ptr, part, rows, k, slot):
    r = part * 16 + tl.arange(0, 16)
    keep = (r < rows)[:, None] & (slot < k)[None, :]
    return tl.load(ids_ptr + r[:, None] * k + slot[None, :], mask=keep, other=-1, cache_modifier=".cg")


@triton.jit
def _column(ids, slot, i):
    return tl.sum(tl.where(slot[None, :] == i, ids, 0), 1)
