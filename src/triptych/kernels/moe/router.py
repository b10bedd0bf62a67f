"""The router of few rows: shares of the logits and rounded rows, then choice and the experts' lists.

A program has 64 experts, up to 64 rows and 128 columns, all read at once. A gate of float32 is three bf16 numbers, and
the products of those with bf16 rows are exact. Other programs of the launch round rows. In a second launch each row has
a program that chooses, and the last of them writes the lists: one program would take longer for two rows than a launch.
Sums are in a fixed order. Counters are back at zero afterwards.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triptych.kernels.moe.affinity import affinity
from triptych.kernels.moe.ref import Router
from triptych.kernels.quant.e4m3 import scale_of
from triptych.kernels.quant.matrices import Fp8Rows

_SOME = 64  # experts of a program
_DEPTH = 128  # and columns


def route_few(
    x: Tensor, token_ids: Tensor, router: Router, n: int, tiles: int, counters: Tensor
) -> tuple[Tensor, Tensor, Tensor, Fp8Rows]:
    """Routes some rows x [rows, dim] bfloat16; `counters` int32 [1 + experts] are zero before and after.

    Returns weights [rows, k] float32; lists of the (row, choice) pairs by expert in tiles of up to `n`, see
    choose_rows; and the rows rounded to e4m3, as matrices.quantize_rows does.
    """
    rows, dim = x.shape
    experts, k = router.gate.shape[0], router.experts_per_token
    split = dim // _DEPTH
    dev = x.device
    part = torch.empty(split, rows, experts, dtype=torch.float32, device=dev)
    weights = torch.empty(rows, k, dtype=torch.float32, device=dev)
    tile = torch.empty(tiles, 3, dtype=torch.int32, device=dev)
    order = torch.empty(experts, rows * k, dtype=torch.int32, device=dev)
    values = torch.empty(rows, dim, dtype=torch.float8_e4m3fn, device=dev)
    scales = torch.empty(dim // 128, rows, dtype=torch.float32, device=dev)
    tall = max(16, min(64, triton.next_power_of_2(rows)))
    parts = triton.cdiv(experts, _SOME) * split * triton.cdiv(rows, tall)
    score_rows[(parts + triton.cdiv(dim, 512) * triton.cdiv(rows, 16),)](
        *(x, router.gate, values, scales, part, rows, parts, dim),
        COUNT=experts,
        SPLIT=split,
        DEPTH=_DEPTH,
        SOME=_SOME,
        BLOCK=tall,
        num_warps=4,
    )
    hashed = router.tid2eid is not None
    choose_rows[(rows,)](
        *(part, router.bias if router.bias is not None else part, router.tid2eid if hashed else token_ids, token_ids),
        *(weights, tile, order, counters, rows, tiles, router.scaling),
        HASHED=hashed,
        COUNT=experts,
        EXPERTS=triton.next_power_of_2(experts),
        TOPK=k,
        SPLIT=split,
        PAIRS=n,
        num_warps=1,
    )
    return weights, tile, order, Fp8Rows(values, scales.T)


@triton.jit(do_not_specialize=["rows", "parts"])
def score_rows(
    x_ptr, gate_ptr, values_ptr, scales_ptr, part_ptr, rows, parts, dim,
    COUNT: tl.constexpr, SPLIT: tl.constexpr, DEPTH: tl.constexpr, SOME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x [rows, dim] -> part [SPLIT, rows, COUNT] float32, shares of the logits, by `parts` programs; values e4m3 [rows,
    dim] and scales [dim / 128, rows] by the others."""
    at = tl.program_id(0)
    if at >= parts:
        columns = tl.cdiv(dim, 512)
        _round_rows(x_ptr, values_ptr, scales_ptr, (at - parts) // columns * 16, (at - parts) % columns * 4, rows, dim)
    else:
        piece = at % SPLIT
        e = at // SPLIT % tl.cdiv(COUNT, SOME) * SOME + tl.arange(0, SOME)
        r = at // (SPLIT * tl.cdiv(COUNT, SOME)) * BLOCK + tl.arange(0, BLOCK)
        total = _logits(x_ptr, gate_ptr, r, e, rows, COUNT, dim, piece * DEPTH + tl.arange(0, DEPTH))
        place = part_ptr + (piece * rows + r[None, :]) * COUNT + e[:, None]
        tl.store(place, total, mask=(r < rows)[None, :] & (e < COUNT)[:, None])


@triton.jit(do_not_specialize=["rows", "tiles"])
def choose_rows(
    part_ptr, bias_ptr, table_ptr, token_ptr, weights_ptr, tile_ptr, order_ptr, count_ptr, rows, tiles, scaling,
    HASHED: tl.constexpr, COUNT: tl.constexpr, EXPERTS: tl.constexpr, TOPK: tl.constexpr, SPLIT: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """A row each: its experts' weights [rows, TOPK] and its pairs in the lists that few.py reads. Those are order
    [COUNT, rows * TOPK] int32, the pairs of each expert, and tile [tiles, 3] int32 of pieces of them, which the last
    program writes. count [1 + COUNT]. There is room for a row of NaN to choose the same expert again and again.

    One warp a row: nothing waits for other warps. Where a pair stands among those of its expert depends on who came
    first, and no result on that: its products are its own, and a row's are added in the order of its choices.
    """
    _choose(
        part_ptr, bias_ptr, table_ptr, token_ptr, weights_ptr, tile_ptr, order_ptr, count_ptr, tl.program_id(0), rows,
        scaling, HASHED, COUNT, EXPERTS, TOPK, SPLIT,
    )  # fmt: skip
    tl.debug_barrier()
    if tl.atomic_add(count_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        _cut(tile_ptr, count_ptr, rows * TOPK, tiles, COUNT, EXPERTS, PAIRS)
        tl.store(count_ptr, 0)


@triton.jit
def _logits(x_ptr, gate_ptr, r, e, rows, count, dim, d):
    """Products [experts, rows] of columns d."""
    w = tl.load(gate_ptr + e[:, None] * dim + d[None, :], mask=(e < count)[:, None], other=0.0).to(tl.float32)
    return _exact_products(w, tl.load(x_ptr + r[:, None] * dim + d[None, :], mask=(r < rows)[:, None], other=0.0))


@triton.jit
def _exact_products(w, x):
    """w [experts, columns] float32 times x [rows, columns] of bf16 values: [experts, rows]."""
    x = tl.trans(x.to(tl.bfloat16))
    high = _first_bits(w)
    middle = _first_bits(w - high)
    low = w - high - middle
    total = tl.dot(middle.to(tl.bfloat16), x, tl.dot(low.to(tl.bfloat16), x))
    return tl.dot(high.to(tl.bfloat16), x, total)


@triton.jit
def _first_bits(x):
    """x cut off to what bf16 holds."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _round_rows(x_ptr, values_ptr, scales_ptr, row, group, rows, dim):
    """Groups [group, group + 4) of 128 columns of 16 rows to e4m3 and power-of-two scales."""
    r = row + tl.arange(0, 16)[:, None, None]
    g = group + tl.arange(0, 4)[None, :, None]
    at = r * dim + g * 128 + tl.arange(0, 128)[None, None, :]
    keep = (r < rows) & (g * 128 < dim)
    x = tl.load(x_ptr + at, mask=keep, other=0.0).to(tl.float32)
    scale, inverse = scale_of(tl.max(tl.abs(x), 2, keep_dims=True))
    tl.store(values_ptr + at, (x * inverse).to(tl.float8e4nv), mask=keep)
    tl.store(scales_ptr + g * rows + r, scale, mask=keep)


@triton.jit
def _choose(
    part_ptr, bias_ptr, table_ptr, token_ptr, weights_ptr, tile_ptr, order_ptr, count_ptr, r, rows, scaling,
    HASHED: tl.constexpr, COUNT: tl.constexpr, EXPERTS: tl.constexpr, TOPK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Experts and weights of row r, and its pairs among those of each."""
    K: tl.constexpr = triton.next_power_of_2(TOPK)
    e = tl.arange(0, EXPERTS)
    slot = tl.arange(0, K)
    logits = tl.zeros([EXPERTS], tl.float32)
    for piece in tl.static_range(SPLIT):
        at = part_ptr + (piece * rows + r) * COUNT + e
        logits += tl.load(at, mask=e < COUNT, other=0.0, cache_modifier=".cg")
    score = affinity(logits)
    keep = slot < TOPK
    ids = tl.zeros([K], tl.int32)
    if HASHED:
        ids = tl.load(table_ptr + tl.load(token_ptr + r) * TOPK + slot, mask=keep, other=0).to(tl.int32)
    else:
        left = score + tl.load(bias_ptr + e, mask=e < COUNT, other=0.0)
        left = tl.where(e < COUNT, left, float("-inf"))
        for i in tl.static_range(TOPK):
            best = tl.minimum(tl.argmax(left, 0), COUNT - 1)  # where all are NaN any index may come back
            ids = tl.where(slot == i, best, ids)
            left = tl.where(e == best, float("-inf"), left)
    chosen = tl.where(keep, tl.gather(score, ids, 0), 0.0)
    weights = chosen * (scaling / (tl.sum(chosen, 0) + 1e-20))
    tl.store(weights_ptr + r * TOPK + slot, weights, mask=keep)
    rank = tl.atomic_add(count_ptr + 1 + ids, 1, mask=keep, sem="relaxed")
    tl.store(order_ptr + ids * (rows * TOPK) + rank, r * TOPK + slot, mask=keep)


@triton.jit
def _cut(tile_ptr, count_ptr, room, tiles, COUNT: tl.constexpr, EXPERTS: tl.constexpr, PAIRS: tl.constexpr):
    """Tiles of up to PAIRS pairs of one expert, which has `room` for its pairs; -1 where there is none.
    Counts go back to zero."""
    e = tl.arange(0, EXPERTS)
    counts = tl.load(count_ptr + 1 + e, mask=e < COUNT, other=0, cache_modifier=".cg")
    tl.store(count_ptr + 1 + e, 0, mask=e < COUNT)
    pieces = (counts + PAIRS - 1) // PAIRS
    at = tl.cumsum(pieces, 0) - pieces
    for part in range(tl.max(pieces, 0)):
        entry = tile_ptr + (at + part) * 3
        some = part < pieces
        tl.store(entry, e, mask=some)
        tl.store(entry + 1, e * room + part * PAIRS, mask=some)
        tl.store(entry + 2, tl.minimum(counts - part * PAIRS, PAIRS), mask=some)
    used = tl.sum(pieces, 0)
    for first in range(0, tiles, EXPERTS):
        tl.store(tile_ptr + (first + e) * 3, -1, mask=(first + e >= used) & (first + e < tiles))
