"""Hyper-connection sites of many rows (prefill chunks) in five launches; `triton.py` chooses them.

    expand    a program half a row             new streams and their squares
    parted                                     the float32 maps as two bf16 parts, side by side
    products  programs over (64 rows, slice)   streams times maps, a narrow product that reads the streams again
    maps      a thread a row                   sum of the slices, sigmoids, Sinkhorn: sixteen scalars a thread
    mix       a program a row                  collapses the streams and norms

Reading streams thrice at the full rate of memory beats few.py, which reads them twice, 64 bytes of a row at a time.

Few rows take sites.py, where all warps of a row's program do the Sinkhorn steps again: that is issue slots, which are
what is short here. A row's results depend on nothing but its own values, whatever rows share its tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triptych.kernels.mhc.ref import MhcSite
from triptych.kernels.mhc.sites import sinkhorn4

_BLOCK = 2048  # dims of a row that one program expands
_SLICES = 4  # of the products' columns
_MAPS = 32


def fits(streams: Tensor) -> bool:
    """Whether streams [R, n, d] are in what the programs are written for: bf16, in whole slices."""
    return streams.dtype == torch.bfloat16 and streams.shape[2] % (32 * _SLICES) == 0


def site(given: tuple[Any, ...], first: bool, weights: MhcSite, norm: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, streams, post and comb of a site, see ref.mhc_rows. given: y (or the table), ids, streams, post, comb."""
    y, ids, before, old_post, old_comb = given
    rows, n, dim = before.shape
    streams, x = torch.empty_like(before), before.new_empty(rows, dim)
    blocks = triton.cdiv(dim, _BLOCK)
    square = torch.empty(rows, blocks, device=x.device)
    expand[(rows, blocks)](
        y, ids, before, old_post, old_comb, streams, square, dim, FIRST=first, BLOCK=_BLOCK, num_warps=4
    )
    fn = torch.empty(n * dim, 2 * _MAPS, dtype=torch.bfloat16, device=x.device)
    parted[(triton.cdiv(n * dim, 128),)](weights.fn, fn, n * dim, BLOCK=128, MAPS=_MAPS, num_warps=4)
    share = torch.empty(rows, _SLICES, 2 * _MAPS, device=x.device)
    products[(_SLICES, triton.cdiv(rows, 64))](
        *(streams, fn, share, rows, n * dim),
        PART=n * dim // _SLICES,
        ROWS=64,
        MAPS=_MAPS,
        num_warps=4,
        num_stages=3,
    )
    pre, post = torch.empty(rows, n, device=x.device), torch.empty(rows, n, device=x.device)
    comb = torch.empty(rows, n, n, device=x.device)
    maps[(triton.cdiv(rows, 32),)](
        *(share, square, weights.base, weights.scale, pre, post, comb, rows, dim, weights.eps, weights.norm_eps),
        ITERS=weights.iters,
        BLOCKS=blocks,
        ROWS=32,
        SLICES=_SLICES,
        MAPS=_MAPS,
        num_warps=1,
    )
    mix[(rows,)](streams, pre, norm, x, dim, weights.norm_eps, DIM=triton.next_power_of_2(dim), num_warps=4)
    return x, streams, post, comb


@triton.jit
def parted(fn_ptr, out_ptr, columns, BLOCK: tl.constexpr, MAPS: tl.constexpr):
    """fn [24, columns] turned over, in two bf16 parts: out [columns, 2 MAPS], the high parts first."""
    d = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
    m = tl.arange(0, MAPS)[None, :]
    fn = tl.load(fn_ptr + m * columns + d, mask=(m < 24) & (d < columns), other=0.0)
    high = fn.to(tl.bfloat16)
    low = (fn - high.to(tl.float32)).to(tl.bfloat16)
    tl.store(out_ptr + d * (2 * MAPS) + m, high, mask=d < columns)
    tl.store(out_ptr + d * (2 * MAPS) + MAPS + m, low, mask=d < columns)


@triton.jit
def _kept(streams_ptr, x, d, dim):
    """Store values x of a stream; returns the sum of their squares as stored."""
    x = x.to(streams_ptr.dtype.element_ty)
    tl.store(streams_ptr + d, x, mask=d < dim)
    x = x.to(tl.float32)
    return tl.sum(x * x, 0)


@triton.jit
def expand(
    y_ptr, ids_ptr, before_ptr, post_ptr, comb_ptr, streams_ptr, square_ptr, dim,
    FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """New streams of a row in BLOCK dims, and the sum of their squares."""
    r = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = r
    if FIRST:  # y is the embedding table
        source = tl.load(ids_ptr + r).to(tl.int64)
    y = tl.load(y_ptr + source * dim + d, mask=d < dim, other=0.0).to(tl.float32)
    streams_ptr += r * (4 * dim)
    square = 0.0
    if FIRST:
        for k in tl.static_range(4):
            square += _kept(streams_ptr + k * dim, y, d, dim)
    else:
        before_ptr += r * (4 * dim) + d
        b0 = tl.load(before_ptr, mask=d < dim, other=0.0).to(tl.float32)
        b1 = tl.load(before_ptr + dim, mask=d < dim, other=0.0).to(tl.float32)
        b2 = tl.load(before_ptr + 2 * dim, mask=d < dim, other=0.0).to(tl.float32)
        b3 = tl.load(before_ptr + 3 * dim, mask=d < dim, other=0.0).to(tl.float32)
        comb_ptr += r * 16
        for k in tl.static_range(4):
            x = tl.load(post_ptr + r * 4 + k) * y + tl.load(comb_ptr + k) * b0 + tl.load(comb_ptr + 4 + k) * b1
            x += tl.load(comb_ptr + 8 + k) * b2
            x += tl.load(comb_ptr + 12 + k) * b3
            square += _kept(streams_ptr + k * dim, x, d, dim)
    tl.store(square_ptr + r * tl.num_programs(1) + tl.program_id(1), square)


@triton.jit
def products(streams_ptr, maps_ptr, share_ptr, rows, width, PART: tl.constexpr, ROWS: tl.constexpr, MAPS: tl.constexpr):
    """Share [rows, slices, 2 MAPS] of PART columns: streams [rows, width] times both parts of the maps."""
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    m = tl.arange(0, 2 * MAPS)
    d = tl.arange(0, 128)
    first = tl.program_id(0) * PART
    x_at = streams_ptr + tl.minimum(r, rows - 1).to(tl.int64)[:, None] * width + first + d[None, :]
    m_at = maps_ptr + (first + d)[:, None] * (2 * MAPS) + m[None, :]
    total = tl.zeros([ROWS, 2 * MAPS], tl.float32)
    for _ in range(0, PART, 128):
        total = tl.dot(tl.load(x_at), tl.load(m_at), total)
        x_at += 128
        m_at += 128 * 2 * MAPS
    place = (r * tl.num_programs(0) + tl.program_id(0)) * (2 * MAPS)
    tl.store(share_ptr + place[:, None] + m[None, :], total, mask=(r < rows)[:, None])


@triton.jit
def _sum_of(share_ptr, r, live, at: tl.constexpr, SLICES: tl.constexpr, MAPS: tl.constexpr):
    """Column `at` of all slices together, and the column of its low part [ROWS]."""
    x = tl.zeros_like(r).to(tl.float32)
    for s in range(SLICES):
        here = share_ptr + (r * SLICES + s) * (2 * MAPS) + at
        x += tl.load(here, mask=live, other=0.0) + tl.load(here + MAPS, mask=live, other=0.0)
    return x


@triton.jit
def _map(share_ptr, base_ptr, scale_ptr, shrink, r, live, at: tl.constexpr, SLICES: tl.constexpr, MAPS: tl.constexpr):
    """Map `at` of rows r [ROWS], scaled."""
    part: tl.constexpr = 0 if at < 4 else 1 if at < 8 else 2
    z = _sum_of(share_ptr, r, live, at, SLICES, MAPS) * shrink
    return z * tl.load(scale_ptr + part) + tl.load(base_ptr + at)


@triton.jit
def maps(
    share_ptr,
    square_ptr,
    base_ptr,
    scale_ptr,
    pre_ptr,
    post_ptr,
    comb_ptr,
    rows,
    dim,
    eps,
    norm_eps,
    ITERS: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    SLICES: tl.constexpr,
    MAPS: tl.constexpr,
):
    """pre [rows, 4], post [rows, 4] and comb [rows, 4, 4] of ROWS rows, each of which is one lane."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = r < rows
    square = tl.zeros([ROWS], tl.float32)
    for i in tl.static_range(BLOCKS):
        square += tl.load(square_ptr + r * BLOCKS + i, mask=live, other=0.0)
    shrink = tl.rsqrt(square / (4 * dim) + norm_eps)
    for i in tl.static_range(4):
        z = _map(share_ptr, base_ptr, scale_ptr, shrink, r, live, i, SLICES, MAPS)
        tl.store(pre_ptr + r * 4 + i, tl.sigmoid(z) + eps, mask=live)
    for i in tl.static_range(4):
        z = _map(share_ptr, base_ptr, scale_ptr, shrink, r, live, 4 + i, SLICES, MAPS)
        tl.store(post_ptr + r * 4 + i, 2.0 * tl.sigmoid(z), mask=live)
    m0 = _map(share_ptr, base_ptr, scale_ptr, shrink, r, live, 8, SLICES, MAPS)
    m1 = _map(share_ptr, base_ptr, scale_ptr, shrink, r, live, 9, SLICES, MAPS)
    m2 = _map(share_ptr, base_ptr, scale_ptr, shrink, r, live, 10, SLICES, MAPS)
    m3 = _map(share_ptr, base_ptr, scale_ptr, shrink, r, live, 11, SLICES, MAPS)
    m4 = _map(share_ptr, base_ptr, scale_ptr, shrink, r, live, 12, SLICES, MAPS)
    m5 = _map(share_ptr, base_ptr, scale_ptr, shrink, r, live, 13, SLICES, MAPS)
    m6 = _map(share_ptr, base_ptr, scale_ptr, shrink, r, live, 14, SLICES, MAPS)
    m7 = _map(share_ptr, base_ptr, scale_ptr, shrink, r, live, 15, SLICES, MAPS)
    m8 = _map(share_ptr, base_ptr, scale_ptr, shrink, r, live, 16, SLICES, MAPS)
    m9 = _map(share_ptr, base_ptr, scale_ptr, shrink, r, live, 17, SLICES, MAPS)
    m10 = _map(share_ptr, base_ptr, scale_ptr, shrink, r, live, 18, SLICES, MAPS)
    m11 = _map(share_ptr, base_ptr, scale_ptr, shrink, r, live, 19, SLICES, MAPS)
    m12 = _map(share_ptr, base_ptr, scale_ptr, shrink, r, live, 20, SLICES, MAPS)
    m13 = _map(share_ptr, base_ptr, scale_ptr, shrink, r, live, 21, SLICES, MAPS)
    m14 = _map(share_ptr, base_ptr, scale_ptr, shrink, r, live, 22, SLICES, MAPS)
    m15 = _map(share_ptr, base_ptr, scale_ptr, shrink, r, live, 23, SLICES, MAPS)
    all16 = sinkhorn4(m0, m1, m2, m3, m4, m5, m6, m7, m8, m9, m10, m11, m12, m13, m14, m15, eps, ITERS)
    for i in tl.static_range(16):
        tl.store(comb_ptr + r * 16 + i, all16[i], mask=live)


@triton.jit
def mix(streams_ptr, pre_ptr, norm_ptr, x_ptr, dim, norm_eps, DIM: tl.constexpr):
    """x = norm of sum_j pre_j X_j of a row."""
    r = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DIM)
    here = streams_ptr + r * 4 * dim + d
    x = tl.load(pre_ptr + r * 4) * tl.load(here, mask=d < dim, other=0.0).to(tl.float32)
    x += tl.load(pre_ptr + r * 4 + 1) * tl.load(here + dim, mask=d < dim, other=0.0).to(tl.float32)
    x += tl.load(pre_ptr + r * 4 + 2) * tl.load(here + 2 * dim, mask=d < dim, other=0.0).to(tl.float32)
    x += tl.load(pre_ptr + r * 4 + 3) * tl.load(here + 3 * dim, mask=d < dim, other=0.0).to(tl.float32)
    norm = tl.load(norm_ptr + d, mask=d < dim, other=0.0)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / dim + norm_eps) * norm
    tl.store(x_ptr + r * dim + d, x.to(x_ptr.dtype.element_ty), mask=d < dim)
