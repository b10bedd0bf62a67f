"""The router of few rows in one launch: scores, choice, the experts' lists, and the rows rounded for their products.

Programs of the first part hold some experts, rows and part of the columns. The last of those that share rows chooses
for them; the last of all writes the lists. Sums are in a fixed order. Counters are back at zero afterwards.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triptych.kernels.moe.affinity import affinity


@triton.jit
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
    HASHED: tl.constexpr,
    EXPERTS: tl.constexpr,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
    SOME: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """x [rows, dim]; part [SPLIT, rows, experts] float32 is scratch; out: ids int32 and weights [rows, k], tile
    [tiles, 3] int32 and order [rows * k] as in few.py, xq f16 on the e4m3 grid and xs [rows, dim / 128]."""
    block = tl.program_id(1)
    r = block * BLOCK + tl.arange(0, BLOCK)
    there = r < rows
    if tl.program_id(0) == tl.num_programs(0) - 1:
        _round_rows(x_ptr, xq_ptr, xs_ptr, r, there, dim)
    else:
        piece = tl.program_id(0) % SPLIT
        e = tl.program_id(0) // SPLIT * SOME + tl.arange(0, SOME)
        width = dim // SPLIT
        d = tl.arange(0, 128)
        total = tl.zeros([BLOCK, SOME], tl.float32)
        for at in range(piece * width, piece * width + width, 128):
            x = tl.load(x_ptr + r[:, None] * dim + at + d[None, :], mask=there[:, None], other=0.0).to(tl.float32)
            w = tl.load(gate_ptr + e[None, :] * dim + at + d[:, None], mask=(e < experts)[None, :], other=0.0)
            total = tl.dot(x, w, total, input_precision="tf32x3")
        place = part_ptr + (piece * rows + r[:, None]) * experts + e[None, :]
        tl.store(place, total, mask=there[:, None] & (e < experts)[None, :])
        tl.debug_barrier()
        mine = count_ptr + 1 + block
        if tl.atomic_add(mine, 1, sem="acq_rel") == tl.num_programs(0) - 2:
            tl.store(mine, 0)
            _choose(
                *(part_ptr, bias_ptr, table_ptr, token_ptr, ids_ptr, weights_ptr),
                *(r, rows, experts, k, scaling, HASHED, EXPERTS, K, SPLIT, BLOCK),
            )
            tl.debug_barrier()
            if tl.atomic_add(count_ptr, 1, sem="acq_rel") == tl.num_programs(1) - 1:
                tl.store(count_ptr, 0)
                _list(ids_ptr, tile_ptr, order_ptr, rows, experts, k, tiles, EXPERTS, PAIRS, PARTS)


@triton.jit
def _round_rows(x_ptr, xq_ptr, xs_ptr, r, there, dim):
    d = tl.arange(0, 128)
    for at in range(0, dim, 128):
        x = tl.load(x_ptr + r[:, None] * dim + at + d[None, :], mask=there[:, None], other=0.0).to(tl.float32)
        bits = tl.maximum(tl.max(tl.abs(x), 1), 1e-4).to(tl.int32, bitcast=True)
        exponent = ((bits + 0x1FFFFF) >> 23) - 8  # the smallest power of two that 448 times reaches the largest
        inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        values = (x * inverse[:, None]).to(tl.float8e4nv).to(tl.float16)
        tl.store(xq_ptr + r[:, None] * dim + at + d[None, :], values, mask=there[:, None])
        tl.store(xs_ptr + r * (dim // 128) + at // 128, (exponent << 23).to(tl.float32, bitcast=True), mask=there)


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
    for piece in range(SPLIT):
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


@triton.jit
def _list(
    ids_ptr,
    tile_ptr,
    order_ptr,
    rows,
    experts,
    k,
    tiles,
    EXPERTS: tl.constexpr,
    PAIRS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Counting sort of the pairs by expert, 16 rows at a time, and tiles of up to PAIRS pairs of one expert."""
    e = tl.arange(0, EXPERTS)
    sixteen = tl.arange(0, 16)
    counts = tl.zeros([EXPERTS], tl.int32)
    for first in range(0, rows, 16):
        r = first + sixteen
        for i in range(k):
            mine = tl.load(ids_ptr + r * k + i, mask=r < rows, other=-1, cache_modifier=".cg")
            counts += tl.sum((mine[:, None] == e[None, :]).to(tl.int32), 0)
    starts = tl.cumsum(counts, 0) - counts
    pieces = (counts + PAIRS - 1) // PAIRS
    at = tl.cumsum(pieces, 0) - pieces
    for part in range(PARTS):
        entry = tile_ptr + (at + part) * 3
        some = part < pieces
        tl.store(entry, e, mask=some)
        tl.store(entry + 1, starts + part * PAIRS, mask=some)
        tl.store(entry + 2, tl.minimum(counts - part * PAIRS, PAIRS), mask=some)
    used = tl.sum(pieces, 0)
    for first in range(0, tiles, EXPERTS):
        tl.store(tile_ptr + (first + e) * 3, -1, mask=(first + e >= used) & (first + e < tiles))
    for first in range(0, rows, 16):
        r = first + sixteen
        pair = tl.zeros([16, EXPERTS], tl.int32) - 1
        for i in range(k):
            mine = tl.load(ids_ptr + r * k + i, mask=r < rows, other=-1, cache_modifier=".cg")
            pair = tl.where(mine[:, None] == e[None, :], (r * k + i)[:, None], pair)
        has = (pair >= 0).to(tl.int32)
        rank = tl.cumsum(has, 0) - has
        tl.store(order_ptr + starts[None, :] + rank, pair, mask=pair >= 0)
        starts += tl.sum(has, 0)
