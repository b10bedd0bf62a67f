"""Hyper-connection sites of many rows (prefill chunks) in three launches; `triton.py` chooses them.

    expand   programs over (64 rows, slice of d)  new streams; their share of the 24 dot products
    maps     a thread a row                       sum of the shares, sigmoids, Sinkhorn: sixteen scalars a thread
    mix      a program a row                      collapses the streams and norms

Few rows take sites.py, where all warps of a row's program do the Sinkhorn steps again: that is issue slots, which are
what is short here. A row's results depend on nothing but its own values, whatever rows share its tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triptych.kernels.mhc.few import offsets, squares, times, wide
from triptych.kernels.mhc.ref import MhcSite
from triptych.kernels.mhc.sites import sinkhorn4

ROWS = 64
"""Rows of a tile."""
_SLICES = 8
_MAPS = 32


def fits(streams: Tensor) -> bool:
    """Whether streams [R, n, d] are in what the programs are written for: bf16, in whole slices."""
    return streams.dtype == torch.bfloat16 and streams.shape[2] % (32 * _SLICES) == 0


def site(given: tuple[Any, ...], first: bool, weights: MhcSite, norm: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, streams, post and comb of a site, see ref.mhc_rows. given: y (or the table), ids, streams, post, comb."""
    y, ids, before, old_post, old_comb = given
    rows, n, dim = before.shape
    streams, x = torch.empty_like(before), before.new_empty(rows, dim)
    share = torch.empty(rows, _SLICES, _MAPS, device=x.device)
    expand[(_SLICES, triton.cdiv(rows, ROWS))](
        *(y, ids, before, old_post, old_comb, streams, weights.fn, share, rows, dim),
        FIRST=first,
        PART=dim // _SLICES,
        ROWS=ROWS,
        SLICES=_SLICES,
        MAPS=_MAPS,
        num_warps=4,
    )
    pre, post = torch.empty(rows, n, device=x.device), torch.empty(rows, n, device=x.device)
    comb = torch.empty(rows, n, n, device=x.device)
    maps[(triton.cdiv(rows, 32),)](
        *(share, weights.base, weights.scale, pre, post, comb, rows, dim, weights.eps, weights.norm_eps),
        ITERS=weights.iters,
        ROWS=32,
        SLICES=_SLICES,
        MAPS=_MAPS,
        num_warps=1,
    )
    mix[(rows,)](streams, pre, norm, x, dim, weights.norm_eps, DIM=triton.next_power_of_2(dim), num_warps=4)
    return x, streams, post, comb


@gluon.constexpr_function
def _of_rows():
    """[64 rows, 4 threads, 8 dims] of four warps: as in few.py, a warp has rows 8w and 8w + 32 on."""
    lanes = [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    deep, apart = [[0, 0, 1], [0, 0, 2], [0, 0, 4], [32, 0, 0]], [[8, 0, 0], [16, 0, 0]]
    return gl.DistributedLinearLayout(deep, lanes, apart, [], [64, 4, 8])


@gluon.constexpr_function
def _of_maps(maps):
    """[maps, 4 threads, 8 dims], in each of four warps."""
    lanes = [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    more = [[8 << i, 0, 0] for i in range((maps // 8).bit_length() - 1)]
    deep, apart = [[0, 0, 1], [0, 0, 2], [0, 0, 4], *more], [[0, 0, 0], [0, 0, 0]]
    return gl.DistributedLinearLayout(deep, lanes, apart, [], [maps, 4, 8])


@gluon.jit
def _column(ptr, r, live, STEP: gl.constexpr, AT: gl.constexpr):
    """Column AT of rows r of a matrix that is STEP wide, as [ROWS, 1, 1]."""
    return wide(gl.load(ptr + r * STEP + AT, mask=live, other=0.0))


@gluon.jit
def expand(
    y_ptr,
    ids_ptr,
    before_ptr,
    post_ptr,
    comb_ptr,
    streams_ptr,
    fn_ptr,
    share_ptr,
    rows,
    dim,
    FIRST: gl.constexpr,
    PART: gl.constexpr,
    ROWS: gl.constexpr,
    SLICES: gl.constexpr,
    MAPS: gl.constexpr,
):
    """New streams of PART dims, and their share of the maps and, last of MAPS, of the sum of squares.

    As few.py, by four warps of 16 rows each, which share what they read of the maps, and over many dims.
    """
    gl.static_assert(ROWS == 64)
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 4], [16, 8])
    X: gl.constexpr = _of_rows()
    F: gl.constexpr = _of_maps(MAPS)
    first = gl.program_id(0) * PART
    m = gl.arange(0, MAPS, gl.SliceLayout(1, gl.SliceLayout(2, F)))
    fn_ptr += offsets(m, 4 * dim, F) + first
    known = wide(m < 24)
    r = gl.program_id(1) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, X)))
    live = r < rows
    inside = wide(live)
    far = r.to(gl.int64)
    streams_ptr += offsets(far, 4 * dim, X) + first
    before_ptr += offsets(far, 4 * dim, X) + first
    source = far
    if FIRST:  # y is the embedding table
        source = gl.load(ids_ptr + r, mask=live, other=0)
    y_ptr += offsets(source, dim, X) + first
    if not FIRST:
        p0 = _column(post_ptr, r, live, 4, 0)
        p1 = _column(post_ptr, r, live, 4, 1)
        p2 = _column(post_ptr, r, live, 4, 2)
        p3 = _column(post_ptr, r, live, 4, 3)
        c00 = _column(comb_ptr, r, live, 16, 0)
        c01 = _column(comb_ptr, r, live, 16, 1)
        c02 = _column(comb_ptr, r, live, 16, 2)
        c03 = _column(comb_ptr, r, live, 16, 3)
        c10 = _column(comb_ptr, r, live, 16, 4)
        c11 = _column(comb_ptr, r, live, 16, 5)
        c12 = _column(comb_ptr, r, live, 16, 6)
        c13 = _column(comb_ptr, r, live, 16, 7)
        c20 = _column(comb_ptr, r, live, 16, 8)
        c21 = _column(comb_ptr, r, live, 16, 9)
        c22 = _column(comb_ptr, r, live, 16, 10)
        c23 = _column(comb_ptr, r, live, 16, 11)
        c30 = _column(comb_ptr, r, live, 16, 12)
        c31 = _column(comb_ptr, r, live, 16, 13)
        c32 = _column(comb_ptr, r, live, 16, 14)
        c33 = _column(comb_ptr, r, live, 16, 15)
    share = gl.zeros([MAPS, ROWS], gl.float32, MMA)
    square = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, gl.SliceLayout(2, X)))
    for at in range(0, PART, 32):
        if FIRST:
            x0 = gl.load(y_ptr + at, mask=inside, other=0.0)
            x1 = x0
            x2 = x0
            x3 = x0
        else:
            y = gl.load(y_ptr + at, mask=inside, other=0.0)
            b0 = gl.load(before_ptr + at, mask=inside, other=0.0)
            b1 = gl.load(before_ptr + at + dim, mask=inside, other=0.0)
            b2 = gl.load(before_ptr + at + 2 * dim, mask=inside, other=0.0)
            b3 = gl.load(before_ptr + at + 3 * dim, mask=inside, other=0.0)
            y = y.to(gl.float32)
            b0 = b0.to(gl.float32)
            b1 = b1.to(gl.float32)
            b2 = b2.to(gl.float32)
            b3 = b3.to(gl.float32)
            x0 = (p0 * y + c00 * b0 + c10 * b1 + c20 * b2 + c30 * b3).to(gl.bfloat16)
            x1 = (p1 * y + c01 * b0 + c11 * b1 + c21 * b2 + c31 * b3).to(gl.bfloat16)
            x2 = (p2 * y + c02 * b0 + c12 * b1 + c22 * b2 + c32 * b3).to(gl.bfloat16)
            x3 = (p3 * y + c03 * b0 + c13 * b1 + c23 * b2 + c33 * b3).to(gl.bfloat16)
        gl.store(streams_ptr + at, x0, mask=inside)
        gl.store(streams_ptr + at + dim, x1, mask=inside)
        gl.store(streams_ptr + at + 2 * dim, x2, mask=inside)
        gl.store(streams_ptr + at + 3 * dim, x3, mask=inside)
        square += squares(x0) + squares(x1) + squares(x2) + squares(x3)
        share = times(share, gl.load(fn_ptr + at, mask=known, other=0.0), x0, ROWS, MAPS, MMA)
        share = times(share, gl.load(fn_ptr + at + dim, mask=known, other=0.0), x1, ROWS, MAPS, MMA)
        share = times(share, gl.load(fn_ptr + at + 2 * dim, mask=known, other=0.0), x2, ROWS, MAPS, MMA)
        share = times(share, gl.load(fn_ptr + at + 3 * dim, mask=known, other=0.0), x3, ROWS, MAPS, MMA)
    gl.store(share_ptr + (far * SLICES + gl.program_id(0)) * MAPS + MAPS - 1, square, mask=live)
    at_m = gl.arange(0, MAPS, gl.SliceLayout(1, MMA))
    at_r = gl.program_id(1) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, MMA))
    place = (at_r.to(gl.int64) * SLICES + gl.program_id(0)) * MAPS
    kept = (at_m < MAPS - 1)[:, None] & (at_r < rows)[None, :]
    gl.store(share_ptr + place[None, :] + at_m[:, None], share, mask=kept)


@triton.jit
def _sum_of(share_ptr, r, live, at: tl.constexpr, SLICES: tl.constexpr, MAPS: tl.constexpr):
    """Column `at` of all slices together [ROWS]."""
    x = tl.load(share_ptr + r * (SLICES * MAPS) + at, mask=live, other=0.0)
    for s in tl.static_range(1, SLICES):
        x += tl.load(share_ptr + r * (SLICES * MAPS) + s * MAPS + at, mask=live, other=0.0)
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
    ROWS: tl.constexpr,
    SLICES: tl.constexpr,
    MAPS: tl.constexpr,
):
    """pre [rows, 4], post [rows, 4] and comb [rows, 4, 4] of ROWS rows, each of which is one lane."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = r < rows
    square = _sum_of(share_ptr, r, live, MAPS - 1, SLICES, MAPS)
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
