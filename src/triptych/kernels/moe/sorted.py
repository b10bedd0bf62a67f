"""Experts of many rows from released weights: pairs sorted by expert, rounded, multiplied (many.py), added up."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triptych.kernels.moe import many
from triptych.kernels.moe.ref import Experts
from triptych.kernels.quant.matrices import Mxfp4Matrix

_TILE = 128


def experts_on_gpu(x: Tensor, ids: Tensor, weights: Tensor, moe: Experts) -> Tensor:
    """See ref.experts, in native numerics. Does not synchronise.

    Takes per pair: 1 byte a column of x, 3 of the hidden values, 4 of the output.
    """
    w13, w2 = moe.w13, moe.w2
    assert isinstance(w13, Mxfp4Matrix) and isinstance(w2, Mxfp4Matrix)
    rows, k = ids.shape
    count, dim, inner = w2.shape
    pairs, dev = rows * k, x.device
    flat, order = torch.sort(ids.flatten(), stable=True)
    tiles = _tiles(flat, count)
    gates = weights.flatten()[order].float()
    padded = -(-pairs // 128) * 128 + 128
    xq, xs = _rounded(x.contiguous(), order, pairs, padded, k)
    hidden = torch.empty(pairs, inner, dtype=torch.bfloat16, device=dev)
    shape = dict(DIM=dim, INNER=inner, num_warps=8)
    many.up[(inner // 64, len(tiles))](
        *(xq, xs, tiles, gates, w13.values, w13.scales, hidden, padded, moe.limit), **shape
    )
    del xq, xs
    hq, hs = _rounded(hidden, order, pairs, padded, 0)
    del hidden
    each = torch.empty(pairs, dim, dtype=torch.float32, device=dev)
    many.down[(dim // 128, len(tiles))](hq, hs, tiles, w2.values, w2.scales, each, padded, **shape)
    place = torch.empty_like(order)
    place[order] = torch.arange(pairs, device=dev)
    out = torch.empty(rows, dim, dtype=x.dtype, device=dev)
    _add_up[(rows, triton.cdiv(dim, 1024))](each, place, out, dim, K=k, BLOCK=1024, num_warps=4)
    return out


def _tiles(flat: Tensor, count: int) -> Tensor:
    """[most, 3] int32: expert, first pair and pairs of each tile of sorted experts `flat`; expert -1 beyond them."""
    pairs, dev = len(flat), flat.device
    ends = torch.searchsorted(flat, torch.arange(count, device=dev), right=True)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    tile_ends = torch.cumsum((ends - starts + _TILE - 1) // _TILE, 0)
    t = torch.arange(min(pairs, pairs // _TILE + min(pairs, count)), device=dev)
    expert = torch.searchsorted(tile_ends, t, right=True)
    known = expert < count
    e = expert.clamp(max=count - 1)
    before = torch.where(e > 0, tile_ends[(e - 1).clamp(min=0)], 0)
    first = starts[e] + (t - before) * _TILE
    size = (ends[e] - first).clamp(max=_TILE)
    return torch.stack([torch.where(known, e, -1), first, size], 1).to(torch.int32)


def _rounded(x: Tensor, order: Tensor, pairs: int, padded: int, k: int) -> tuple[Tensor, Tensor]:
    """Rows of the sorted pairs in e4m3, columns in the order of many.py, and scales [width / 128, padded].

    With k = 0 x has the sorted pairs' rows already.
    """
    width = x.shape[1]
    values = torch.empty(pairs, width, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(width // 128, padded, dtype=torch.float32, device=x.device)
    _round_sorted[(pairs, triton.cdiv(width, 1024))](
        x, order, values, scales, width, padded, K=k, GROUPS=8, num_warps=4
    )
    return values, scales


@triton.jit
def _round_sorted(x_ptr, order_ptr, values_ptr, scales_ptr, width, padded, K: tl.constexpr, GROUPS: tl.constexpr):
    p = tl.program_id(0).to(tl.int64)
    row = p
    if K > 0:
        row = tl.load(order_ptr + p) // K
    g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    d = tl.arange(0, 128)
    there = (g * 128 < width)[:, None] & (d >= 0)[None, :]
    x = tl.load(x_ptr + row * width + g[:, None] * 128 + d[None, :], mask=there, other=0.0).to(tl.float32)
    bits = tl.maximum(tl.max(tl.abs(x), 1), 1e-4).to(tl.int32, bitcast=True)
    exponent = ((bits + 0x1FFFFF) >> 23) - 8  # the smallest power of two that 448 times reaches the largest
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    slot = d // 8 % 4 * 32 + d // 4 % 2 * 16 + d // 32 * 4 + d % 4
    at = values_ptr + p * width + g[:, None] * 128 + slot[None, :]
    tl.store(at, (x * inverse[:, None]).to(tl.float8e4nv), mask=there)
    tl.store(scales_ptr + g * padded + p, (exponent << 23).to(tl.float32, bitcast=True), mask=g * 128 < width)


@triton.jit
def _add_up(each_ptr, place_ptr, out_ptr, dim, K: tl.constexpr, BLOCK: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for s in tl.static_range(K):
        total += tl.load(each_ptr + tl.load(place_ptr + r * K + s) * dim + d, mask=d < dim, other=0.0)
    tl.store(out_ptr + r * dim + d, total.to(out_ptr.dtype.element_ty), mask=d < dim)
