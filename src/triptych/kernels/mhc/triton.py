"""Hyper-connections for NVIDIA GPUs: one library product for the maps, then one program a row that reads it once.

The norm's factor is a scalar of the row, so it multiplies the product instead of its input; the Sinkhorn iterations
run on an n x n tile in registers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from triptych.kernels.gpu import rounds_rows
from triptych.kernels.mhc import many, sites, together
from triptych.kernels.mhc.few import expand_narrow
from triptych.kernels.mhc.ref import MhcHead, MhcSite, Residual, SiteRows, Uncollapsed
from triptych.kernels.quant.matrices import BothRows, Fp8Rows, empty_rows

Product = Callable[[Tensor, Tensor], Tensor]
"""x W^T; deterministic mode has one of its own."""


def mhc_pre(
    streams: Tensor, site: MhcSite, norm: Tensor, product: Product = torch.nn.functional.linear
) -> tuple[Tensor, Tensor, Tensor]:
    """See ref.mhc_pre."""
    rows, n, dim = streams.shape
    streams = streams.contiguous()
    maps = product(streams.flatten(1), site.fn)
    x, post, comb = streams.new_empty(rows, dim), streams.new_empty(rows, n), streams.new_empty(rows, n, n)
    width = triton.next_power_of_2(dim)
    _pre[(rows,)](
        *(streams, maps, site.base, site.scale, norm, x, post, comb, dim, site.eps, site.norm_eps),
        ITERS=site.iters,
        N=n,
        DIM=width,
        num_warps=_warps(n * width),
    )
    return x, post, comb


def mhc_post(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """See ref.mhc_post."""
    rows, n, dim = streams.shape
    streams, y = streams.contiguous(), y.contiguous()
    out = torch.empty_like(streams)
    block = min(1024, triton.next_power_of_2(dim))
    _post[(rows, triton.cdiv(dim, block))](y, streams, post.contiguous(), comb.contiguous(), out, dim, N=n, BLOCK=block)
    return out


def mhc_head(streams: Tensor, head: MhcHead, product: Product = torch.nn.functional.linear) -> Tensor:
    """See ref.mhc_head."""
    rows, n, dim = streams.shape
    streams = streams.contiguous()
    maps = product(streams.flatten(1), head.fn)
    out = streams.new_empty(rows, dim)
    width = triton.next_power_of_2(dim)
    _head[(rows,)](
        *(streams, maps, head.base, head.scale, out, dim, head.eps, head.norm_eps),
        N=n,
        DIM=width,
        num_warps=_warps(n * width),
    )
    return out


def mhc_rows(y: Tensor, before: Residual, site: MhcSite, norm: Tensor) -> SiteRows:
    """See ref.mhc_rows; one launch, two, or those of many.py."""
    return _site(y, y, before, site, norm, first=False)


def mhc_first(token_ids: Tensor, embed: Tensor, site: MhcSite, norm: Tensor) -> SiteRows:
    """See ref.mhc_first; one launch, or two."""
    return _site(embed, token_ids, no_residual(token_ids, embed, site), site, norm, first=True)


def no_residual(token_ids: Tensor, embed: Tensor, site: MhcSite) -> Residual:
    """What stands for the residual before the first site, which does not read it: only sizes count."""
    rows, n = len(token_ids), site.fn.shape[1] // embed.shape[1]
    return Residual(embed.new_empty(rows, n, embed.shape[1]), site.base, site.base)


def mhc_last(y: Tensor, before: Residual, head: MhcHead, norm: Tensor) -> Tensor:
    """See ref.mhc_last; two launches. A row's bits are its own."""
    rows, n, dim = before.streams.shape
    streams, share = _expand(y, y, before, head.fn, first=False)
    out, slices = streams.new_empty(rows, dim), share.shape[1]
    sites.head[(rows,)](
        *(streams, share, head.base, head.scale, norm, out, slices, dim, head.eps, head.norm_eps),
        N=n,
        SLICES=triton.next_power_of_2(slices),
        MAPS=share.shape[2],
        DIM=triton.next_power_of_2(dim),
        num_warps=8,
    )
    return out


_MIX_WARPS = 4
"""Every warp of a program repeats the Sinkhorn iterations, and more than one on a quarter of a multiprocessor wait."""
_APART = 256  # rows up to which a program of its own for Sinkhorn shortens the step more than it costs
_MANY = 512  # rows that fill the GPU with tiles of many.py
_SLICE = 32  # dims of each stream that one program expands
_TILE = 16  # rows that share what is read of the maps
_INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Triton's interpreter runs one program after the other, and has no Gluon."""


def _site(y: Tensor, ids: Tensor, before: Residual, site: MhcSite, norm: Tensor, *, first: bool) -> SiteRows:
    rows, n, _ = before.streams.shape
    assert n == 4, "the programs of a whole site are written for four streams"
    if rows >= _MANY and many.fits(before.streams) and not _INTERPRETED:
        return many.site((y, ids, before.streams, before.post, before.comb), first, site, norm)
    if together.fits(before.streams):
        post, comb = torch.empty(rows, n, device=y.device), torch.empty(rows, n, n, device=y.device)
        streams = torch.empty_like(before.streams)
        left = before._replace(streams=ids) if first else before
        whole = Uncollapsed(y, left, site, norm, streams, post, comb)
        leaves = site.leaves and not first
        return whole if leaves else together.collapse(whole, first=first), streams, post, comb
    return in_two(y, ids, before, site, norm, first=first, apart=rows <= _APART)


def in_two(
    y: Tensor, ids: Tensor, before: Residual, site: MhcSite, norm: Tensor, *, first: bool, apart: bool
) -> SiteRows:
    """A site in two launches, `apart`: with a program of its own for Sinkhorn. A row's bits are its own."""
    rows, n, _ = before.streams.shape
    post, comb = torch.empty(rows, n, device=y.device), torch.empty(rows, n, n, device=y.device)
    streams, share = _expand(y, ids, before, site.fn, first=first)
    return _collapse((streams, share), site, norm, (post, comb), apart=apart), streams, post, comb


def _collapse(
    expanded: tuple[Tensor, Tensor], site: MhcSite, norm: Tensor, maps: tuple[Tensor, Tensor], *, apart: bool
) -> Tensor | BothRows:
    """The second half of a site: its x, from streams and share. Fills maps, post and comb."""
    (streams, share), (post, comb) = expanded, maps
    rows, n, dim = streams.shape
    x, slices = streams.new_empty(rows, dim), share.shape[1]
    rounds = site.rounds and rounds_rows(x.device, dim)
    rounded = empty_rows(rows, dim, x.device) if rounds else Fp8Rows(x, post)
    sites.mix[(rows, 1 + apart)](
        *(streams, share, site.base, site.scale, norm, x, rounded.values, rounded.scales, post, comb),
        *(slices, dim, site.eps, site.norm_eps),
        ITERS=site.iters,
        APART=apart,
        ROUNDS=rounds,
        N=n,
        SLICES=triton.next_power_of_2(slices),
        MAPS=share.shape[2],
        DIM=triton.next_power_of_2(dim),
        num_warps=_MIX_WARPS,
    )
    return BothRows(x, rounded) if rounds else x


def _expand(y: Tensor, ids: Tensor, before: Residual, fn: Tensor, *, first: bool) -> tuple[Tensor, Tensor]:
    """New streams [R, n, d], and shares of the maps and squares [R, slices, 16 or 32]."""
    old = before.streams
    rows, _, dim = old.shape
    grid = (triton.cdiv(dim, _SLICE), triton.cdiv(rows, _TILE))
    streams, maps = torch.empty_like(old), 32 if len(fn) > 15 else 16
    share = torch.empty(rows, grid[0], maps, device=old.device)
    given = (y, ids, old, before.post, before.comb, streams, fn, share, rows, dim, len(fn))
    meta = dict(FIRST=first, ROWS=_TILE, BLOCK=_SLICE, MAPS=maps)
    narrow = old.dtype == torch.bfloat16
    if narrow and dim % _SLICE == 0 and not _INTERPRETED:
        expand_narrow[grid](*given, **meta, num_warps=1)
    else:
        sites.expand[grid](*given, NARROW=narrow, **meta, num_warps=4)
    return streams, share


def _warps(values: int) -> int:
    """So many that a thread holds 64 values of its row at most."""
    return min(16, max(4, values // (64 * 32)))


@triton.jit
def _tile(streams_ptr, r, dim, norm_eps, N: tl.constexpr, DIM: tl.constexpr):
    """A row's streams [N, DIM] and 1 / rms over all of them."""
    j = tl.arange(0, N)
    d = tl.arange(0, DIM)
    x = tl.load(streams_ptr + (r * N + j[:, None]) * dim + d[None, :], mask=(d < dim)[None, :], other=0.0)
    return x, tl.rsqrt(tl.sum(tl.sum(x * x, 1), 0) / (N * dim) + norm_eps)


@triton.jit
def _pre(
    streams_ptr,
    maps_ptr,
    base_ptr,
    scale_ptr,
    norm_ptr,
    x_ptr,
    post_ptr,
    comb_ptr,
    dim,
    eps,
    norm_eps,
    ITERS: tl.constexpr,
    N: tl.constexpr,
    DIM: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DIM)
    j = tl.arange(0, N)
    x, rms = _tile(streams_ptr, r, dim, norm_eps, N, DIM)
    maps_ptr += r * (2 + N) * N
    pre = tl.load(maps_ptr + j) * rms * tl.load(scale_ptr) + tl.load(base_ptr + j)
    pre = tl.sigmoid(pre) + eps
    post = tl.load(maps_ptr + N + j) * rms * tl.load(scale_ptr + 1) + tl.load(base_ptr + N + j)
    tl.store(post_ptr + r * N + j, 2.0 * tl.sigmoid(post))
    at = 2 * N + j[:, None] * N + j[None, :]
    m = tl.load(maps_ptr + at) * rms * tl.load(scale_ptr + 2) + tl.load(base_ptr + at)
    m = tl.exp(m - tl.max(m, 1)[:, None])
    m = m / tl.sum(m, 1)[:, None] + eps
    m = m / (tl.sum(m, 0) + eps)[None, :]
    for _ in range(ITERS - 1):
        m = m / (tl.sum(m, 1) + eps)[:, None]
        m = m / (tl.sum(m, 0) + eps)[None, :]
    tl.store(comb_ptr + (r * N + j[:, None]) * N + j[None, :], m)
    y = tl.sum(x * pre[:, None], 0)
    y = y * tl.rsqrt(tl.sum(y * y, 0) / dim + norm_eps) * tl.load(norm_ptr + d, mask=d < dim, other=0.0)
    tl.store(x_ptr + r * dim + d, y, mask=d < dim)


@triton.jit
def _post(y_ptr, streams_ptr, post_ptr, comb_ptr, out_ptr, dim, N: tl.constexpr, BLOCK: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    j = tl.arange(0, N)
    x = tl.load(streams_ptr + (r * N + j[:, None]) * dim + d[None, :], mask=(d < dim)[None, :], other=0.0)
    y = tl.load(y_ptr + r * dim + d, mask=d < dim, other=0.0)
    for k in tl.static_range(N):
        mixed = tl.sum(x * tl.load(comb_ptr + (r * N + j) * N + k)[:, None], 0)
        tl.store(out_ptr + (r * N + k) * dim + d, tl.load(post_ptr + r * N + k) * y + mixed, mask=d < dim)


@triton.jit
def _head(streams_ptr, maps_ptr, base_ptr, scale_ptr, out_ptr, dim, eps, norm_eps, N: tl.constexpr, DIM: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DIM)
    j = tl.arange(0, N)
    x, rms = _tile(streams_ptr, r, dim, norm_eps, N, DIM)
    share = tl.sigmoid(tl.load(maps_ptr + r * N + j) * rms * tl.load(scale_ptr) + tl.load(base_ptr + j)) + eps
    tl.store(out_ptr + r * dim + d, tl.sum(x * share[:, None], 0), mask=d < dim)
