"""Routing and experts for NVIDIA GPUs.

Experts are a grouped product: the (row, expert) pairs sorted by expert, cut into tiles of pairs of one expert.

    pairs   e0 e0 e0 | e2 | e5 e5 e5 e5 e5 | ...        tile ends  [1, 1, 2, 2, 2, 4, ...]   for tiles of 4 pairs

A program finds its expert by counting tile ends, so the host need not know how many tiles there are: it launches as
many as there can be. Two launches: W13 with SwiGLU and the pair's weight, then W2; each row's pairs are then summed in
their order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from triptych.kernels.linear.triton import linear
from triptych.kernels.moe import ref
from triptych.kernels.moe.affinity import affinity
from triptych.kernels.moe.ref import Experts, Rounding, Router
from triptych.kernels.moe.rows import moe_rows_on_gpu
from triptych.kernels.moe.sorted import experts_on_gpu
from triptych.kernels.quant.matrices import Matrix, Mxfp4Matrix


class _Pairs(NamedTuple):
    """Pairs sorted by expert: order [P], and per expert the end of its pairs and of its tiles [E]; most tiles."""

    order: Tensor
    ends: Tensor
    tile_ends: Tensor
    tiles: int


def route(x: Tensor, token_ids: Tensor, router: Router) -> tuple[Tensor, Tensor]:
    """See ref.route."""
    logits = _logits(x, router.gate)
    rows, count = logits.shape
    k = router.experts_per_token
    ids = torch.empty(rows, k, dtype=torch.int64, device=x.device)
    weights = torch.empty(rows, k, device=x.device)
    hashed = router.tid2eid is not None
    _route[(rows,)](
        *(logits, router.bias if router.bias is not None else logits, router.tid2eid if hashed else ids, token_ids),
        *(ids, weights, count, k, router.scaling),
        HASHED=hashed,
        EXPERTS=triton.next_power_of_2(count),
        K=triton.next_power_of_2(k),
        num_warps=1 if count <= 512 else 4,
    )
    return ids, weights


def _logits(x: Tensor, gate: Tensor) -> Tensor:
    """x gate^T in float32. Three bf16 numbers are a float32, and their products with bf16 rows are exact."""
    if not x.is_cuda or x.dtype != torch.bfloat16:
        return linear(x.float(), gate.float())
    high = gate.to(torch.bfloat16)
    rest = gate.float() - high
    middle = rest.to(torch.bfloat16)
    low = (rest - middle).to(torch.bfloat16)
    total = torch.mm(x, low.T, out_dtype=torch.float32)
    total += torch.mm(x, middle.T, out_dtype=torch.float32)
    return total.add_(torch.mm(x, high.T, out_dtype=torch.float32))


def experts(x: Tensor, ids: Tensor, weights: Tensor, moe: Experts, rounding: Rounding | None = None) -> Tensor:
    """See ref.experts."""
    if isinstance(moe.w13, Mxfp4Matrix):
        # the reference waits for the GPU; released models have no such size
        if x.is_cuda and rounding is not None and not moe.w2.shape[1] % 256 and not moe.w2.shape[2] % 256:
            return experts_on_gpu(x, ids, weights, moe)
        return ref.experts(x, ids, weights, moe, rounding)
    rows, k = ids.shape
    count, dim, inner = moe.w2.shape
    tile = 16 if rows * k <= 16 * count else 64
    pairs = _sorted_pairs(ids, count, tile)
    hidden = torch.empty(rows * k, inner, device=x.device)
    narrow = moe.w13.dtype == torch.bfloat16
    shape = dict(PAIRS=tile, BLOCK=64, DEPTH=64, NARROW=narrow, num_warps=4, num_stages=3 if narrow else 2)
    experts_width = triton.next_power_of_2(count)
    x = x.contiguous()
    _up[(pairs.tiles, triton.cdiv(inner, 64))](
        *(x, moe.w13, weights.contiguous(), hidden, *pairs[:3], count, k, dim, inner, moe.limit),
        EXPERTS=experts_width,
        **shape,
    )
    if rounding is not None:
        hidden = rounding(hidden)
    each = torch.empty(rows * k, dim, device=x.device)
    _down[(pairs.tiles, triton.cdiv(dim, 64))](
        *(hidden, moe.w2, each, *pairs[:3], count, inner, dim), EXPERTS=experts_width, **shape
    )
    return each.view(rows, k, dim).sum(1).to(x.dtype)


def moe_rows(x: Tensor, token_ids: Tensor, router: Router, moe: Experts, shared: tuple[Matrix, Matrix]) -> Tensor:
    """See ref.moe_rows. Weights as released on an NVIDIA GPU take three launches."""
    if x.is_cuda and isinstance(moe.w13, Mxfp4Matrix):
        return moe_rows_on_gpu(x, token_ids, router, moe, shared)
    return ref.moe_rows(x, token_ids, router, moe, shared)


def shared_expert(x: Tensor, w13: Matrix, w2: Matrix, limit: float, rounding: Rounding | None = None) -> Tensor:
    """See ref.shared_expert."""
    gate_up = linear(x, w13)
    rows, inner = len(x), w2.shape[1]
    hidden = torch.empty(rows, inner, dtype=x.dtype, device=x.device)
    _swiglu[(rows, triton.cdiv(inner, 1024))](gate_up, hidden, inner, limit, BLOCK=1024)
    return linear(hidden if rounding is None else rounding(hidden), w2)


def _sorted_pairs(ids: Tensor, count: int, tile: int) -> _Pairs:
    flat, order = torch.sort(ids.flatten(), stable=True)
    ends = torch.searchsorted(flat, torch.arange(count, device=ids.device), right=True)
    sizes = torch.diff(ends, prepend=ends.new_zeros(1))
    tile_ends = torch.cumsum((sizes + tile - 1) // tile, 0)
    return _Pairs(order, ends, tile_ends, min(len(flat), len(flat) // tile + count))


@triton.jit
def _route(
    logits_ptr,
    bias_ptr,
    table_ptr,
    token_ptr,
    ids_ptr,
    weights_ptr,
    count,
    k,
    scaling,
    HASHED: tl.constexpr,
    EXPERTS: tl.constexpr,
    K: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, EXPERTS)
    slot = tl.arange(0, K)
    x = tl.load(logits_ptr + r * count + e, mask=e < count, other=0.0)
    score = affinity(x)
    chosen = tl.zeros([K], tl.float32)
    ids = tl.zeros([K], tl.int64)
    if HASHED:
        line = table_ptr + tl.load(token_ptr + r) * k
        ids = tl.load(line + slot, mask=slot < k, other=0)
        picked = tl.load(logits_ptr + r * count + ids, mask=slot < k, other=0.0)
        chosen = tl.where(slot < k, affinity(picked), 0.0)
    else:
        left = score + tl.load(bias_ptr + e, mask=e < count, other=0.0)
        left = tl.where(e < count, left, float("-inf"))
        for i in range(k):
            best = tl.minimum(tl.argmax(left, 0), count - 1)  # where all are NaN any index may come back
            ids = tl.where(slot == i, best.to(tl.int64), ids)
            chosen = tl.where(slot == i, tl.sum(tl.where(e == best, score, 0.0), 0), chosen)
            left = tl.where(e == best, float("-inf"), left)
    weights = chosen * (scaling / (tl.sum(chosen, 0) + 1e-20))
    tl.store(ids_ptr + r * k + slot, ids, mask=slot < k)
    tl.store(weights_ptr + r * k + slot, weights, mask=slot < k)


@triton.jit
def _tile_of(ends_ptr, tile_ends_ptr, count, PAIRS: tl.constexpr, EXPERTS: tl.constexpr):
    """Expert of this program's tile (count if there is none) and its places in the sorted pairs, with validity."""
    at = tl.program_id(0)
    e = tl.arange(0, EXPERTS)
    tile_ends = tl.load(tile_ends_ptr + e, mask=e < count, other=1 << 60)
    expert = tl.sum(((tile_ends <= at) & (e < count)).to(tl.int32), 0)
    before = tl.maximum(tl.max(tl.where(tile_ends <= at, tile_ends, 0), 0), 0)
    known = expert < count
    end = tl.load(ends_ptr + expert, mask=known, other=0)
    start = tl.load(ends_ptr + expert - 1, mask=known & (expert > 0), other=0)
    place = start + (at - before) * PAIRS + tl.arange(0, PAIRS)
    return expert.to(tl.int64), place, place < end


@triton.jit
def _dot(a, b, acc, NARROW: tl.constexpr):
    if NARROW:
        return tl.dot(a.to(tl.bfloat16), b, acc)
    else:
        return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def _up(
    x_ptr,
    w13_ptr,
    weights_ptr,
    hidden_ptr,
    order_ptr,
    ends_ptr,
    tile_ends_ptr,
    count,
    k,
    dim,
    inner,
    limit,
    EXPERTS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    NARROW: tl.constexpr,
):
    expert, place, valid = _tile_of(ends_ptr, tile_ends_ptr, count, PAIRS, EXPERTS)
    if expert < count:
        pair = tl.load(order_ptr + place, mask=valid, other=0)
        n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        d = tl.arange(0, DEPTH)
        rows_ptr = x_ptr + (pair // k)[:, None] * dim + d[None, :]
        gate_ptr = w13_ptr + expert * 2 * inner * dim + n[None, :] * dim + d[:, None]
        gate = tl.zeros([PAIRS, BLOCK], tl.float32)
        up = tl.zeros([PAIRS, BLOCK], tl.float32)
        for at in range(0, dim, DEPTH):
            deep = at + d < dim
            x = tl.load(rows_ptr + at, mask=valid[:, None] & deep[None, :], other=0.0)
            mine = (n < inner)[None, :] & deep[:, None]
            gate = _dot(x, tl.load(gate_ptr + at, mask=mine, other=0.0), gate, NARROW)
            up = _dot(x, tl.load(gate_ptr + at + inner * dim, mask=mine, other=0.0), up, NARROW)
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        y = gate * tl.sigmoid(gate) * up * tl.load(weights_ptr + pair, mask=valid, other=0.0)[:, None]
        tl.store(hidden_ptr + pair[:, None] * inner + n[None, :], y, mask=valid[:, None] & (n < inner)[None, :])


@triton.jit
def _down(
    hidden_ptr,
    w2_ptr,
    out_ptr,
    order_ptr,
    ends_ptr,
    tile_ends_ptr,
    count,
    inner,
    dim,
    EXPERTS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    NARROW: tl.constexpr,
):
    expert, place, valid = _tile_of(ends_ptr, tile_ends_ptr, count, PAIRS, EXPERTS)
    if expert < count:
        pair = tl.load(order_ptr + place, mask=valid, other=0)
        n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        d = tl.arange(0, DEPTH)
        rows_ptr = hidden_ptr + pair[:, None] * inner + d[None, :]
        down_ptr = w2_ptr + expert * dim * inner + n[None, :] * inner + d[:, None]
        y = tl.zeros([PAIRS, BLOCK], tl.float32)
        for at in range(0, inner, DEPTH):
            deep = at + d < inner
            h = tl.load(rows_ptr + at, mask=valid[:, None] & deep[None, :], other=0.0)
            y = _dot(h, tl.load(down_ptr + at, mask=(n < dim)[None, :] & deep[:, None], other=0.0), y, NARROW)
        tl.store(out_ptr + pair[:, None] * dim + n[None, :], y, mask=valid[:, None] & (n < dim)[None, :])


@triton.jit
def _swiglu(gate_up_ptr, out_ptr, inner, limit, BLOCK: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up_ptr + r * 2 * inner + n, mask=n < inner).to(tl.float32)
    up = tl.load(gate_up_ptr + r * 2 * inner + inner + n, mask=n < inner).to(tl.float32)
    gate = tl.where(gate > limit, limit, gate)
    up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    tl.store(out_ptr + r * inner + n, gate * tl.sigmoid(gate) * up, mask=n < inner)
