"""A site of a single row in one launch, whose programs wait for each other's numbers (meeting.py).

    program (slice of 512 dims, share)   the slice of all new streams, and of it 2 of the 24 maps, or 4 of the streams'
                                         products with each other; of everybody's sums, then, the slice of the
                                         collapsed row
    one more                             post and comb

The norm of the collapsed row is a form of its streams' products, so nobody waits a second time for it. In
moe/together.py the router stands behind it, in the same launch. Of four rows all this took 34 to 41 us instead of 13.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triptych.kernels.gpu import is_hopper, multiprocessors
from triptych.kernels.mhc.meeting import WARPS, begin, count, end, gathered, in_order, meeting, tell
from triptych.kernels.mhc.ref import Uncollapsed
from triptych.kernels.mhc.sites import sinkhorn4
from triptych.kernels.quant.e4m3 import scale_of
from triptych.kernels.quant.matrices import BothRows, Fp8Rows, empty_rows

WIDE = gl.constexpr(512)
"""Dims of a slice: four of each thread."""
SHARES = gl.constexpr(16)
PLACES = gl.constexpr(64)
"""Numbers of a slice: 24 maps, 16 products, and room."""

_MAPS = gl.constexpr(24)
_TOLD = gl.constexpr(40)


def fits(streams: Tensor) -> bool:
    """Whether a launch serves rows [R, n, d]: two programs fit each multiprocessor, so that all run side by side."""
    rows, n, dim = streams.shape
    on = streams.dtype == torch.bfloat16 and is_hopper(streams.device)
    programs = dim // WIDE.value * SHARES.value + 2
    return on and n == 4 and rows == 1 and dim % WIDE.value == 0 and programs <= 2 * multiprocessors(streams.device)


def collapse(row: Uncollapsed, *, first: bool = False) -> Tensor | BothRows:
    """The site's x; fills streams, post and comb. `first`: y is the embedding table, before.streams the row's token."""
    dim = row.streams.shape[2]
    x = row.streams.new_empty(1, dim)
    rounded = empty_rows(1, dim, x.device) if row.site.rounds else Fp8Rows(x, row.post)
    site_together[(dim // WIDE.value * SHARES.value + 1,)](
        *(*pointers(row), x, rounded.values, rounded.scales, *sizes(row)),
        FIRST=first,
        ROUNDS=row.site.rounds,
        **shape_of(row),
    )
    return BothRows(x, rounded) if row.site.rounds else x


def pointers(row: Uncollapsed) -> tuple[Tensor, ...]:
    """What programs of a site read and write, up to the norm's weights."""
    site = row.site
    return (
        *(row.y, *row.before, row.streams, row.post, row.comb, site.fn, site.base, site.scale, row.norm),
        *meeting(row.y.device),
    )


def sizes(row: Uncollapsed) -> tuple[int | float, ...]:
    """Dims and both eps."""
    return row.streams.shape[2], row.site.eps, row.site.norm_eps


def shape_of(row: Uncollapsed) -> dict[str, int]:
    """What a kernel is compiled for."""
    slices = triton.next_power_of_2(row.streams.shape[2] // WIDE.value)
    return dict(ITERS=row.site.iters, SLICES=slices, num_warps=WARPS.value)


@gluon.constexpr_function
def row_layout():
    """[dims of a slice]: four of each thread."""
    return gl.BlockedLayout([4], [32], [4], [0])


@gluon.constexpr_function
def _sums_layout():
    """[2, 2]: sums over dims of four values, in every thread."""
    return gl.SliceLayout(0, gl.BlockedLayout([4, 2, 2], [32, 1, 1], [4, 1, 1], [2, 1, 0]))


@gluon.constexpr_function
def told_layout():
    """[slices, numbers]: a warp has every fourth slice, and every warp all numbers of their sums."""
    return gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0])


@gluon.jit
def _four(i, a, b, c, d):
    return gl.where(i == 0, a, gl.where(i == 1, b, gl.where(i == 2, c, d)))


@gluon.jit
def _parts(post_ptr, comb_ptr, K: gl.constexpr):
    """What of a block's output and of each old stream goes into stream K."""
    comb_ptr += K
    return (
        gl.load(post_ptr + K),
        gl.load(comb_ptr),
        gl.load(comb_ptr + 4),
        gl.load(comb_ptr + 8),
        gl.load(comb_ptr + 12),
    )


@gluon.jit
def _four_rows(at, dim):
    """The slices of all four streams, or of a map's weights for them."""
    x0 = gl.load(at).to(gl.float32)
    x1 = gl.load(at + dim).to(gl.float32)
    x2 = gl.load(at + 2 * dim).to(gl.float32)
    return x0, x1, x2, gl.load(at + 3 * dim).to(gl.float32)


@gluon.jit
def _mixed(p, c0, c1, c2, c3, y, b0, b1, b2, b3):
    """A new stream, as bf16 holds it."""
    x = p * y + c0 * b0
    x += c1 * b1
    x += c2 * b2
    return (x + c3 * b3).to(gl.bfloat16).to(gl.float32)


@gluon.jit
def _tell_sums(s0, s1, s2, s3, at, launch, many):
    """Sums over dims of four values, of which `many` are told."""
    S: gl.constexpr = _sums_layout()
    sums = gl.convert_layout(gl.sum(gl.join(gl.join(s0, s1), gl.join(s2, s3)), 0), S, assert_trivial=True)
    i = gl.arange(0, 2, gl.SliceLayout(1, S))[:, None]
    nth = i + 2 * gl.arange(0, 2, gl.SliceLayout(0, S))[None, :]
    tell(at + nth, sums, launch, nth < many)


@gluon.jit
def _maps(meet_ptr, launch, base_ptr, scale_ptr, dim, norm_eps, SLICES: gl.constexpr):
    """Places [PLACES], scaled maps, and the sums that they come from, the streams' products behind them."""
    T: gl.constexpr = told_layout()
    m = gl.arange(0, PLACES, gl.SliceLayout(0, T))
    base = gl.load(base_ptr + m, mask=m < _MAPS, other=0.0)
    scale = gl.load(scale_ptr + gl.where(m < 4, 0, gl.where(m < 8, 1, 2)))
    s = gl.arange(0, SLICES, gl.SliceLayout(1, T))[:, None]
    there = (s < dim // WIDE) & (m < _TOLD)[None, :]
    total = gl.sum(gathered(meet_ptr, s * PLACES + m[None, :], there, launch), 0)
    squares = ((m - _MAPS) % 5 == 0) & (m >= _MAPS) & (m < _TOLD)
    square = gl.sum(gl.where(squares, total, 0.0), 0)
    return m, total * gl.rsqrt(square / (4 * dim) + norm_eps) * scale + base, total


@gluon.jit
def _nth(z, m, i):
    """Number i as a scalar."""
    return gl.sum(gl.where(m == i, z, 0.0), 0)


@gluon.jit
def _sigmoid(x):
    return 1.0 / (1.0 + gl.exp(-x))


@gluon.jit
def collapsed(
    y_ptr, before_ptr, post_ptr, comb_ptr, streams_ptr, fn_ptr, base_ptr, scale_ptr, norm_ptr, meet_ptr, launch_ptr,
    beside, wanted, launch, piece, share, dim, eps, norm_eps, FIRST: gl.constexpr, SLICES: gl.constexpr,
):  # fmt: skip
    """A slice of the collapsed and normed row [WIDE], bf16, what lies at the pointers `beside`, and `count`.

    Stores the slice of a stream. All that is read is asked for before anything is waited for. FIRST: streams are the
    row of the embedding table y of the token at before_ptr.
    """
    d = piece * WIDE + gl.arange(0, WIDE, row_layout())
    has_maps = share < _MAPS // 2
    at = fn_ptr + gl.where(has_maps, 2 * share, 0) * (4 * dim) + d
    f0, f1, f2, f3 = _four_rows(at, dim)
    g0, g1, g2, g3 = _four_rows(at + 4 * dim, dim)
    in_order()
    if FIRST:
        x0 = gl.load(y_ptr + gl.load(before_ptr) * dim + d).to(gl.float32)
    else:
        y = gl.load(y_ptr + d).to(gl.float32)
        b0, b1, b2, b3 = _four_rows(before_ptr + d, dim)
        p0, c00, c10, c20, c30 = _parts(post_ptr, comb_ptr, 0)
        p1, c01, c11, c21, c31 = _parts(post_ptr, comb_ptr, 1)
        p2, c02, c12, c22, c32 = _parts(post_ptr, comb_ptr, 2)
        p3, c03, c13, c23, c33 = _parts(post_ptr, comb_ptr, 3)
    in_order()
    norm = gl.load(norm_ptr + d)
    got = beside if wanted is None else gl.load(beside, mask=wanted, other=0.0)
    in_order()
    known = count(launch_ptr, launch)
    if FIRST:
        x1 = x0
        x2 = x0
        x3 = x0
    else:
        x0 = _mixed(p0, c00, c10, c20, c30, y, b0, b1, b2, b3)
        x1 = _mixed(p1, c01, c11, c21, c31, y, b0, b1, b2, b3)
        x2 = _mixed(p2, c02, c12, c22, c32, y, b0, b1, b2, b3)
        x3 = _mixed(p3, c03, c13, c23, c33, y, b0, b1, b2, b3)
    own = _four(share % 4, x0, x1, x2, x3)
    s0 = gl.where(has_maps, f0 * x0 + f1 * x1 + f2 * x2 + f3 * x3, own * x0)
    s1 = gl.where(has_maps, g0 * x0 + g1 * x1 + g2 * x2 + g3 * x3, own * x1)
    first = gl.where(has_maps, 2 * share, _MAPS + 4 * (share - _MAPS // 2))
    _tell_sums(s0, s1, own * x2, own * x3, meet_ptr + piece * PLACES + first, launch, gl.where(has_maps, 2, 4))
    gl.store(streams_ptr + share * dim + d, own.to(gl.bfloat16), mask=(d < dim) & (share < 4))
    m, z, total = _maps(meet_ptr, launch, base_ptr, scale_ptr, dim, norm_eps, SLICES)
    return _normed(x0, x1, x2, x3, norm, m, _sigmoid(z) + eps, total, dim, norm_eps), got, known


@gluon.jit
def _normed(x0, x1, x2, x3, norm, m, pre, total, dim, norm_eps):
    """The streams, weighed by pre [PLACES], and normed: their products with each other are in `total`."""
    w0, w1, w2, w3 = _nth(pre, m, 0), _nth(pre, m, 1), _nth(pre, m, 2), _nth(pre, m, 3)
    pair = m - _MAPS
    form = _four(pair // 4, w0, w1, w2, w3) * _four(pair % 4, w0, w1, w2, w3) * total
    square = gl.sum(gl.where((pair >= 0) & (pair < 16), form, 0.0), 0)
    x = w0 * x0 + w1 * x1
    x += w2 * x2
    x += w3 * x3
    return (x * gl.rsqrt(square / dim + norm_eps) * norm).to(gl.bfloat16)


@gluon.jit
def put_rounded(x, values_ptr, scales_ptr, piece, share):
    """The share's 128 columns of a slice x, rounded to e4m3, and their scale."""
    GROUPS: gl.constexpr = WIDE // 128
    L: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
    g = gl.arange(0, GROUPS, gl.SliceLayout(1, L))[:, None]
    i = gl.arange(0, 128, gl.SliceLayout(0, L))[None, :]
    x = gl.convert_layout(gl.reshape(x.to(gl.float32), [GROUPS, 128]), L)
    scale, inverse = scale_of(gl.max(gl.abs(x), 1)[:, None])
    gl.store(values_ptr + piece * WIDE + g * 128 + i, (x * inverse).to(gl.float8e4nv), mask=g == share)
    gl.store(scales_ptr + piece * GROUPS + g, scale, mask=g == share)


@gluon.jit
def keep_maps(
    post_ptr, comb_ptr, base_ptr, scale_ptr, meet_ptr, launch, dim, eps, norm_eps,
    ITERS: gl.constexpr, SLICES: gl.constexpr,
):  # fmt: skip
    """post and comb. The matrix is sixteen scalars in every thread."""
    m, z, _ = _maps(meet_ptr, launch, base_ptr, scale_ptr, dim, norm_eps, SLICES)
    gl.store(post_ptr + m - 4, 2.0 * _sigmoid(z), mask=(m >= 4) & (m < 8))
    a0, a1, a2, a3 = _nth(z, m, 8), _nth(z, m, 9), _nth(z, m, 10), _nth(z, m, 11)
    b0, b1, b2, b3 = _nth(z, m, 12), _nth(z, m, 13), _nth(z, m, 14), _nth(z, m, 15)
    c0, c1, c2, c3 = _nth(z, m, 16), _nth(z, m, 17), _nth(z, m, 18), _nth(z, m, 19)
    d0, d1, d2, d3 = _nth(z, m, 20), _nth(z, m, 21), _nth(z, m, 22), _nth(z, m, 23)
    a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3 = sinkhorn4(
        a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3, eps, ITERS
    )
    _store4(comb_ptr, a0, a1, a2, a3)
    _store4(comb_ptr + 4, b0, b1, b2, b3)
    _store4(comb_ptr + 8, c0, c1, c2, c3)
    _store4(comb_ptr + 12, d0, d1, d2, d3)


@gluon.jit
def _store4(at, a, b, c, d):
    gl.store(at, a)
    gl.store(at + 1, b)
    gl.store(at + 2, c)
    gl.store(at + 3, d)


@gluon.jit
def site_together(
    y_ptr, before_ptr, post_ptr, comb_ptr, streams_ptr, new_post_ptr, new_comb_ptr, fn_ptr, base_ptr, scale_ptr,
    norm_ptr, meet_ptr, launch_ptr, x_ptr, values_ptr, scales_ptr, dim, eps, norm_eps,
    ITERS: gl.constexpr, FIRST: gl.constexpr, ROUNDS: gl.constexpr, SLICES: gl.constexpr,
):  # fmt: skip
    """x [dim], ROUNDS: also as e4m3 values and scales; new streams, post and comb."""
    launch = begin(launch_ptr)
    piece, share = gl.program_id(0) // SHARES, gl.program_id(0) % SHARES
    if piece < dim // WIDE:
        x, _, known = collapsed(
            y_ptr, before_ptr, post_ptr, comb_ptr, streams_ptr, fn_ptr, base_ptr, scale_ptr, norm_ptr, meet_ptr,
            launch_ptr, launch, None, launch, piece, share, dim, eps, norm_eps, FIRST, SLICES,
        )  # fmt: skip
        end(launch_ptr, launch, known)
        i = gl.arange(0, WIDE, row_layout())
        gl.store(x_ptr + piece * WIDE + i, x, mask=i // 128 == share)
        if ROUNDS:
            put_rounded(x, values_ptr, scales_ptr, piece, share)
    else:
        end(launch_ptr, launch, count(launch_ptr, launch))
        keep_maps(new_post_ptr, new_comb_ptr, base_ptr, scale_ptr, meet_ptr, launch, dim, eps, norm_eps, ITERS, SLICES)
