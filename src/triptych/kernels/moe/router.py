"""The router of few rows in two launches: shares of the logits and rounded rows; then choice and the experts' lists.

Programs of the first hold some experts, rows and part of the columns, or round rows. Those of the second hold a row;
the last of them writes the lists. Sums are in a fixed order. Counters are back at zero afterwards.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triptych.kernels.moe.affinity import affinity
from triptych.kernels.moe.ref import Router
from triptych.kernels.quant.e4m3 import scale_of

_FEW = 64
"""Rows up to which weights are most of what is read; of more, larger tiles read rows and weights less often."""


def route_few(
    x: Tensor, token_ids: Tensor, router: Router, n: int, tiles: int, counters: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Routes some rows x [rows, dim] bfloat16; `counters` int32 [1 + experts] are zero before and after.

    Returns weights [rows, k] float32; lists of the (row, choice) pairs by expert in tiles of up to `n`, see
    choose_rows; and the rows on the e4m3 grid with their scales, see score_rows.
    """
    rows, dim = x.shape
    experts, k = router.gate.shape[0], router.experts_per_token
    split = 8 if rows <= 32 or rows > _FEW else 4
    while dim % (split * 128):
        split //= 2
    dev = x.device
    part = torch.empty(split, rows, experts, dtype=torch.float32, device=dev)
    ids, ranks = torch.empty(2, rows, k, dtype=torch.int32, device=dev)
    starts = torch.empty(experts, dtype=torch.int32, device=dev)
    weights = torch.empty(rows, k, dtype=torch.float32, device=dev)
    tile = torch.empty(tiles, 3, dtype=torch.int32, device=dev)
    order = torch.empty(rows * k, dtype=torch.int32, device=dev)
    xq = torch.empty(rows, dim, dtype=torch.float16, device=dev)
    xs = torch.empty(rows, dim // 128, dtype=torch.float32, device=dev)
    hashed = router.tid2eid is not None
    some = 16 if rows <= _FEW else 64
    score_rows[(triton.cdiv(experts, some) * split + triton.cdiv(dim, 512), triton.cdiv(rows, some))](
        *(x, router.gate, part, xq, xs, rows, dim, experts),
        SPLIT=split,
        SOME=some,
        BLOCK=some,
        num_warps=8,
        num_stages=4 if some == 16 else 2,
        maxnreg=128,  # two programs on a multiprocessor: otherwise they run in two waves
    )
    choose_rows[(rows,)](
        *(part, router.bias if router.bias is not None else part, router.tid2eid if hashed else ids, token_ids),
        *(ids, ranks, weights, tile, order, starts, counters, rows, experts, k, tiles, router.scaling),
        HASHED=hashed,
        EXPERTS=triton.next_power_of_2(experts),
        K=triton.next_power_of_2(k),
        SPLIT=split,
        PAIRS=n,
        num_warps=1,
    )
    return weights, tile, order, xq, xs


@triton.jit(do_not_specialize=["rows"])
def score_rows(
    x_ptr, gate_ptr, part_ptr, xq_ptr, xs_ptr, rows, dim, experts,
    SPLIT: tl.constexpr, SOME: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """x [rows, dim] -> part [SPLIT, rows, experts] float32, shares of the logits; xq f16 on the e4m3 grid, paired as in
    fragments.py, and xs [rows, dim / 128]."""
    block = tl.program_id(1)
    r = block * BLOCK + tl.arange(0, BLOCK)
    parts = tl.cdiv(experts, SOME) * SPLIT
    piece = tl.program_id(0) % SPLIT
    e = tl.program_id(0) // SPLIT * SOME + tl.arange(0, SOME)
    if tl.program_id(0) >= parts:
        _round_rows(x_ptr, xq_ptr, xs_ptr, block * BLOCK, rows, (tl.program_id(0) - parts) * 4, dim, BLOCK)
    else:
        total = _logits(x_ptr, gate_ptr, r, e, rows, experts, dim, piece, SPLIT, BLOCK, SOME)
        place = part_ptr + (piece * rows + r[:, None]) * experts + e[None, :]
        tl.store(place, total, mask=(r < rows)[:, None] & (e < experts)[None, :])


@triton.jit(do_not_specialize=["rows", "tiles"])
def choose_rows(
    part_ptr, bias_ptr, table_ptr, token_ptr, ids_ptr, ranks_ptr, weights_ptr, tile_ptr, order_ptr, starts_ptr,
    count_ptr, rows, experts, k, tiles, scaling,
    HASHED: tl.constexpr, EXPERTS: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr, PAIRS: tl.constexpr
):  # fmt: skip
    """A row each: its experts' ids int32 and weights [rows, k]. The last program writes the lists that few.py reads:
    tile [tiles, 3] int32 and order [rows * k]. ranks [rows, k] and starts [experts] are scratch; count [1 + experts].

    One warp a row: nothing waits for other warps. Where a pair stands among those of its expert depends on who came
    first, and no result on that: its products are its own, and a row's are added in the order of its choices.
    """
    r = tl.program_id(0)
    slot = tl.arange(0, K)
    ids = _choose(
        part_ptr, bias_ptr, table_ptr, token_ptr, ids_ptr, weights_ptr, r, rows, experts, k, scaling,
        HASHED, EXPERTS, K, SPLIT,
    )  # fmt: skip
    if tl.num_programs(0) == 1:
        tl.store(tile_ptr + slot * 3, ids, mask=slot < k)  # a single row's experts are all different
        tl.store(tile_ptr + slot * 3 + 1, slot, mask=slot < k)
        tl.store(tile_ptr + slot * 3 + 2, 1, mask=slot < k)
        tl.store(order_ptr + slot, slot, mask=slot < k)
    else:
        rank = tl.atomic_add(count_ptr + 1 + ids, 1, mask=slot < k, sem="relaxed")
        tl.store(ranks_ptr + r * k + slot, rank, mask=slot < k)
        tl.debug_barrier()
        if tl.atomic_add(count_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
            _list(
                ids_ptr, ranks_ptr, tile_ptr, order_ptr, starts_ptr, count_ptr, rows * k, experts, tiles, EXPERTS, PAIRS
            )
            tl.store(count_ptr, 0)


@triton.jit
def _logits(
    x_ptr, gate_ptr, r, e, rows, experts, dim, piece, SPLIT: tl.constexpr, BLOCK: tl.constexpr, SOME: tl.constexpr
):
    """Part `piece` of the logits of experts e for rows r.

    Larger tiles take weights as three bf16 numbers, which are a float32 and whose products with bf16 are exact.
    """
    width = dim // SPLIT
    d = tl.arange(0, 64)
    total = tl.zeros([BLOCK, SOME], tl.float32)
    for at in range(piece * width, piece * width + width, 64):
        x = tl.load(x_ptr + r[:, None] * dim + at + d[None, :], mask=(r < rows)[:, None], other=0.0)
        w = tl.load(gate_ptr + e[None, :] * dim + at + d[:, None], mask=(e < experts)[None, :], other=0.0)
        if SOME < 64 or x.dtype != tl.bfloat16:
            total = tl.dot(x.to(tl.float32), w, total, input_precision="tf32x3")
        else:
            high = w.to(tl.bfloat16)
            rest = w - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            total = tl.dot(x, low, total)
            total = tl.dot(x, middle, total)
            total = tl.dot(x, high, total)
    return total


@triton.jit
def _round_rows(x_ptr, xq_ptr, xs_ptr, start, rows, group, dim, BLOCK: tl.constexpr):
    """Groups [group, group + 4) of 128 columns of BLOCK rows, a few rows at a time."""
    SOME: tl.constexpr = 4 if BLOCK < 64 else 8
    g = group + tl.arange(0, 4)
    d = g[:, None] * 128 + tl.arange(0, 128)[None, :]
    for first in range(start, tl.minimum(start + BLOCK, rows), SOME):
        r = first + tl.arange(0, SOME)
        keep = (r < rows)[:, None, None] & (d < dim)[None, :, :]
        x = tl.load(x_ptr + r[:, None, None] * dim + d[None, :, :], mask=keep, other=0.0).to(tl.float32)
        scale, inverse = scale_of(tl.max(tl.abs(x), 2))
        values = (x * inverse[:, :, None]).to(tl.float8e4nv).to(tl.float16)
        at = d // 8 * 8 + d % 4 * 2 + d // 4 % 2
        tl.store(xq_ptr + r[:, None, None] * dim + at[None, :, :], values, mask=keep)
        keep_scale = (r < rows)[:, None] & (g * 128 < dim)[None, :]
        tl.store(xs_ptr + r[:, None] * (dim // 128) + g[None, :], scale, mask=keep_scale)


@triton.jit
def _choose(
    part_ptr, bias_ptr, table_ptr, token_ptr, ids_ptr, weights_ptr, r, rows, experts, k, scaling,
    HASHED: tl.constexpr, EXPERTS: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Ids [K] of row r's experts; stores them and their weights."""
    e = tl.arange(0, EXPERTS)
    slot = tl.arange(0, K)
    known = e < experts
    logits = tl.zeros([EXPERTS], tl.float32)
    for piece in tl.static_range(SPLIT):
        at = part_ptr + (piece * rows + r) * experts + e
        logits += tl.load(at, mask=known, other=0.0)
    score = affinity(logits)
    ids = tl.zeros([K], tl.int32)
    chosen = tl.zeros([K], tl.float32)
    left = score
    if HASHED:
        table_ptr += tl.load(token_ptr + r) * k
    else:
        left = score + tl.load(bias_ptr + e, mask=known, other=0.0)
    left = tl.where(known, left, float("-inf"))
    for i in range(k):
        if HASHED:  # noqa: SIM108  (a branch that the compiler resolves)
            best = tl.load(table_ptr + i).to(tl.int32)
        else:
            best = tl.minimum(tl.argmax(left, 0), experts - 1)  # where all are NaN any index may come back
        ids = tl.where(slot == i, best, ids)
        chosen = tl.where(slot == i, tl.sum(tl.where(e == best, score, 0.0), 0), chosen)
        left = tl.where(e == best, float("-inf"), left)
    weights = chosen * (scaling / (tl.sum(chosen, 0) + 1e-20))
    tl.store(ids_ptr + r * k + slot, ids, mask=slot < k)
    tl.store(weights_ptr + r * k + slot, weights, mask=slot < k)
    return ids


@triton.jit
def _list(
    ids_ptr, ranks_ptr, tile_ptr, order_ptr, starts_ptr, count_ptr, pairs, experts, tiles,
    EXPERTS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Pairs in the order of their experts, and tiles of up to PAIRS pairs of one expert; counts back to zero."""
    e = tl.arange(0, EXPERTS)
    known = e < experts
    counts = tl.load(count_ptr + 1 + e, mask=known, other=0, cache_modifier=".cg")
    tl.store(count_ptr + 1 + e, 0, mask=known)
    starts = tl.cumsum(counts, 0) - counts
    tl.store(starts_ptr + e, starts, mask=known)
    pieces = (counts + PAIRS - 1) // PAIRS
    at = tl.cumsum(pieces, 0) - pieces
    for part in range(tl.max(pieces, 0)):
        entry = tile_ptr + (at + part) * 3
        some = part < pieces
        tl.store(entry, e, mask=some)
        tl.store(entry + 1, starts + part * PAIRS, mask=some)
        tl.store(entry + 2, tl.minimum(counts - part * PAIRS, PAIRS), mask=some)
    used = tl.sum(pieces, 0)
    for first in range(0, tiles, EXPERTS):
        tl.store(tile_ptr + (first + e) * 3, -1, mask=(first + e >= used) & (first + e < tiles))
    tl.debug_barrier()  # starts are read by other threads
    for first in range(0, pairs, EXPERTS):
        p = first + e
        ids = tl.load(ids_ptr + p, mask=p < pairs, other=0, cache_modifier=".cg")
        rank = tl.load(ranks_ptr + p, mask=p < pairs, other=0, cache_modifier=".cg")
        tl.store(order_ptr + tl.load(starts_ptr + ids, mask=p < pairs, other=0) + rank, p, mask=p < pairs)
